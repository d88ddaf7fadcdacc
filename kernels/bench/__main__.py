"""`python -m kernels.bench`: each op's time, bytes and operations per second, and its share of the ceiling.

    python -m kernels.bench --backend torch --only products --kinds int4,bf16
    python -m kernels.bench --device cuda [--family NAME] [--tune]

The ceiling of an op is the longer of reading its weights or pages once, as fast as a probe reads memory in this
run, and computing its products as fast as torch's libraries multiply square matrices. The last line is a JSON
object.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from kernels.bench import cases
from kernels.bench.cases import Case
from kernels.bench.ceilings import Products, ReadProbe, products
from kernels.bench.clock import Clock, kernel_clock
from kernels.cpu import CpuBackend
from kernels.ops import Backend
from kernels.reference import ReferenceBackend

_KINDS = ("int4", "int8", "bf16", "f32")
_GROUPS = ("products", "attention", "small", "sampling")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_LEAST_SECONDS, _LEAST_ROUNDS = 0.1, 3


def main(words: list[str] | None = None) -> int:
    """Measure and print; the exit status."""
    parser = _parser()
    args = parser.parse_args(words)
    if args.device == "cuda":
        return _on_device(args)
    if args.tune:
        parser.error("--tune is of --device cuda")
    torch.set_num_threads(args.threads)
    backend = _BACKENDS[args.backend](_DTYPES[args.dtype])
    clock = kernel_clock(backend)
    probe, most = ReadProbe(), products()
    memory = probe.rate()
    print(
        f"{args.backend}, {args.dtype}, {args.threads} threads; memory {memory / 1e9:.1f} GB/s; products int8 "
        f"{most.int8 / 1e12:.2f}, bfloat16 {most.bfloat16 / 1e12:.2f}, float32 {most.float32 / 1e12:.2f} TOP/s"
    )
    print(f"{'':<36} {'us':>10} {'GB/s':>8} {'TOP/s':>8} {'memory':>8} {'ceiling':>8}")
    rows = []
    for case in _cases(backend, args):
        rows.append(_row(case, _seconds(case, clock), probe.rate(), most))
        print(_line(rows[-1]), flush=True)
    print(json.dumps({"backend": args.backend, "dtype": args.dtype, "threads": args.threads, "ops": rows}))
    return 0


def _on_device(args: argparse.Namespace) -> int:
    """Of a CUDA device, which alone needs Triton; 1 where there is none."""
    from kernels.bench import cuda, tune
    from kernels.bench.device import NoDeviceError

    try:
        return tune.tune(args.family) if args.tune else cuda.run(args.family)
    except NoDeviceError as error:
        print(f"error: {error.code}: {error}", file=sys.stderr)
        return 1


def _native(dtype: torch.dtype) -> Any:
    from kernels.native.backend import NativeBackend

    return NativeBackend(dtype)


_BACKENDS: dict[str, Callable[[torch.dtype], Any]] = {
    "native": _native,
    "torch": CpuBackend,
    "reference": ReferenceBackend,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="native", choices=sorted(_BACKENDS))
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(_DTYPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", type=_among(_GROUPS), default=_GROUPS, metavar="GROUP,...")
    parser.add_argument("--kinds", type=_among(_KINDS), default=_KINDS, metavar="KIND,...")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--family", default="", metavar="NAME", help="with cuda: families whose name holds this")
    parser.add_argument("--tune", action="store_true", help="with cuda: try configurations, and write their table")
    return parser


def _among(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} names others than {', '.join(known)}")
        return found

    return names


def _cases(backend: Backend, args: argparse.Namespace) -> Iterator[Case]:
    dtype = _DTYPES[args.dtype]
    if "products" in args.only:
        yield from cases.products(backend, dtype, args.kinds)
    if "attention" in args.only:
        yield from cases.attention(backend, dtype.itemsize)
    if "small" in args.only:
        yield from cases.small(backend)
    if "sampling" in args.only:
        yield from cases.sampling(backend)


def _seconds(case: Case, clock: Clock) -> float:
    """Of one call, the median of some rounds; what no kernel of a library did is timed from outside."""
    each: list[float] = []
    case.work()
    while len(each) < _LEAST_ROUNDS or sum(each) < _LEAST_SECONDS:
        inside, began = clock(), time.perf_counter_ns()
        case.work()
        passed = time.perf_counter_ns() - began
        each.append(((clock() - inside) or passed) / 1e9)
    return median(each) / case.calls


def _row(case: Case, seconds: float, memory: float, most: Products) -> dict[str, Any]:
    reading = case.read / memory
    computing = case.operations / getattr(most, case.arithmetic) if case.arithmetic else 0.0
    return {
        "name": case.name,
        "seconds": seconds,
        "bytes_per_second": case.read / seconds,
        "operations_per_second": case.operations / seconds,
        "memory": memory,
        "ceiling": max(reading, computing) / seconds,
    }


def _line(row: dict[str, Any]) -> str:
    operations = row["operations_per_second"]
    return (
        f"{row['name']:<36} {row['seconds'] * 1e6:>10,.1f} {row['bytes_per_second'] / 1e9:>8.1f} "
        f"{operations / 1e12:>8.2f} {row['memory'] / 1e9:>8.1f} {row['ceiling']:>8.0%}"
    )


if __name__ == "__main__":
    sys.exit(main())
