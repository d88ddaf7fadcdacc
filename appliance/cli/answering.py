"""What the commands of a tenant's application share: the arguments of a request, and how an answer is shown."""

import argparse
import os
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import cast

from appliance.cli.arguments import positive, real, seconds, whole
from appliance.cli.failure import UsageError
from appliance.cli.output import emit_line, write_text
from appliance.client import Client, Options, Stream
from appliance.client.batches import BatchTimings
from appliance.client.requests import MAX_ANSWERS
from appliance.client.results import Completed, Delta, Receipt, Usage
from appliance.client.transcript import Answer

MAX_SEED, MAX_TOP_K = (1 << 64) - 1, (1 << 31) - 1
MAX_TOKEN_ID, MAX_LOGPROBS = (1 << 32) - 1, 20
_OPTIONS = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "seed", "n", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "logprobs",
    "prompt_logprobs", "timeout",
)  # fmt: skip


def add_request_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Model, text, credentials, sampling, stopping and output."""
    parser.add_argument("model", metavar="MODEL", help="an alias that the tenant may call")
    parser.add_argument("text", metavar=what.upper(), help=f"the {what}; - reads it from standard input")
    add_connection_arguments(parser)
    _add_sampling(parser.add_argument_group("how tokens are drawn"))
    _add_stopping(parser.add_argument_group("when the answer ends"))
    output = parser.add_argument_group("what is shown")
    likeliest = whole(0, MAX_LOGPROBS)
    output.add_argument(
        "--logprobs", type=likeliest, metavar="N", help="log probabilities, and of the N likeliest; with --json"
    )
    output.add_argument("--prompt-logprobs", type=likeliest, metavar="N", help="the same for the prompt's tokens")
    output.add_argument("--stats", action="store_true", help="tokens, speed and audit record on standard error")


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Who asks, where, and for how long."""
    parser.add_argument(
        "--credentials",
        type=Path,
        metavar="DIR",
        help="made by `cloister key issue --out DIR` (CLOISTER_CREDENTIALS)",
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="of the gateway, if not the one in the credentials")
    parser.add_argument("--timeout", type=seconds, metavar="S", help="seconds, default 120")


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """Of requests with many inputs."""
    parser.add_argument(
        "--truncate", action="store_true", help="cut what is longer than the model takes, and say so"
    )
    parser.add_argument("--stats", action="store_true", help="tokens, time and audit record on standard error")


def _add_sampling(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--temperature", type=real, metavar="T", help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=real, metavar="P", help="draw from the likeliest tokens that make up P")
    parser.add_argument("--top-k", type=whole(0, MAX_TOP_K), metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--min-p", type=real, metavar="P", help="drop tokens less likely than this share of the likeliest"
    )
    parser.add_argument("--frequency-penalty", type=real, metavar="X", help="for each use of a token, -2 to 2")
    parser.add_argument("--presence-penalty", type=real, metavar="X", help="for a token that was used, -2 to 2")
    parser.add_argument("--repetition-penalty", type=real, metavar="X", help="the same as a factor; 1 is off")
    parser.add_argument(
        "--logit-bias",
        type=bias,
        action="append",
        metavar="ID=X",
        help="add X to a token's logit; may be repeated",
    )
    parser.add_argument(
        "--seed", type=whole(0, MAX_SEED), metavar="N", help="same seed, model and input: same answer"
    )
    parser.add_argument(
        "-n", "--answers", dest="n", type=whole(1, MAX_ANSWERS), metavar="N", help="answers, 1 to 8"
    )


def _add_stopping(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="length of an answer, at most")
    parser.add_argument(
        "--min-tokens", type=whole(0, MAX_TOP_K), metavar="N", help="length of an answer, at least"
    )
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument(
        "--stop-token-id", dest="stop_token_ids", action="append", type=whole(0, MAX_TOKEN_ID), metavar="ID",
        help="end at this token; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--ignore-eos", action="store_const", const=True, help="do not end at the model's own end token"
    )


def bias(text: str) -> tuple[int, float]:
    """A kind of argument: ID=NUMBER.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    token, equals, number = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not of the form ID=NUMBER")
    return whole(0, MAX_TOKEN_ID)(token), real(number)


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
    """What was asked for; the rest is left to the server.

    Raises:
        UsageError: log probabilities without --json.
    """
    if not args.json and (args.logprobs is not None or args.prompt_logprobs is not None):
        raise UsageError("log probabilities are shown with --json")
    given = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    if args.logit_bias:
        given["logit_bias"] = dict(args.logit_bias)
    if args.json:
        given["return_token_ids"] = True
    return cast(Options, given)


def text_of(args: argparse.Namespace) -> str:
    """The prompt or message, from standard input as its bytes are.

    Raises:
        UsageError: standard input is not UTF-8.
    """
    return read_standard_input() if args.text == "-" else str(args.text)


def read_standard_input() -> str:
    """All of standard input, as its bytes are.

    Raises:
        UsageError: it is not UTF-8.
    """
    if sys.stdin.isatty():
        print("reading from the terminal; end with Ctrl-D", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None


def show(args: argparse.Namespace, stream: Stream) -> int:
    """Print the answer as it comes, several one after the other, with --json their events, one a line."""
    with stream:
        if args.json:
            _show_events(args, stream)
        elif len(stream.answers) > 1:
            _show_answers(stream)
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


def batch_stats(usage: Usage, timings: BatchTimings, receipt: Receipt) -> str:
    """One line about a request of many inputs that was answered."""
    return (
        f"{usage.prompt_tokens} tokens, computed in {timings.compute.total_seconds() * 1000:.0f} ms after "
        f"{timings.queue.total_seconds() * 1000:.0f} ms, audit record {receipt.audit_sequence}"
    )


def _show_text(stream: Stream) -> None:
    last = "\n"
    for text in stream:
        write_text(text)
        last = text
    if not last.endswith("\n") and sys.stdout.isatty():
        print()


def _show_answers(stream: Stream) -> None:
    """Each answer whole under a line with its number, as soon as it and those before it have ended."""
    waiting = list(stream.answers)
    for _ in stream.deltas():
        while waiting and waiting[0].is_finished:
            _show_answer(waiting.pop(0), len(stream.answers))
    for answer in waiting:
        _show_answer(answer, len(stream.answers))


def _show_answer(answer: Answer, of: int) -> None:
    text = answer.text
    write_text(f"--- answer {answer.index + 1} of {of}, ended by {answer.finished.reason}\n{text}")
    if not text.endswith("\n"):
        write_text("\n")


def _show_events(args: argparse.Namespace, stream: Stream) -> None:
    announced = False
    for delta in stream.deltas():
        if not announced:
            emit_line(args, {"event": "accepted", **asdict(stream.accepted)}, "")
            announced = True
        emit_line(args, {"event": "delta", **_delta(delta)}, "")
    if not announced:
        emit_line(args, {"event": "accepted", **asdict(stream.accepted)}, "")
    for answer in stream.answers:
        emit_line(args, {"event": "finished", "index": answer.index, **asdict(answer.finished)}, "")
    emit_line(args, {"event": "completed", **_completed(stream.completed)}, "")
    receipt = asdict(stream.receipt)
    emit_line(args, {"event": "receipt", **receipt, "leaf_hash": stream.receipt.leaf_hash.hex()}, "")


def _delta(delta: Delta) -> dict[str, object]:
    """What the step brought; log probabilities only where it brought any."""
    return {name: value for name, value in asdict(delta).items() if value or not name.endswith("logprobs")}


def _completed(completed: Completed) -> dict[str, object]:
    timings = {
        name: value.total_seconds() if isinstance(value, timedelta) else value
        for name, value in asdict(completed.timings).items()
    }
    return {"usage": asdict(completed.usage), "timings": timings}
