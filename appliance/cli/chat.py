"""`cloister chat`: one message to a model, its answer streamed to the terminal."""

import argparse

from appliance.cli import answering
from appliance.client import Message


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister chat`."""
    answering.add_request_arguments(parser, "message")
    parser.add_argument("--system", metavar="TEXT", help="a system message before it")
    parser.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> int:
    system = [Message("system", args.system)] if args.system else []
    messages = [*system, Message("user", answering.text_of(args))]
    with answering.client_of(args) as client:
        return answering.show(args, client.chat(args.model, messages, **answering.options_of(args)))
