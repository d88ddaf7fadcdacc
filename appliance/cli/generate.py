"""`cloister generate`: a raw prompt continued, without a chat template."""

import argparse

from appliance.cli import answering


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister generate`."""
    answering.add_request_arguments(parser, "prompt")
    parser.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> int:
    prompt = answering.text_of(args)
    with answering.client_of(args) as client:
        return answering.show(args, client.generate(args.model, prompt, **answering.options_of(args)))
