"""`cloister embed`: vectors of texts."""

import argparse
import json
import sys

from appliance.cli import answering
from appliance.cli.arguments import positive
from appliance.cli.failure import UsageError
from appliance.cli.output import emit_line
from appliance.client.requests import DEFAULT_TIMEOUT_S


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister embed`."""
    parser.description = (
        "Vectors of texts, as lines of JSON in the order of the texts: index, values, prompt_tokens, truncated."
    )
    parser.add_argument("model", metavar="MODEL", help="an alias that the tenant may call")
    parser.add_argument(
        "text",
        metavar="TEXT",
        nargs="+",
        help="texts, at most 256; - alone reads standard input, one a line, as it is or as a JSON string",
    )
    answering.add_connection_arguments(parser)
    parser.add_argument("--dimensions", type=positive, metavar="N", help="keep the first N numbers of each vector")
    parser.add_argument(
        "--no-normalize", action="store_true", help="leave vectors as the model makes them, not of length 1"
    )
    answering.add_batch_arguments(parser)
    parser.set_defaults(run=_embed)


def _embed(args: argparse.Namespace) -> int:
    texts = _lines() if args.text == ["-"] else args.text
    with answering.client_of(args) as client:
        answer = client.embed(
            args.model,
            texts,
            dimensions=args.dimensions,
            normalize=not args.no_normalize,
            truncate=args.truncate,
            timeout=args.timeout or DEFAULT_TIMEOUT_S,
        )
    args.json = True
    for one in answer.embeddings:
        line = {
            "index": one.index,
            "values": one.values,
            "prompt_tokens": one.prompt_tokens,
            "truncated": one.truncated,
        }
        emit_line(args, line, "")
    if args.stats:
        print(answering.batch_stats(answer.usage, answer.timings, answer.receipt), file=sys.stderr)
    return 0


def _lines() -> list[str]:
    """The texts on standard input, one a line; a line that is a JSON string is the text it stands for.

    Raises:
        UsageError: standard input is not UTF-8, or has no line with anything in it.
    """
    given = answering.read_standard_input().split("\n")
    lines = [_text(line.removesuffix("\r")) for line in given if line.strip()]
    if not lines:
        raise UsageError("standard input has no text")
    return lines


def _text(line: str) -> str:
    if line.startswith('"'):
        try:
            given = json.loads(line)
        except ValueError:
            return line
        if isinstance(given, str):
            return given
    return line
