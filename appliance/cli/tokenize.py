"""`cloister tokenize`: the tokens that a model sees in a text."""

import argparse

from appliance.cli import answering
from appliance.cli.output import emit
from appliance.client.requests import DEFAULT_TIMEOUT_S


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister tokenize`."""
    parser.add_argument("model", metavar="MODEL", help="an alias that the tenant may call")
    parser.add_argument("text", metavar="TEXT", help="the text; - reads it from standard input")
    answering.add_connection_arguments(parser)
    parser.add_argument(
        "--no-special-tokens",
        action="store_true",
        help="leave out those that the model begins or ends a text with",
    )
    parser.set_defaults(run=_tokenize)


def _tokenize(args: argparse.Namespace) -> int:
    text = answering.text_of(args)
    with answering.client_of(args) as client:
        ids = client.tokenize(
            args.model,
            text,
            add_special_tokens=not args.no_special_tokens,
            timeout=args.timeout or DEFAULT_TIMEOUT_S,
        )
    emit(args, {"token_ids": ids, "tokens": len(ids)}, " ".join(map(str, ids)))
    return 0
