"""Drawn weights in the stored format asked for, each made when it is handed over: as fast as the real ones.

Codes and scales are drawn as they are, for nobody judges the answers: quantising so many numbers takes minutes.
Plain numbers repeat after 16 million of them, codes after 64, which is beyond what any cache holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.models.tensors import Shapes
from kernels.ops import Matrix
from kernels.packed import Packed

_NUMBERS, _CODES = 2**24, 2**26
_DEVIATION = 0.02  # of a weight, as models are initialised
_INT4, _INT8 = 4.6, 73.3  # standard deviation of codes that are all as likely
_SCALE = 2  # bytes of a scale, in the leanest form


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored format.

    Attributes:
        bits: of a number or code; 16: plain bfloat16.
        group: columns that share a scale; 0: all of a row.
    """

    bits: int
    group: int = 0

    def bytes_of(self, shape: Sequence[int]) -> int:
        """Least bytes of a tensor: its codes, and of two bytes the scales."""
        numbers = prod(shape)
        if self.bits == 16 or len(shape) < 2:
            return 2 * numbers
        return numbers * self.bits // 8 + _SCALE * (numbers // (self.group or shape[-1]))


FORMATS = {
    "bf16": Stored(16),
    "int8": Stored(8),
    "int4-g32": Stored(4, 32),
    "int4-g128": Stored(4, 128),
}
"""Stored formats by name."""


def read_format(name: str) -> Stored:
    """The stored format `name`.

    Raises:
        EngineError: FORMAT_UNKNOWN.
    """
    if name not in FORMATS:
        raise EngineError("FORMAT_UNKNOWN", f"{name[:100]!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True)
class DrawnWeights:
    """`engine.models.tensors.Weights` that nobody trained.

    Attributes:
        shapes: of the tensors.
        quantised: names of those that are stored in `stored`; the others are plain.
        stored: the format.
        seed: of the draw.
    """

    shapes: Shapes
    quantised: frozenset[str]
    stored: Stored
    seed: int = 0
    _drawn: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all tensors in their stored formats, scales in two bytes."""
        return sum(self.format_of(name).bytes_of(shape) for name, shape in self.shapes.items())

    def format_of(self, name: str) -> Stored:
        """How a tensor is stored."""
        return self.stored if name in self.quantised else FORMATS["bf16"]

    def pop(self, name: str, /) -> Matrix:
        """See `Weights`; a table that is quantised is handed over packed."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape) if name.endswith("norm.weight") else self._numbers(shape)
        form = self.format_of(name)
        return self._numbers(shape) if form.bits == 16 else self._packed((shape[0], shape[1]), form)

    def matrix(self, prefix: str, /) -> Matrix:
        """See `Weights`."""
        return self.pop(f"{prefix}.weight")

    def experts(self, name: str, /) -> Sequence[Matrix]:
        """See `Weights`; stacked experts are drawn plain."""
        return list(self._numbers(self.shapes[name]))

    def _numbers(self, shape: Sequence[int]) -> Tensor:
        """Plain weights, bfloat16."""
        if "numbers" not in self._drawn:
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randn(_NUMBERS, generator=generator) * _DEVIATION
            self._drawn["numbers"] = drawn.bfloat16()
        return _repeated(self._drawn["numbers"], shape)

    def _packed(self, shape: tuple[int, int], form: Stored) -> Packed:
        out, inner = shape
        name, half = f"int{form.bits}", 1 << (form.bits - 1)
        if name not in self._drawn:
            generator = torch.Generator().manual_seed(self.seed)
            self._drawn[name] = torch.randint(1 - half, half, (_CODES,), dtype=torch.int8, generator=generator)
        columns = form.group or inner
        scales = torch.full((out, -(-inner // columns)), _DEVIATION / (_INT4 if form.bits == 4 else _INT8))
        return Packed(_repeated(self._drawn[name], shape), scales, 1, columns, form.bits)


def _repeated(drawn: Tensor, shape: Sequence[int]) -> Tensor:
    count = prod(shape)
    if count <= len(drawn):
        return drawn[:count].view(*shape).clone()
    return drawn.repeat(-(-count // len(drawn)))[:count].view(*shape)
