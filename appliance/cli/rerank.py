"""`cloister rerank`: documents by how well they answer a query."""

import argparse
import sys
from dataclasses import asdict

from appliance.cli import answering
from appliance.cli.arguments import positive
from appliance.cli.output import emit, table
from appliance.client.requests import DEFAULT_TIMEOUT_S

_SHOWN = 60  # characters of a document


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister rerank`."""
    parser.add_argument("model", metavar="MODEL", help="an alias that the tenant may call")
    parser.add_argument("query", metavar="QUERY", help="what is asked")
    parser.add_argument("document", metavar="DOC", nargs="+", help="the documents, at most 256")
    answering.add_connection_arguments(parser)
    parser.add_argument("--top-n", type=positive, metavar="N", help="show the best N")
    answering.add_batch_arguments(parser)
    parser.set_defaults(run=_rerank)


def _rerank(args: argparse.Namespace) -> int:
    with answering.client_of(args) as client:
        answer = client.rerank(
            args.model,
            args.query,
            args.document,
            top_n=args.top_n,
            truncate=args.truncate,
            timeout=args.timeout or DEFAULT_TIMEOUT_S,
        )
    rows = [(f"{one.score:.4f}", one.index, _short(args.document[one.index])) for one in answer.results]
    emit(args, [asdict(one) for one in answer.results], table(("score", "index", "document"), rows))
    if args.stats:
        print(answering.batch_stats(answer.usage, answer.timings, answer.receipt), file=sys.stderr)
    return 0


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 2]}.."
