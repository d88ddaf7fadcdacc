"""How a family of kernels shows that it is right and how fast it is: cases, each with an answer in float64.

A family's file has `cases(draw, scale)`. Of scale PROOF they are small and have every edge: sizes that fill no
block, one row, none, all flags; of scale MODEL they have the sizes of published models, for compiling and
measuring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PROOF, MODEL = "proof", "model"


class Expected(NamedTuple):
    """What an output should be.

    Attributes:
        exact: float64 numbers, or integers that must be met exactly.
        rounded: float64 of what the exact numbers become in the output's format; the distance between the two is
            the floor that no kernel can get under.
    """

    exact: Tensor
    rounded: Tensor | None


class Case(NamedTuple):
    """One call of one launcher.

    Attributes:
        name: for people: the kernel, sizes, formats.
        run: starts the kernels; their outputs, codes already multiplied by their scales.
        expected: of each output.
        nbytes: that must be read and written at least.
        flops: products and sums that must be computed.
        arithmetic: of these: bfloat16, float8, int8 or float32.
    """

    name: str
    run: Callable[[], tuple[Tensor, ...]]
    expected: Callable[[], tuple[Expected, ...]]
    nbytes: int
    flops: int = 0
    arithmetic: str = ""


def expect(exact: Tensor, dtype: torch.dtype) -> Expected:
    """Exact numbers that are written as `dtype`.

    Of float32 sixteen bits are asked for: sums of many terms do not keep all of its 24.
    """
    exact = exact.double()
    if dtype is torch.float32:
        mantissa, exponent = torch.frexp(exact)
        return Expected(exact, torch.ldexp(torch.round(mantissa * 2**16) / 2**16, exponent))
    return Expected(exact, exact.to(dtype).double())


@dataclass(frozen=True, slots=True)
class Draw:
    """Random tensors for cases: the same in every run; on "meta" they have sizes alone.

    Attributes:
        device: "cpu", "cuda" or "meta".
        seed: of all.
    """

    device: str
    seed: int = 0

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        """Normal numbers times `scale`."""
        return self._place(lambda made: torch.randn(shape, generator=made) * scale, shape, dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        """Integers from low to high - 1."""
        return self._place(lambda made: torch.randint(low, high, shape, generator=made), shape, dtype)

    def uniform(self, low: float, high: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers between low and high."""
        return self._place(lambda made: torch.rand(shape, generator=made) * (high - low) + low, shape, dtype)

    def given(self, values: Tensor) -> Tensor:
        """Just these."""
        return values.to(self.device)

    def _place(
        self, make: Callable[[torch.Generator], Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return make(torch.Generator().manual_seed(self.seed + sum(shape))).to(dtype).to(self.device)
