"""`python -m engine.bench`: a table of tokens per second, and as its last line the same as a JSON object.

    python -m engine.bench --shape llama-3.2-1b --weights int4-g32 --quantised-head
    python -m engine.bench --folder demo/demo-notes-m --dtype float32 --only prefill,b1

    python -m engine.bench --device cuda --shape llama-3.1-8b --weights int4-g128 --only b1,context --batch 256

With --shape the weights are drawn, in the format asked for; with --folder they are the model's own. With --device
cuda the first CUDA device computes, and its own copies and products are the ceilings.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

from engine.bench.measures import Bench, Decode, Measure, Prefill, Workload
from engine.bench.report import Found, as_dict, ceiling, page
from engine.bench.shapes import SHAPES
from engine.bench.subject import CUDA, Load, Subject, engine_options, of_folder, of_shape
from engine.bench.weights import FORMATS
from engine.cores import usable_cores
from engine.errors import EngineError
from engine.options import BACKENDS, CPU, DTYPES, KV_DTYPES
from kernels.bench.ceilings import ReadProbe, products
from kernels.bench.clock import kernel_clock
from kernels.bench.profile import StepProfile
from kernels.native.program import NativeStep

_FAILED = 1
_MEASURES = ("prefill", "b1", "b8", "b32", "b128", "context", "workload")


def main(words: list[str] | None = None) -> int:
    """Measure and print; the exit status."""
    args = _parser().parse_args(words)
    measures = {name: _measure(name, args) for name in args.only}
    try:
        subject = _subject(args, list(measures.values()))
    except EngineError as error:
        print(f"error: {error.code}: {error.message}", file=sys.stderr)
        return _FAILED
    found = (
        _on_device(subject, measures, args.rounds) if args.device == CUDA else _on_host(subject, measures, args)
    )
    print(page(subject, _weights(args), found))
    print(json.dumps(as_dict(subject, _weights(args), found)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.bench", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", default="llama-3.2-1b", choices=sorted(SHAPES), help="a published model's shape")
    what.add_argument("--folder", type=Path, metavar="DIR", help="a model")
    parser.add_argument("--weights", default="bf16", choices=sorted(FORMATS), help="of a shape, as drawn")
    parser.add_argument("--quantised-head", action="store_true", help="of a shape: embeddings and head, too")
    parser.add_argument("--device", default=CPU, choices=(CPU, CUDA))
    parser.add_argument("--backend", choices=BACKENDS, help="default: cpu; of a CUDA device triton")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--kv-dtype", default="", choices=KV_DTYPES, help="of keys and values; default: as dtype")
    parser.add_argument("--threads", type=_number, default=usable_cores(), help="default: all cores")
    parser.add_argument("--only", type=_names, default=_MEASURES, metavar="NAME,...", help=", ".join(_MEASURES))
    parser.add_argument("--rounds", type=_number, default=3, help="the median of which is told (default 3)")
    parser.add_argument("--prompt", type=_number, default=512, help="tokens of prefill (default 512)")
    parser.add_argument("--steps", type=_number, default=32, help="of decoding that are timed (default 32)")
    parser.add_argument("--context", type=_number, default=4096, help="tokens before them (default 4096)")
    parser.add_argument("--batch", type=_number, default=1, help="requests of context at once (default 1)")
    parser.add_argument("--requests", type=_number, default=256, help="of the workload (default 256)")
    parser.add_argument("--profile", action="store_true", help="where steps spend their time, op by op (native)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the workload's lengths (default 1)")
    return parser


def _number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 2**20:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 1 to {2**20}")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in _MEASURES]:
        raise argparse.ArgumentTypeError(f"{unknown[0][:40]!r} is not one of {', '.join(_MEASURES)}")
    return names


def _measure(name: str, args: argparse.Namespace) -> Measure:
    if name == "prefill":
        return Prefill(args.prompt)
    if name == "context":
        return Decode(args.batch, args.steps, args.context)
    if name == "workload":  # a CUDA device answers all at once, as the engines do that are compared by it
        return Workload(args.requests, args.scale, *((args.requests,) if args.device == CUDA else ()))
    return Decode(int(name.removeprefix("b")), args.steps)


def _subject(args: argparse.Namespace, measures: list[Measure]) -> Subject:
    """The engine, with room for all that is measured."""
    loads = [measure.load for measure in measures]
    most = Load(*(max(sizes) for sizes in zip(*((x.batch, x.context, x.tokens) for x in loads), strict=True)))
    options = engine_options(most, args.backend, args.dtype, args.threads, args.kv_dtype, args.device)
    if args.folder:
        return of_folder(args.folder, options)
    return of_shape(args.shape, args.weights, options, quantised_head=args.quantised_head)


def _weights(args: argparse.Namespace) -> str:
    """How the weights are stored, in words."""
    if args.folder:
        return "as in its files"
    return f"{args.weights}, head and embeddings {args.weights if args.quantised_head else 'bf16'}"


def _profile(subject: Subject) -> StepProfile | None:
    step = subject.step
    return StepProfile(step) if isinstance(step, NativeStep) else None


def _on_host(subject: Subject, measures: dict[str, Measure], args: argparse.Namespace) -> list[Found]:
    """Beside memory read by this processor, and the products of its libraries."""
    profile, probe = _profile(subject) if args.profile else None, ReadProbe()
    operations = products().of(subject.options.dtype, quantised=subject.quantised)
    bench = Bench(subject.loop, subject.vocabulary, kernel_clock(subject.backend))
    return _found(subject, measures, args.rounds, bench, (probe.rate, operations), profile)


def _on_device(subject: Subject, measures: dict[str, Measure], rounds: int) -> list[Found]:
    """Beside the device's copies and its library's products, in which inputs are never of eight bits or fewer."""
    from kernels.bench import device

    operations = device.products_per_second(subject.options.dtype)
    bench = Bench(subject.loop, subject.vocabulary)
    return _found(subject, measures, rounds, bench, (device.copied_per_second, operations), None)


def _found(
    subject: Subject,
    measures: dict[str, Measure],
    rounds: int,
    bench: Bench,
    ceilings: tuple[Callable[[], float], float],
    profile: StepProfile | None,
) -> list[Found]:
    """Round after round of each measure, memory probed before each; a first one warms up and is not counted."""
    (probe, operations), found = ceilings, []
    for name, measure in measures.items():
        if not isinstance(measure, Workload):
            measure.run(bench)
        each = [(probe(), measure.run(bench)) for _ in range(rounds)]
        reads = [rate for rate, _ in each]
        most = ceiling(subject, measure, median(reads), operations)
        found.append(Found(name, [timed for _, timed in each], median(reads), most))
        print(f"{name}: {found[-1].middle.rate:,.1f} tokens/s", file=sys.stderr, flush=True)
        if profile:
            print(f"  {_shares(profile.take())}", file=sys.stderr, flush=True)
    return found


def _shares(spent: Mapping[str, float]) -> str:
    """Of all steps of a measure, its prompts among them."""
    total = sum(spent.values())
    return ", ".join(f"{code} {seconds / total:.1%}" for code, seconds in spent.items())


if __name__ == "__main__":
    sys.exit(main())
