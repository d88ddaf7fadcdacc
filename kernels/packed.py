"""Quantised matrices as their files have them, in one form for all formats, and the numbers they stand for.

    w[n, k] = (value(codes[n, k]) - zeros[n // rows, k // columns]) · scales[n // rows, k // columns]

A code's value is itself, or what `table` has for it. Formats differ in how they pack codes, which `engine/weights`
undoes; nothing here knows a format's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


_FLOAT = 4
_BFLOAT16 = 2
_AT_ONCE = 2**20  # numbers that are taken to float32 at once
_ROWS = 16
_INT4_GROUPS = (32, 64, 128, 256)
_INT4_ROWS = 16
_INT8_COLUMNS = 64


class Packed(NamedTuple):
    """A quantised matrix [out, in].

    Attributes:
        codes: [out, in], one a number: int8 integers (of four bits, -8 to 7), uint8 integers where there are
            zeros, float8_e4m3fn numbers, or uint8 indexes of `table`.
        scales: float32 [ceil(out / rows), ceil(in / columns)].
        rows: rows that share a scale.
        columns: columns that share a scale.
        bits: of a code, 4 or 8: what a backend may keep it in.
        zeros: float32, as `scales`; None: 0.
        table: float32 [2 ** bits], the value of each code; None: the code itself.
        order: int64 [in]; column i multiplies input order[i] (GPTQ's act-order); None: input i.
    """

    codes: Tensor
    scales: Tensor
    rows: int
    columns: int
    bits: int
    zeros: Tensor | None = None
    table: Tensor | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.codes.shape[0], self.codes.shape[1]


class Layout(NamedTuple):
    """What is known of a packed matrix before it is read: what its prepared form depends on beside its shape.

    Attributes:
        rows: rows that share a scale.
        columns: columns that share a scale.
        bits: of a code, 4 or 8.
        kind: "int", "float8" or "table": what a code stands for.
        zeros: it has zero points.
        order: its columns are in an order of their own.
    """

    rows: int
    columns: int
    bits: int
    kind: str = "int"
    zeros: bool = False
    order: bool = False


def dequantise(matrix: Packed) -> Tensor:
    """The plain matrix [out, in] in float32, its columns in the order of the inputs."""
    out, inner = matrix.shape
    plain = matrix.scales.new_empty(out, inner)
    at_once = max(1, _AT_ONCE // inner)
    for first in range(0, out, at_once):
        rows = range(first, min(first + at_once, out))
        values = matrix.codes[rows.start : rows.stop]
        some = scaled(values, matrix.scales, matrix.zeros, matrix.table, (matrix.rows, matrix.columns), rows)
        plain[rows.start : rows.stop, slice(None) if matrix.order is None else matrix.order] = some
    return plain


def scaled(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    table: Tensor | None,
    group: tuple[int, int],
    rows: range,
) -> Tensor:
    """The numbers of some rows in float32, in the order of the codes.

    Args:
        codes: of these rows, [len(rows), in].
        scales: of the whole matrix.
        zeros: of the whole matrix.
        table: as `Packed` has it.
        group: rows and columns that share a scale.
        rows: which rows of the matrix these are.
    """
    values = codes.float() if table is None else table[codes.long()]
    if zeros is not None:
        values.sub_(_spread(zeros, group, rows, codes.shape[1]))
    return values.mul_(_spread(scales, group, rows, codes.shape[1]))


def _spread(groups: Tensor, group: tuple[int, int], rows: range, inner: int) -> Tensor:
    """One number per group, as one per number of these rows; where a row has only one, once for each row."""
    first, last = rows.start // group[0], (rows.stop - 1) // group[0]
    some = groups[first : last + 1]
    if group[0] > 1:
        skipped = rows.start - first * group[0]
        some = some.repeat_interleave(group[0], 0)[skipped : skipped + len(rows)]
    return some if some.shape[1] == 1 else some.repeat_interleave(group[1], 1)[:, :inner]


def cpu_kernel(layout: Layout, shape: tuple[int, int], item: int) -> str:
    """How the CPU backend keeps a matrix: "int4" or "int8", as torch's own kernels have it, or "codes".

    The kernels take bfloat16 alone, scales for each row or for a whole number of groups, and these sizes; int8 has
    no zero points there. Everything else is kept as codes and made plain for each product, block by block.

    Args:
        layout: of the matrix.
        shape: [out, in].
        item: bytes of the number type that the backend computes in.
    """
    out, inner = shape
    if item != _BFLOAT16 or layout.kind != "int" or layout.rows != 1:
        return "codes"
    if layout.bits == 4:
        fits = layout.columns in _INT4_GROUPS and inner % layout.columns == 0 and out % _INT4_ROWS == 0
        return "int4" if fits else "codes"
    return "int8" if layout.columns >= inner and not layout.zeros and inner % _INT8_COLUMNS == 0 else "codes"


def cpu_bytes(layout: Layout, shape: tuple[int, int], item: int) -> int:
    """Bytes of a matrix as the CPU backend keeps it; `kernels/packed_cpu.py` makes these tensors."""
    out, inner = shape
    scales = -(-out // layout.rows) * -(-inner // layout.columns)
    order = 8 * inner if layout.order else 0
    kernel = cpu_kernel(layout, shape, item)
    if kernel == "int4":
        return out * inner // 2 + 2 * _BFLOAT16 * scales + order
    if kernel == "int8":
        return out * inner + _BFLOAT16 * out + order
    codes = out * (-(-inner // 2) if layout.bits == 4 else inner)
    return codes + _FLOAT * scales * (1 + layout.zeros) + order


def cpu_block_rows(inner: int) -> int:
    """Rows of a matrix that the CPU backend makes plain at once: so many that they are a megabyte or four."""
    return max(_ROWS, _AT_ONCE // inner // _ROWS * _ROWS)
