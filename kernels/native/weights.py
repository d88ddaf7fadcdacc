"""Weights in the layout of the native kernels: packed once from tensors, and handed to the library as structs.

Prepared objects are named tuples of tensors and numbers, as `kernels.ops.Backend.layout_id` asks for.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kernels.native import layout
from kernels.native.layout import Form
from kernels.native.library import ClLinear, ClMatrix, Library
from kernels.native.memory import aligned_empty
from kernels.ops import Matrix
from kernels.packed import Packed
from kernels.packed_cpu import layout_of

_AT_ONCE = 2**22  # numbers that are brought into the form that cl_pack takes at once
_HIGHEST = 2.0**15  # scales are multiplied up to this, float16's last power of two
_OCTAVES = 29  # that float16 has below it with all its bits
_MOST_ZERO = 2.0**15
_SCALES = {layout.FLOAT32: torch.float32, layout.FLOAT16: torch.float16}


class PackedMatrix(NamedTuple):
    """A matrix [out, in] as `cl_pack` made it; what the fields mean, ClMatrix says.

    Attributes:
        form: how it is kept.
        offset: of signed codes.
        factor: of all scales.
        out: outputs.
        inner: inputs.
        weights: uint8, on a huge page.
        scales: [tiles, groups, 16] or None.
        zeros: the same.
        table: float32 [2 ** bits] or None.
        order: int32 [in] or None.
    """

    form: Form
    offset: int
    factor: float
    out: int
    inner: int
    weights: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    table: Tensor | None
    order: Tensor | None

    def struct(self) -> ClMatrix:
        """For the library; its addresses hold as long as these tensors do."""
        form, matrix = self.form, ClMatrix()
        matrix.kind, matrix.group, matrix.decoded, matrix.bits = form.kind, form.group, form.decoded, form.bits
        matrix.offset, matrix.scale_type, matrix.factor = self.offset, form.scale_type, self.factor
        matrix.out = self.out
        setattr(matrix, "in", self.inner)
        for name in ("weights", "scales", "zeros", "table", "order"):
            tensor = getattr(self, name)
            setattr(matrix, name, None if tensor is None else tensor.data_ptr())
        return matrix


class StackedLinear(NamedTuple):
    """Matrices stacked over one input, and a bias of all their outputs."""

    parts: tuple[PackedMatrix, ...]
    bias: Tensor | None  # float32 [sum of out]

    @property
    def out(self) -> int:
        """Numbers that it makes of each token."""
        return sum(part.out for part in self.parts)

    @property
    def inner(self) -> int:
        """Numbers that it takes."""
        return self.parts[0].inner

    def struct(self) -> tuple[ClLinear, ctypes.Array[ClMatrix]]:
        """For the library, and what must be kept while it is used, beside these tensors."""
        parts = (ClMatrix * len(self.parts))(*(part.struct() for part in self.parts))
        bias = None if self.bias is None else self.bias.data_ptr()
        return ClLinear(ctypes.addressof(parts), len(parts), bias), parts


class StackedExperts(NamedTuple):
    """The matrices of all experts of one layer."""

    gate_up: tuple[StackedLinear, ...]  # one for each expert
    down: tuple[StackedLinear, ...]


_Key: TypeAlias = tuple[Form, int, bool]


def prepare_linear(
    library: Library, weights: Sequence[Matrix], biases: Sequence[Tensor], item: int
) -> StackedLinear:
    """Stack matrices; neighbours of one form become one matrix where no tile would hold rows of both.

    Args:
        library: packs them.
        weights: plain or quantised [out_i, in].
        biases: one for each, or none.
        item: bytes of the backend's number type.
    """
    parts = tuple(_pack(library, run, item) for run in _runs(weights, item))
    return StackedLinear(parts, torch.cat([bias.float() for bias in biases]) if biases else None)


def prepare_matrix(library: Library, weight: Matrix, item: int) -> PackedMatrix:
    """One matrix."""
    return _pack(library, [weight], item)


def _runs(weights: Sequence[Matrix], item: int) -> list[list[Matrix]]:
    """Neighbours that can be packed as one."""
    runs: list[list[Matrix]] = []
    for weight in weights:
        if runs and _joins(runs[-1], weight, item):
            runs[-1].append(weight)
        else:
            runs.append([weight])
    return runs


def _joins(run: Sequence[Matrix], following: Matrix, item: int) -> bool:
    """Each matrix with an order or a table has its own; and so where one factor does not do for all scales."""
    form = _form(run[-1], item)
    own = form.has_order or form.has_table
    if own or run[-1].shape[0] % layout.TILE or _key(run[-1], item) != _key(following, item):
        return False
    return form.scale_type == layout.FLOAT32 or _fit_float16([*run, following])


def _key(weight: Matrix, item: int) -> _Key:
    """What two matrices must have in common to be packed as one."""
    return _form(weight, item), _offset(weight), _fit_float16([weight])


def _form(weight: Matrix, item: int) -> Form:
    packed = layout_of(weight) if isinstance(weight, Packed) else None
    form = layout.choose(packed, weight.shape[1], item)
    return form if _fit_float16([weight]) else form._replace(scale_type=layout.FLOAT32)


def _offset(weight: Matrix) -> int:
    """What is added to signed codes, so that they fit an unsigned byte."""
    signed = isinstance(weight, Packed) and weight.codes.dtype == torch.int8
    return 2 ** (weight.bits - 1) if signed else 0


def _fit_float16(weights: Sequence[Matrix]) -> bool:
    """Whether scales, with one factor, and zeros keep all bits but the last ones; where not, they stay float32."""
    packed = [weight for weight in weights if isinstance(weight, Packed)]
    sizes = [weight.scales.float().abs() for weight in packed]
    highest = max((float(size.max()) for size in sizes), default=0.0)
    zeros = [float(weight.zeros.abs().max()) for weight in packed if weight.zeros is not None]
    fit = all(bool(((size == 0) | (size >= highest * 2.0**-_OCTAVES)).all()) for size in sizes)
    return fit and math.isfinite(highest) and all(zero <= _MOST_ZERO for zero in zeros)


def _pack(library: Library, run: Sequence[Matrix], item: int) -> PackedMatrix:
    form, first = _form(run[0], item), run[0]
    out, inner = sum(weight.shape[0] for weight in run), first.shape[1]
    packed = PackedMatrix(form, _offset(first), 1.0, out, inner, torch.empty(0), None, None, None, None)
    if isinstance(first, Packed):
        packed = _with_scales(packed, run)
    matrix = packed.struct()
    weights = aligned_empty(library.packed_bytes(matrix))
    row = 0
    for weight in run:
        codes = weight.codes if isinstance(weight, Packed) else weight
        _pack_rows(library, matrix, codes, row, weights)
        row += weight.shape[0]
    return packed._replace(weights=weights)


def _pack_rows(library: Library, matrix: ClMatrix, codes: Tensor, row: int, weights: Tensor) -> None:
    """Numbers or codes [rows, in] as rows `row` and following of the packed matrix, some at once."""
    at_once = max(1, _AT_ONCE // codes.shape[1] // layout.TILE) * layout.TILE
    for begin in range(0, len(codes), at_once):
        some = _source(codes[begin : begin + at_once], matrix)
        library.pack(matrix, some.data_ptr(), row + begin, len(some), weights.data_ptr())


def _source(codes: Tensor, matrix: ClMatrix) -> Tensor:
    """As cl_pack takes them."""
    if matrix.kind == layout.F32:
        return codes.float().contiguous()
    if matrix.kind == layout.BF16:
        return codes.bfloat16().contiguous()
    unsigned = codes.contiguous().view(torch.uint8)
    return unsigned.add(matrix.offset) if matrix.offset else unsigned  # which wraps: -8 + 8 is 0


def _with_scales(packed: PackedMatrix, run: Sequence[Packed]) -> PackedMatrix:
    scales = torch.cat([_by_row(weight, weight.scales) for weight in run])
    factor = 1.0
    if packed.form.scale_type == layout.FLOAT16 and (highest := float(scales.abs().max())) > 0:
        factor = 2.0 ** (math.floor(math.log2(highest)) + 1) / _HIGHEST
    zeros = None
    if run[0].zeros is not None:
        zeros = torch.cat([_by_row(weight, weight.zeros) for weight in run if weight.zeros is not None])
    kept = _SCALES[packed.form.scale_type]
    order = run[0].order
    return packed._replace(
        factor=factor,
        scales=_in_tiles(scales / factor, kept),
        zeros=None if zeros is None else _in_tiles(zeros, kept),
        table=_table(run[0]),
        order=None if order is None else order.to(torch.int32, copy=True),
    )


def _by_row(weight: Packed, numbers: Tensor) -> Tensor:
    """[out, groups]: each row has its own."""
    rows = weight.shape[0]
    if len(numbers) == rows and weight.rows == 1:
        return numbers.float()
    return numbers.float().repeat_interleave(weight.rows, 0)[:rows]


def _in_tiles(numbers: Tensor, kept: torch.dtype) -> Tensor:
    """[out, groups] -> [tiles, groups, TILE], the last tile filled up with zeros."""
    out, groups = numbers.shape
    tiles = torch.zeros(-(-out // layout.TILE), groups, layout.TILE, dtype=kept)
    whole = out // layout.TILE
    tiles[:whole] = numbers[: whole * layout.TILE].view(whole, layout.TILE, groups).transpose(1, 2)
    if rest := out - whole * layout.TILE:
        tiles[whole, :, :rest] = numbers[whole * layout.TILE :].t()
    return tiles


def _table(weight: Packed) -> Tensor | None:
    """The value of each code; None where it is the code."""
    if weight.codes.dtype == torch.float8_e4m3fn:
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return None if weight.table is None else weight.table.float().clone()
