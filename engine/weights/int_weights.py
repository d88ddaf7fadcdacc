"""Our own quantised weights, which `engine-prepare` writes: int8 and int4 with scales for each row or group.

Of a layer L: `L.codes`, int8 [out, in] as I8, or two int4 in a byte, U8 [out, ceil(in / 2)], the lower half first;
`L.scales` [out, groups]; and unless it is symmetric `L.zeros` [out, groups], which need not be whole numbers.

    w[n, k] = (codes[n, k] - zeros[n, k // group]) · scales[n, k // group]

Codes of int8 are signed. Those of int4 are 0 to 15, and the zero of a symmetric matrix is 8. config.json has
"quantization_config": {"quant_method": "cloister", "bits": 4, "group_size": 128, "symmetric": false}; a group_size
of 0 is the whole row. Embeddings and the matrix of the logits are plain, or as a field "embeddings" in it says,
which has the same three fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.weights.bits import unpack
from engine.weights.formats import (
    SCALES,
    Shape,
    Stored,
    check_scales,
    group_label,
    groups,
    invalid,
    prefix,
)
from engine.weights.settings import Settings
from kernels.packed import Layout, Packed

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = (0, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class IntWeights:
    """One matrix.

    Attributes:
        bits: 8 or 4.
        group: numbers of a row that share a scale; 0: all.
        symmetric: it has no zeros.
    """

    bits: int
    group: int
    symmetric: bool

    dimensions: ClassVar[int] = 2

    @property
    def label(self) -> str:
        """See `Format`."""
        return f"int{self.bits}{group_label(self.group)}"

    def stored(self, name: str, shape: Shape) -> Mapping[str, Stored]:
        """See `Format`."""
        out, inner = shape
        scales = (out, groups(inner, self.group))
        codes = Stored(("I8",), ((out, inner),)) if self.bits == 8 else Stored(("U8",), ((out, -(-inner // 2)),))
        tensors = {"codes": codes, "scales": Stored(SCALES, (scales,))}
        if not self.symmetric:
            tensors["zeros"] = Stored(SCALES, (scales,))
        return {f"{prefix(name)}.{key}": value for key, value in tensors.items()}

    def layout(self, shape: Shape) -> Layout:
        """See `Format`."""
        return Layout(1, self.group or shape[1], self.bits, zeros=not self.symmetric)

    def read(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> list[Packed]:
        """See `Format`."""
        codes, scales = (tensors[f"{prefix(name)}.{key}"] for key in ("codes", "scales"))
        zeros = None if self.symmetric else check_scales(name, tensors[f"{prefix(name)}.zeros"])
        if self.bits == 4:
            codes = unpack(codes, 4)
            if bool(codes[:, shape[1] :].any()):
                raise invalid(name, "has a code beyond its last column")
            codes = codes[:, : shape[1]]
            codes = codes.char() - 8 if self.symmetric else codes
        columns = self.group or shape[1]
        return [Packed(codes.contiguous(), check_scales(name, scales), 1, columns, self.bits, zeros)]


def parse(settings: Settings) -> tuple[IntWeights]:
    """See `engine.weights.quantisation`."""
    return (_parse(settings),)


def parse_tables(settings: Settings) -> tuple[IntWeights, ...]:
    """What embeddings and the matrix of the logits may be; nothing where that is not said."""
    raw = settings.take("embeddings")
    if raw is None:
        return ()
    stated = Settings(raw, f"{settings.where}.embeddings")
    found = _parse(stated)
    stated.finish()
    return (found,)


def _parse(settings: Settings) -> IntWeights:
    bits = settings.one_of("bits", 8, 4)
    group = settings.one_of("group_size", *GROUPS)
    return IntWeights(bits, group, settings.flag("symmetric"))
