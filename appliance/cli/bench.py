"""`cloister bench`: how fast this machine does what it does, beside what it could do at most."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli import arguments, bench_engine, bench_serve
from appliance.cli.output import emit

if TYPE_CHECKING:
    from bundles.benchmark import Outcome

_UNITS = {"": 1, "MiB": 1 << 20, "GiB": 1 << 30}
_LEAST, _MOST = 32 << 20, 1 << 44


def register(parser: argparse.ArgumentParser) -> None:
    """The verbs of `cloister bench`."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    importing = verbs.add_parser(
        "import",
        help="the importer, from one disk to another",
        description="Builds a bundle that nothing can shorten, imports it into a fresh store, and prints the rate "
        "beside what the disks and the processor reach alone. All that it writes is removed; three times --size "
        "must be free.",
    )
    importing.add_argument("--size", type=_size, default=2 << 30, help="of the model, as 512MiB or 2GiB (default)")
    importing.add_argument(
        "--from", dest="medium", type=arguments.directory, metavar="DIR", help="on the disk that bundles come from"
    )
    importing.add_argument("--to", type=arguments.directory, metavar="DIR", help="on the disk of the model store")
    importing.add_argument("--rounds", type=arguments.whole(1, 100), default=3, help="how often (default 3)")
    importing.set_defaults(run=_import)
    bench_engine.register(
        verbs.add_parser(
            "engine",
            help="the engine alone: prompts, batches of answers, and a workload of many requests",
            description="Tokens per second of whole steps, beside what memory and processor allow in the same "
            "run. The last line is a JSON object.",
        )
    )
    bench_serve.register(
        verbs.add_parser(
            "serve",
            help="a running appliance, as applications see it",
            description="Requests arrive at random moments, at each rate in turn; told are the times to the first "
            "token and between tokens, and how many requests a second met both objectives.",
        )
    )


def _size(text: str) -> int:
    found = re.fullmatch(r"([1-9][0-9]{0,14})(|MiB|GiB)", text)
    size = int(found[1]) * _UNITS[found[2]] if found else 0
    if not _LEAST <= size <= _MOST:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a size from 32MiB to 16384GiB")
    return size


def _import(args: argparse.Namespace) -> int:
    from bundles.benchmark import Options, measure

    store: Path = args.to or (args.home if args.home.is_dir() else Path.cwd())
    options = Options(args.medium or store, store, args.size, args.rounds)
    outcome = measure(options, lambda text: print(text, file=sys.stderr, flush=True))
    emit(args, outcome.as_dict(), _page(outcome))
    return 0


def _page(outcome: "Outcome") -> str:
    def rate(name: str, part: int = 1) -> str:
        each = "  ".join(f"{getattr(found, name) / part / 1e6:8.0f}" for found in outcome.rounds)
        return f"{outcome.middle(name) / part / 1e6:8.0f}   {each}"

    middle = outcome.middle
    cached = f"{middle('cached'):.0%} of it in memory before"
    summary = (
        f"import: {outcome.share():.0%} of its round's ceiling, {outcome.share('streamed'):.0%} while it streams, "
        f"{outcome.bundle_bytes / 1e6:.0f} MB each time"
    )
    halved = f"SHA-256, {outcome.cores} threads, half of it"
    lines = [
        f"{'MB/s':<34}  {'median':>8}   each round",
        f"{'reading the bundle':<34}  {rate('read')}   {cached}",
        f"{'writing as much, durably':<34}  {rate('write')}",
        f"{'SHA-256, one thread':<34}  {rate('hashing')}",
        f"{halved:<34}  {rate('hashing_all', 2)}   a byte is hashed twice",
        f"{'ceiling: the least, round by round':<34}  {outcome.ceiling / 1e6:8.0f}",
        f"{'import, to the commit':<34}  {rate('imported')}",
        f"{'import, the stream alone':<34}  {rate('streamed')}",
        "",
        f"{summary}, {middle('rss_peak') / 2**20:.0f} MiB of memory at most",
        json.dumps(outcome.as_dict()),
    ]
    return "\n".join(lines)
