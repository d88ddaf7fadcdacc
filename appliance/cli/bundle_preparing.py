"""The options of `cloister bundle build` that say what a model is made into before it is bundled."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli.arguments import whole
from appliance.cli.failure import UsageError

if TYPE_CHECKING:
    from bundles.builder import Preparation, Quantisation

_BITS = {"int8": 8, "int4": 4}
_GROUPS = (32, 64, 128)
_DEFAULT_GROUP = 128


def add_options(build: argparse.ArgumentParser) -> None:
    """Add them."""
    smaller = build.add_argument_group("quantising (the bundle is then the site's to sign: --site-publisher)")
    smaller.add_argument(
        "--quantize",
        choices=(*_BITS,),
        help="int8: rounded row by row; int4: rounded with error feedback, which needs --calibration",
    )
    smaller.add_argument(
        "--group",
        type=int,
        choices=_GROUPS,
        help=f"numbers of a row that share a scale, of int4 (default {_DEFAULT_GROUP})",
    )
    smaller.add_argument(
        "--quantize-embeddings",
        choices=(*_BITS, "keep"),
        nargs="?",
        const="int8",
        metavar="{int8,int4,keep}",
        help="embeddings and the matrix of the logits, too (int8 if none is said); keep: as a GGUF file has them",
    )
    smaller.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE.jsonl",
        help='texts such as the model is used for, a line each: {"text": ..} or {"messages": [..]}',
    )
    smaller.add_argument(
        "--calibration-tokens",
        type=whole(256, 2**24),
        default=32768,
        metavar="N",
        help="most of them that are used; memory grows with it (default %(default)s)",
    )
    smaller.add_argument(
        "--threads",
        type=whole(1, 1024),
        metavar="N",
        help="to quantise with; the same number gives the same bytes (default: all cores)",
    )


def read_quantisation(args: argparse.Namespace) -> "Quantisation | None":
    """How to quantise, as the options say; None where they say nothing of it.

    Raises:
        UsageError: options that lack another one, or the file they name.
    """
    from bundles.builder import Quantisation

    if args.quantize is None:
        if args.calibration or args.group or args.quantize_embeddings in _BITS:
            raise UsageError("--calibration, --group and --quantize-embeddings int8 or int4 need --quantize")
        return None
    if keeps_embeddings(args):
        raise UsageError("--quantize-embeddings keep is of GGUF files that are not quantised anew")
    bits = _BITS[args.quantize]
    if bits == 8 and args.group:
        raise UsageError("--group is of int4; int8 has a scale for each row")
    if bits == 4 and args.calibration is None:
        raise UsageError("--quantize int4 needs --calibration FILE.jsonl, texts such as the model is used for")
    if args.calibration is not None and not args.calibration.is_file():  # before hours of hashing
        raise UsageError(f"--calibration {args.calibration} is no file")
    return Quantisation(
        bits=bits,
        group=0 if bits == 8 else args.group or _DEFAULT_GROUP,
        calibration=args.calibration,
        tokens=args.calibration_tokens,
        threads=args.threads or len(os.sched_getaffinity(0)),
        embeddings=_BITS.get(args.quantize_embeddings, 0),
    )


def keeps_embeddings(args: argparse.Namespace) -> bool:
    """Whether the embeddings of a GGUF file stay quantised as they are there.

    Raises:
        UsageError: it is none.
    """
    kept: bool = args.quantize_embeddings == "keep"
    if kept and args.model.suffix.lower() != ".gguf":
        raise UsageError(
            "--quantize-embeddings keep is of GGUF files; int8 and int4 of any that is quantised here"
        )
    return kept


def check_signing(args: argparse.Namespace, quantisation: "Quantisation | None") -> None:
    """Refuse to sign as its publisher what is not the publisher's own any more.

    Raises:
        UsageError: a publisher's key or signature for a model that is converted here.
    """
    converted = quantisation is not None or args.model.suffix.lower() == ".gguf"
    if converted and (args.publisher_key or args.model_sig):
        raise UsageError("what is converted or quantised here is the site's to sign: --site-publisher KEY")


@contextmanager
def tidily() -> Iterator[None]:
    """While it builds, a request to end removes what was begun, as an interrupt does; the exit status names it."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only there are signals heard
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def summary(preparation: "Preparation | None") -> str:
    """What was done and what it cost, in lines for people."""
    lines = []
    for step in preparation.steps if preparation else ():
        match step:
            case {"from": "gguf", "types": list(types)}:
                kept = step.get("kept_embeddings")
                lines.append(
                    f"converted from GGUF ({', '.join(map(str, types))})"
                    + (f", embeddings kept in {kept}" if kept else "")
                )
            case {"bits": int(bits), "group": int(group), "matrices": list(matrices)}:
                errors, rounded = ([each[key] for each in matrices] for key in ("error", "rounded"))
                worst, worst_rounded = max(errors, default=0.0), max(rounded, default=0.0)
                scale = f", a scale for {group} numbers" if group else ", a scale for each row"
                lines.append(f"quantised to int{bits}{scale}: {len(matrices)} matrices{_embeddings(step)}")
                fed_back = f"; plainly rounded {_mean(rounded):.2%} and {worst_rounded:.2%}"
                lines.append(
                    f"  error of their outputs {_mean(errors):.2%} on average, {worst:.2%} at most"
                    + (fed_back if rounded != errors else "")
                )
                lines += _perplexity(step.get("calibration"))
    return "\n".join(lines)


def _embeddings(step: Mapping[str, object]) -> str:
    """What became of embeddings and the matrix of the logits, where they were quantised."""
    match step:
        case {"embeddings": int(bits), "tables": list(tables)} if tables:
            return f"; embeddings to int{bits}, error {_mean([each['error'] for each in tables]):.2%}"
    return ""


def _perplexity(calibration: object) -> list[str]:
    match calibration:
        case {"perplexity_before": float(before), "perplexity_after": float(after), "held_out_texts": int(texts)}:
            return [f"  perplexity on {texts} texts that were held out: {before:.4f} before, {after:.4f} after"]
    return []


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
