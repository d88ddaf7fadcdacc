"""What `generate` and `chat` share: the arguments of a request, and how an answer is shown as it comes."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import cast

from appliance.cli.arguments import positive, real, seconds, whole
from appliance.cli.failure import UsageError
from appliance.cli.output import emit_line, write_text
from appliance.client import Client, Options, Stream
from appliance.client.results import Completed

MAX_SEED, MAX_TOP_K = (1 << 64) - 1, (1 << 31) - 1
_SAMPLING = ("temperature", "top_p", "top_k", "seed", "max_tokens", "stop", "timeout")


def add_request_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Model, text, credentials and sampling."""
    parser.add_argument("model", metavar="MODEL", help="an alias that the tenant may call")
    parser.add_argument("text", metavar=what.upper(), help=f"the {what}; - reads it from standard input")
    parser.add_argument(
        "--credentials",
        type=Path,
        metavar="DIR",
        help="made by `cloister key issue --out DIR` (CLOISTER_CREDENTIALS)",
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="of the gateway, if not the one in the credentials")
    parser.add_argument("--temperature", type=real, metavar="T", help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=real, metavar="P", help="draw from the likeliest tokens that make up P")
    parser.add_argument("--top-k", type=whole(0, MAX_TOP_K), metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--seed", type=whole(0, MAX_SEED), metavar="N", help="same seed, model and input: same answer"
    )
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="length of the answer, at most")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--timeout", type=seconds, metavar="S", help="seconds, default 120")
    parser.add_argument("--stats", action="store_true", help="tokens, speed and audit record on standard error")


def client_of(args: argparse.Namespace) -> Client:
    """The client that the credentials make.

    Raises:
        UsageError: none are named.
    """
    directory = args.credentials or os.environ.get("CLOISTER_CREDENTIALS")
    if not directory:
        raise UsageError("name the credentials: --credentials DIR, as `cloister key issue --out DIR` made them")
    return Client.from_dir(directory, args.address)


def options_of(args: argparse.Namespace) -> Options:
    """What was asked for; the rest is left to the server."""
    given = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}
    return cast(Options, given)


def text_of(args: argparse.Namespace) -> str:
    """The prompt or message, from standard input as its bytes are.

    Raises:
        UsageError: standard input is not UTF-8.
    """
    if args.text != "-":
        return str(args.text)
    if sys.stdin.isatty():
        print("reading from the terminal; end with Ctrl-D", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None


def show(args: argparse.Namespace, stream: Stream) -> int:
    """Print the answer as it comes, with --json its events, one a line."""
    with stream:
        if args.json:
            _show_events(args, stream)
        else:
            _show_text(stream)
        if args.stats:
            print(stats(stream), file=sys.stderr)
    return 0


def stats(stream: Stream) -> str:
    """One line about a finished answer."""
    usage, times = stream.usage, stream.completed.timings
    computed = (times.prefill + times.decode).total_seconds()
    rate = f"{usage.completion_tokens / computed:.0f} tokens/s" if computed > 0 else "-"
    return (
        f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, {rate}, "
        f"first after {times.time_to_first_token.total_seconds() * 1000:.0f} ms, "
        f"ended by {stream.finished.reason}, audit record {stream.receipt.audit_sequence}"
    )


def _show_text(stream: Stream) -> None:
    last = "\n"
    for text in stream:
        write_text(text)
        last = text
    if not last.endswith("\n") and sys.stdout.isatty():
        print()


def _show_events(args: argparse.Namespace, stream: Stream) -> None:
    announced = False
    for text in stream:
        if not announced:
            emit_line(args, {"event": "accepted", **asdict(stream.accepted)}, "")
            announced = True
        emit_line(args, {"event": "delta", "text": text}, "")
    if not announced:
        emit_line(args, {"event": "accepted", **asdict(stream.accepted)}, "")
    emit_line(args, {"event": "finished", **asdict(stream.finished)}, "")
    emit_line(args, {"event": "completed", **_completed(stream.completed)}, "")
    receipt = asdict(stream.receipt)
    emit_line(args, {"event": "receipt", **receipt, "leaf_hash": stream.receipt.leaf_hash.hex()}, "")


def _completed(completed: Completed) -> dict[str, object]:
    timings = {name: value.total_seconds() for name, value in asdict(completed.timings).items()}
    return {"usage": asdict(completed.usage), "timings": timings}
