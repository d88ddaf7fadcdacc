"""A CUDA device's clock, and what no kernel can beat there: memory copied, and large products of its libraries.

Time is that of a CUDA graph, so that Python's part is nothing, over so much memory that no cache holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from kernels.bench.starts import elsewhere, nbytes, start
from kernels.triton.configs import select
from kernels.triton.launch import Launch

_BEYOND_CACHES = 300 * 2**20
_MOST_COPIES = 64
_AT_LEAST = 0.003  # seconds of one replay
_ROUNDS = 7
_COPIED = 2**31
_SIDE = 8192


class NoDeviceError(RuntimeError):
    """There is no CUDA device here."""

    code = "NO_CUDA_DEVICE"

    def __init__(self) -> None:
        super().__init__("there is no CUDA device here; run this on a machine that has one")


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device gives at most, as measured in this run.

    Attributes:
        memory: bytes a second, reading and writing of a copy counted both.
        bfloat16: operations a second, a multiplication and an addition being two.
        int8: likewise.
        float8: likewise; 0 where the device has none.
        float32: likewise, in whole float32.
    """

    memory: float
    bfloat16: float
    int8: float
    float8: float
    float32: float

    def seconds(self, nbytes: int, flops: int, arithmetic: str) -> float:
        """The least time of a kernel that reads and writes so much, and computes so much."""
        rate = getattr(self, arithmetic) if arithmetic else 0.0
        return max(nbytes / self.memory, flops / rate if rate else 0.0)


def take_device() -> str:
    """Choose the first device and its table of configurations; its name.

    Raises:
        NoDeviceError: there is none.
    """
    if not torch.cuda.is_available():
        raise NoDeviceError
    name = torch.cuda.get_device_name(0)
    major, minor = torch.cuda.get_device_capability(0)
    select(name, 10 * major + minor)
    return name


def graph_seconds(launches: list[Launch]) -> float:
    """Of these starts, the median of some replays of a graph of them, over memory that no cache holds."""
    if not launches:
        return 0.0
    count = min(_MOST_COPIES, math.ceil(_BEYOND_CACHES / max(1, nbytes(launches))))
    copies = [launches, *(elsewhere(launches) for _ in range(count - 1))]
    start(launches)  # compiles, and tells how often a graph must repeat them to be measured well
    once = _event_seconds(lambda: start(launches))
    repeats = max(1, math.ceil(_AT_LEAST / max(once, 1e-6) / count))
    graph = _recorded(lambda: start([one for copy in copies for one in copy] * repeats))
    return median(_event_seconds(graph.replay) for _ in range(_ROUNDS)) / (count * repeats)


def work_seconds(work: Callable[[], object]) -> float:
    """The least of some replays of a graph of `work` alone."""
    work()
    graph = _recorded(work)
    graph.replay()
    return min(_event_seconds(graph.replay) for _ in range(_ROUNDS))


def _recorded(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _event_seconds(work: Callable[[], object]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
    torch.cuda.synchronize()
    began.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def ceilings() -> Ceilings:
    """Measure them: seconds."""
    copied = _copy_seconds()
    wide = torch.randn(_SIDE, _SIDE, device="cuda")
    numbers = wide.bfloat16()
    codes = (wide * 30).clamp(-127, 127).to(torch.int8)
    small = wide.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    return Ceilings(
        2 * _COPIED / copied,
        _rate(lambda: numbers @ numbers.t()),
        _rate(lambda: torch._int_mm(codes, codes.t())),
        _rate(lambda: torch._scaled_mm(small, small.t(), one, one, out_dtype=torch.bfloat16)),
        _rate(lambda: wide @ wide.t()),
    )


def copied_per_second() -> float:
    """Bytes that a large copy reads and writes in a second."""
    return 2 * _COPIED / _copy_seconds()


def products_per_second(dtype: str) -> float:
    """Operations of large square products of bfloat16 or float32 numbers, a second."""
    numbers = torch.randn(_SIDE, _SIDE, device="cuda").to(getattr(torch, dtype))
    return _rate(lambda: numbers @ numbers.t())


def _copy_seconds() -> float:
    source = torch.ones(_COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return work_seconds(lambda: target.copy_(source))


def _rate(product: Callable[[], Tensor]) -> float:
    try:
        return 2 * _SIDE**3 / work_seconds(product)
    except RuntimeError:  # the device or its library has no such product
        return 0.0
