"""Products with quantised matrices on the CPU: in torch's kernels where they fit, else made plain block by block.

What `kernels.packed.cpu_kernel` says is kept is kept in the form of torch._weight_int8pack_mm or of
torch._weight_int4pack_mm_for_cpu, which take bfloat16 and whose answers are as far from the exact product as those
of a plain bfloat16 matrix. Where the processor multiplies bytes (VNNI), int8 is kept as oneDNN has it, and inputs
are rounded to bytes as well, each row by itself: the sums are of whole numbers, so a row's bits never depend on
what is beside it. Of other matrices the codes are kept, in as few bits as they have, and each product makes a
block of rows plain in the backend's number type, multiplies, and forgets it: its answers are those of the plain
matrix, and no more than one block is ever there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom
from torch import Tensor

from kernels.packed import Layout, Packed, cpu_block_rows, cpu_kernel, scale

_LEAST = 1e-30  # the largest number of a row of inputs counts as this at least, and zeros stay zeros
_VNNI_ROWS = 64  # oneDNN lays int8 out in blocks of so many rows
_INT4_BLOCK = 64  # rows that torch's int4 layout has side by side, at most


class _Int8(NamedTuple):
    codes: Tensor  # int8 [out, in]
    scales: Tensor  # bfloat16 [out]
    order: Tensor | None  # int64 [in]


class _Int8Vnni(NamedTuple):
    codes: Tensor  # int8 [out, in], as oneDNN lays them out
    scales: Tensor  # bfloat16 [out]
    order: Tensor | None  # int64 [in]


class _Int4(NamedTuple):
    codes: Tensor  # uint8 [out, in / 2], as torch packs them
    scales_and_zeros: Tensor  # bfloat16 [groups, out, 2]: scale, and what code 8 stands for
    group: int
    order: Tensor | None  # int64 [in]


class _Codes(NamedTuple):
    codes: Tensor  # [out, in]; of four bits [out, ceil(in / 2)], in each byte column i and column ceil(in / 2) + i
    scales: Tensor  # as `Packed` has them, and so the rest
    zeros: Tensor | None
    table: tuple[float, ...] | None
    order: Tensor | None
    group: tuple[int, int]
    shape: tuple[int, int]
    halves: bool
    signed: bool


_Part: TypeAlias = Tensor | _Int8 | _Int8Vnni | _Int4 | _Codes


PackedTable: TypeAlias = _Codes
"""A quantised embedding table, whose rows can be read."""


class PackedLinear(NamedTuple):
    """Matrices stacked over one input, some of them quantised, and their biases."""

    parts: tuple[_Part, ...]
    bias: Tensor | None  # [out]


def prepare(matrices: Sequence[Tensor | Packed], biases: Sequence[Tensor], dtype: torch.dtype) -> PackedLinear:
    """Matrices [out_i, in] over one input, in the layouts that `linear` reads; nothing of them is shared.

    Args:
        matrices: plain or quantised.
        biases: one for each, or none.
        dtype: that the backend computes in.
    """
    parts = tuple(_prepare(m, dtype) if isinstance(m, Packed) else m.to(dtype, copy=True) for m in matrices)
    return PackedLinear(parts, torch.cat([bias.to(dtype) for bias in biases]) if biases else None)


def linear(x: Tensor, weight: PackedLinear, tile: int = 0) -> Tensor:
    """x · weightᵀ + bias.

    Args:
        x: [T, in], in the dtype that `weight` was prepared for.
        weight: of `prepare`.
        tile: rows of x that are multiplied at once, of which T is a multiple; 0: all.

    Returns:
        [T, out].
    """
    tiles = list(torch.split(x, tile)) if tile else [x]
    out = torch.cat([_multiply(tiles, part) for part in weight.parts], dim=-1)
    return out if weight.bias is None else out.add_(weight.bias)


def prepare_table(matrix: Packed) -> PackedTable:
    """A quantised table [vocabulary, hidden] as its codes, nothing of which is shared."""
    return _codes(matrix, None)


def read_rows(table: PackedTable, ids: Tensor) -> Tensor:
    """The rows `ids` [T] of a table, float32 [T, hidden]: the numbers that `kernels.packed.dequantise` makes."""
    return torch.cat([_read_rows(table, some) for some in torch.split(ids, cpu_block_rows(table.shape[1]))])


def _read_rows(table: PackedTable, ids: Tensor) -> Tensor:
    groups = ids // table.group[0]
    rows = table._replace(
        codes=table.codes.index_select(0, ids),
        scales=table.scales.index_select(0, groups),
        zeros=None if table.zeros is None else table.zeros.index_select(0, groups),
        group=(1, table.group[1]),
    )
    return _plain(rows, range(len(ids)))


def tie(table: PackedTable, dtype: torch.dtype) -> PackedLinear:
    """A table as the matrix that makes logits.

    Its codes serve both but where torch's int4 kernel is taken, from whose layout no rows can be read.
    """
    bits = 4 if table.halves else 8
    layout = Layout(*table.group, bits, _kind(table), table.zeros is not None)
    kernel = cpu_kernel(layout, table.shape, dtype.itemsize)
    part: _Part = table
    if kernel == "int8":
        part = _Int8(table.codes, _row_scales(table), None)
    elif kernel == "int4":
        part = _pack_int4(table, table.group[1], None, lambda rows: _whole(table, rows))
    return PackedLinear((part,), None)


def layout_of(matrix: Packed) -> Layout:
    """What was known of `matrix` before it was read."""
    zeros, order = matrix.zeros is not None, matrix.order is not None
    return Layout(matrix.rows, matrix.columns, matrix.bits, _kind(matrix), zeros, order)


def _kind(matrix: Packed | PackedTable) -> str:
    if matrix.codes.dtype == torch.float8_e4m3fn:
        return "float8"
    return "int" if matrix.table is None else "table"


def _prepare(matrix: Packed, dtype: torch.dtype) -> _Part:
    kernel = cpu_kernel(layout_of(matrix), matrix.shape, dtype.itemsize)
    order = None if matrix.order is None else matrix.order.clone()
    makes: dict[str, Callable[[Packed, Tensor | None], _Part]] = {"int8": _int8, "int4": _int4, "codes": _codes}
    return makes[kernel](matrix, order)


def _int8(matrix: Packed, order: Tensor | None) -> _Int8 | _Int8Vnni:
    """Older processors' products of bytes overflow, and of other sizes oneDNN's layout is padded."""
    if has_vnni() and matrix.shape[0] % _VNNI_ROWS == 0:
        return _Int8Vnni(torch.ops.onednn.qlinear_prepack(matrix.codes, None), _row_scales(matrix), order)
    return _Int8(matrix.codes.clone(), _row_scales(matrix), order)


def has_vnni() -> bool:
    """Whether this processor multiplies bytes into whole sums, and torch's oneDNN has it do so."""
    return torch.backends.mkldnn.is_available() and bool(torch.cpu._is_vnni_supported())  # type: ignore[no-untyped-call]  # torch's


def _row_scales(matrix: Packed | PackedTable) -> Tensor:
    return matrix.scales.expand(matrix.shape[0], 1).flatten().bfloat16()


def _int4(matrix: Packed, order: Tensor | None) -> _Int4:
    return _pack_int4(matrix, matrix.columns, order, lambda rows: matrix.codes[rows.start : rows.stop])


def _pack_int4(
    matrix: Packed | PackedTable, columns: int, order: Tensor | None, read: Callable[[range], Tensor]
) -> _Int4:
    """torch computes (code - 8) · scale + zero, of codes 0 to 15; `read` gives some rows of them, or less 8."""
    out, inner = matrix.shape
    packed = torch.empty(out, inner // 2, dtype=torch.uint8)
    for rows in _blocks(out, cpu_block_rows(inner, _INT4_BLOCK)):
        codes = read(rows)
        whole = codes.int().add_(8) if codes.dtype == torch.int8 else codes.int()
        packed[rows.start : rows.stop] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
    zeros = torch.zeros_like(matrix.scales) if matrix.zeros is None else 8 - matrix.zeros
    both = torch.stack([matrix.scales, zeros * matrix.scales], -1).transpose(0, 1).bfloat16().contiguous()
    return _Int4(packed, both, columns, order)


def _blocks(out: int, at_once: int) -> Iterator[range]:
    return (range(first, min(first + at_once, out)) for first in range(0, out, at_once))


def _codes(matrix: Packed, order: Tensor | None) -> _Codes:
    codes, signed = matrix.codes, matrix.codes.dtype == torch.int8
    halves = matrix.bits == 4
    if halves:
        out, inner = codes.shape
        both = torch.empty(out, -(-inner // 2), dtype=torch.uint8)
        for rows in _blocks(out, cpu_block_rows(inner)):
            some = codes[rows.start : rows.stop]
            positive = F.pad((some + 8).byte() if signed else some, (0, inner % 2))
            low, high = positive.chunk(2, dim=1)
            torch.bitwise_or(low, high << 4, out=both[rows.start : rows.stop])
        codes = both
    zeros = None if matrix.zeros is None else matrix.zeros.clone()
    table = None if matrix.table is None else tuple(matrix.table.tolist())
    group = (matrix.rows, matrix.columns)
    codes = codes if halves else codes.clone()
    return _Codes(codes, matrix.scales.clone(), zeros, table, order, group, matrix.shape, halves, signed)


def _multiply(tiles: Sequence[Tensor], part: _Part) -> Tensor:
    """The products of all tiles, one below the other."""
    if isinstance(part, Tensor):
        return torch.cat([F.linear(tile, part) for tile in tiles])
    if part.order is not None:
        tiles = [tile.index_select(1, part.order) for tile in tiles]
    if isinstance(part, _Int8):
        return torch.cat([torch.ops.aten._weight_int8pack_mm(tile, part.codes, part.scales) for tile in tiles])
    if isinstance(part, _Int8Vnni):
        return torch.cat([_multiply_bytes(tile, part) for tile in tiles])
    if isinstance(part, _Int4):
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        return torch.cat([kernel(tile, part.codes, part.group, part.scales_and_zeros) for tile in tiles])
    return _multiply_in_blocks(tiles, part)


def _multiply_bytes(x: Tensor, part: _Int8Vnni) -> Tensor:
    """Each row of x to whole numbers of a step of its own, -127 to 127, plus the 128 that makes them unsigned."""
    wide = x.float()
    step = wide.abs().amax(1, keepdim=True).clamp_min_(_LEAST).div_(127)
    whole = wide.div_(step).round_().add_(128).to(torch.uint8)
    found: Tensor = torch.ops.onednn.qlinear_pointwise(
        whole, 1.0, 128, part.codes, part.scales.float(), None, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return found.mul_(step).to(x.dtype)


def _multiply_in_blocks(tiles: Sequence[Tensor], part: _Codes) -> Tensor:
    out, inner = part.shape
    result = tiles[0].new_empty(sum(map(len, tiles)), out)
    for rows in _blocks(out, cpu_block_rows(inner)):
        plain = _plain(part, rows).to(result.dtype)
        position = 0
        for tile in tiles:
            result[position : position + len(tile), rows.start : rows.stop] = F.linear(tile, plain)
            position += len(tile)
    return result


def _plain(part: _Codes, rows: range) -> Tensor:
    """Some rows in float32."""
    codes = part.codes[rows.start : rows.stop]
    if part.halves:
        values = _whole(part, rows)
        values = values.float() if part.table is None else _look_up(values, torch.tensor(part.table))
        values = values.sub_(8) if part.signed else values
    elif codes.dtype == torch.float8_e4m3fn:
        every = torch.arange(256, dtype=torch.uint8).view(codes.dtype)  # torch's conversion of all is much slower
        values = _look_up(codes.view(torch.uint8), every.float())
    else:
        values = codes.float()
    return scale(values.contiguous(), part.scales, part.zeros, part.group, rows)


def _whole(part: _Codes, rows: range) -> Tensor:
    """Codes of four bits of some rows, one in a byte, 0 to 15."""
    codes = part.codes[rows.start : rows.stop]
    return torch.cat([codes & 15, codes >> 4], 1)[:, : part.shape[1]]


def _look_up(codes: Tensor, table: Tensor) -> Tensor:
    return table.index_select(0, codes.int().flatten()).view(codes.shape)
