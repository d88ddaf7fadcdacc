"""MXFP4: the experts of gpt-oss, four-bit floating point with a power of two for every 32 numbers.

In place of a stack NAME [experts, in, out]: `NAME_blocks` U8 [experts, out, in / 32, 16], two numbers in a byte,
the lower half first; `NAME_scales` U8 [experts, out, in / 32], the exponent plus 127.

Source: Open Compute Project, "Microscaling Formats (MX) Specification" 1.0, sections 5.2 to 5.4; OpenAI, gpt-oss
model card, 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.weights.bits import unpack
from engine.weights.formats import Shape, Stored, check_scales, exponents
from engine.weights.settings import Settings
from kernels.packed import Layout, Packed

if TYPE_CHECKING:
    from torch import Tensor

_GROUP = 32
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_POSITIVE, *(-value for value in _POSITIVE))
"""What each of 16 codes stands for: sign, two bits of exponent, one of mantissa."""


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """The matrices of one kind of all experts of a layer."""

    dimensions: ClassVar[int] = 3

    @property
    def label(self) -> str:
        """See `Format`."""
        return "mxfp4"

    def stored(self, name: str, shape: Shape) -> Mapping[str, Stored]:
        """See `Format`."""
        experts, inner, out = shape
        blocks = (experts, out, inner // _GROUP)
        return {
            f"{name}_blocks": Stored(("U8",), ((*blocks, _GROUP // 2),) if inner % _GROUP == 0 else ()),
            f"{name}_scales": Stored(("U8", "F8_E8M0"), (blocks,)),
        }

    def layout(self, shape: Shape) -> Layout:
        """See `Format`."""
        return Layout(1, _GROUP, 4, "table")

    def read(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> list[Packed]:
        """See `Format`; the matrices are [out, in]."""
        blocks = tensors[f"{name}_blocks"]
        scales = check_scales(name, exponents(tensors[f"{name}_scales"]))
        table = scales.new_tensor(VALUES)
        return [
            Packed(unpack(codes.flatten(1), 4), scale, 1, _GROUP, 4, table=table)
            for codes, scale in zip(blocks, scales, strict=True)
        ]


def parse(settings: Settings) -> tuple[Mxfp4]:
    """See `engine.weights.quantisation`."""
    settings.ignore("modules_to_not_convert", "dequantize")
    return (Mxfp4(),)
