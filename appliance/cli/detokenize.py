"""`cloister detokenize`: the text of a model's tokens."""

import argparse

from appliance.cli import answering
from appliance.cli.arguments import whole
from appliance.cli.output import emit, printable_text
from appliance.client.requests import DEFAULT_TIMEOUT_S


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister detokenize`."""
    parser.add_argument("model", metavar="MODEL", help="an alias that the tenant may call")
    parser.add_argument(
        "token_ids",
        metavar="ID",
        nargs="+",
        type=whole(0, answering.MAX_TOKEN_ID),
        help="tokens of its vocabulary",
    )
    answering.add_connection_arguments(parser)
    parser.set_defaults(run=_detokenize)


def _detokenize(args: argparse.Namespace) -> int:
    with answering.client_of(args) as client:
        text = client.detokenize(args.model, args.token_ids, timeout=args.timeout or DEFAULT_TIMEOUT_S)
    emit(args, {"text": text}, printable_text(text))
    return 0
