"""What no kernel can beat here: memory read from end to end, and the largest products that others' kernels reach.

A machine that is shared drifts within minutes, so these are measured in every run, beside what is held to them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom
from torch import Tensor

from kernels.native.memory import aligned_empty

_READ_BYTES = 2**30
_SIDE = 2048
_ROUNDS = 3


class ReadProbe:
    """A gigabyte to read; kept, so that the probe can be taken again and again beside what is measured."""

    def __init__(self, nbytes: int = _READ_BYTES) -> None:
        self._buffer = aligned_empty(nbytes).view(torch.float32)
        self._buffer.fill_(1.0)

    def rate(self) -> float:
        """Bytes per second with torch's number of threads: the best of three."""
        return self._buffer.nbytes / best_seconds(self._buffer.sum)


@dataclass(frozen=True, slots=True)
class Products:
    """Operations per second, a multiplication and an addition being two, of square products."""

    int8: float
    bfloat16: float
    float32: float

    def of(self, dtype: str, *, quantised: bool) -> float:
        """The ceiling of a matrix: quantised ones are multiplied with inputs of eight bits, unless in float32."""
        if dtype == "float32":
            return self.float32
        return self.int8 if quantised else self.bfloat16


def products(side: int = _SIDE) -> Products:
    """What torch's libraries reach with torch's number of threads."""
    plain = torch.randn(side, side)
    wide = plain.bfloat16()
    codes = torch.randint(-127, 128, (side, side), dtype=torch.int8)
    return Products(
        int8=_operations(lambda: torch._int_mm(codes, codes), side),
        bfloat16=_operations(lambda: F.linear(wide, wide), side),
        float32=_operations(lambda: F.linear(plain, plain), side),
    )


def best_seconds(work: Callable[[], Tensor], rounds: int = _ROUNDS) -> float:
    """Least of some rounds: what disturbs only makes longer. One round before is not counted."""
    work()
    least = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - began)
    return least


def _operations(work: Callable[[], Tensor], side: int) -> float:
    return 2 * side**3 / best_seconds(work)
