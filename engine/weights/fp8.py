"""FP8 weights (e4m3) with one scale for a matrix, or for each block of it, as DeepSeek and Qwen publish them.

Of a layer L: `L.weight` F8_E4M3 [out, in], and the scale that it is multiplied by: `L.weight_scale_inv`
[ceil(out / rows), ceil(in / columns)] for blocks, `L.weight_scale` or `L.weight_scale_inv` of one number for a
matrix. `L.input_scale` or `L.activation_scale`, a calibration of the inputs, is not needed: they stay as they are.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; DeepSeek-AI, "DeepSeek-V3 Technical Report",
2024, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.weights.formats import (
    SCALES,
    Shape,
    Stored,
    check_codes,
    check_scales,
    exponents,
    prefix,
)
from engine.weights.settings import Settings, unsupported
from kernels.packed import Layout, Packed

if TYPE_CHECKING:
    from torch import Tensor

_HOW_MADE = ("modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize")
_INPUTS = ("input_scale", "activation_scale")


@dataclass(frozen=True, slots=True)
class Fp8:
    """One matrix.

    Attributes:
        block: rows and columns that share a scale; None: all.
        scale: what the tensor of scales is called.
        exponents: scales are powers of two, stored as their exponents.
    """

    block: tuple[int, int] | None
    scale: str
    exponents: bool = False

    dimensions: ClassVar[int] = 2

    @property
    def label(self) -> str:
        """See `Format`."""
        return "fp8" if self.block is None else f"fp8 {self.block[0]}x{self.block[1]}"

    def stored(self, name: str, shape: Shape) -> Mapping[str, Stored]:
        """See `Format`."""
        tensors = {
            "weight": Stored(("F8_E4M3",), (tuple(shape),)),
            self.scale: Stored(("F8_E8M0", "U8") if self.exponents else SCALES, self._scale_shapes(shape)),
        }
        for inputs in _INPUTS:
            tensors[inputs] = Stored(SCALES, ((), (1,)), optional=True)
        return {f"{prefix(name)}.{key}": value for key, value in tensors.items()}

    def layout(self, shape: Shape) -> Layout:
        """See `Format`."""
        rows, columns = self.block or shape
        return Layout(rows, columns, 8, "float8")

    def read(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> list[Packed]:
        """See `Format`."""
        given = tensors[f"{prefix(name)}.{self.scale}"]
        scales = check_scales(name, exponents(given) if self.exponents else given)
        codes = check_codes(name, tensors[name])
        rows, columns = self.block or shape
        return [Packed(codes, scales.reshape(-(-shape[0] // rows), -(-shape[1] // columns)), rows, columns, 8)]

    def _scale_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        if self.block is None:
            return ((), (1,), (1, 1))
        return (tuple(-(-size // side) for size, side in zip(shape, self.block, strict=True)),)


def parse(settings: Settings) -> tuple[Fp8, ...]:
    """See `engine.weights.quantisation`."""
    settings.one_of("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    settings.one_of("activation_scheme", "dynamic", "static", default="dynamic")
    settings.one_of("expert_dtype", "fp8", default="fp8")
    settings.one_of("scale_fmt", "float", "ue8m0", default="float")  # of inputs, or of weights: the file decides
    settings.empty("kv_cache_scheme", "kv_cache_quant_method")
    block = settings.take("weight_block_size")
    settings.ignore(*_HOW_MADE)
    if block is None:
        return Fp8(None, "weight_scale"), Fp8(None, "weight_scale_inv")
    if not isinstance(block, list) or len(block) != 2 or not all(type(b) is int and 0 < b <= 2**16 for b in block):
        raise unsupported(settings.where, f"weight_block_size = {str(block)[:60]}")
    sides = (block[0], block[1])
    return Fp8(sides, "weight_scale_inv"), Fp8(sides, "weight_scale_inv", exponents=True)
