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
_AT_ONCE = 2**18  # numbers that are taken to float32 at once
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
        codes = matrix.codes[rows.start : rows.stop]
        values = codes.float() if matrix.table is None else matrix.table[codes.long()]
        some = scale(values, matrix.scales, matrix.zeros, (matrix.rows, matrix.columns), rows)
        plain[rows.start : rows.stop, slice(None) if matrix.order is None else matrix.order] = some
    return plain


def scale(values: Tensor, scales: Tensor, zeros: Tensor | None, group: tuple[int, int], rows: range) -> Tensor:
    """(values - zeros) · scales of some rows, in place.

    Args:
        values: of the codes of these rows, float32 [len(rows), in], contiguous.
        scales: of the whole matrix.
        zeros: of the whole matrix.
        group: rows and columns that share a scale.
        rows: which rows of the matrix these are.
    """
    inner = values.shape[1]
    columns = min(group[1], inner)
    parts = values.view(len(rows), -1, columns) if inner % columns == 0 else values
    for numbers, change in ((zeros, parts.sub_), (scales, parts.mul_)):
        if numbers is not None:
            some = _of_rows(numbers, group[0], rows)
            change(some[..., None] if parts.dim() == 3 else some.repeat_interleave(columns, 1)[:, :inner])
    return values


def _of_rows(groups: Tensor, shared: int, rows: range) -> Tensor:
    """The groups of each of some rows, of which every `shared` have one in common."""
    first, last = rows.start // shared, (rows.stop - 1) // shared
    some = groups[first : last + 1]
    if shared == 1:
        return some
    skipped = rows.start - first * shared
    return some.repeat_interleave(shared, 0)[skipped : skipped + len(rows)]


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
    return _codes_bytes(layout, shape) + order


def cpu_table_bytes(layout: Layout, shape: tuple[int, int], item: int, is_tied: bool) -> int:
    """Bytes of a quantised embedding table as the CPU backend keeps it, and of the tied matrix of logits.

    Both have the codes in common but where torch's int4 kernel is taken, from whose layout no rows can be read.
    """
    kernel, table = cpu_kernel(layout, shape, item), _codes_bytes(layout, shape)
    if not is_tied or kernel == "codes":
        return table
    return table + (_BFLOAT16 * shape[0] if kernel == "int8" else cpu_bytes(layout, shape, item))


def _codes_bytes(layout: Layout, shape: tuple[int, int]) -> int:
    out, inner = shape
    scales = -(-out // layout.rows) * -(-inner // layout.columns)
    codes = out * (-(-inner // 2) if layout.bits == 4 else inner)
    return codes + _FLOAT * scales * (1 + layout.zeros)


def cpu_block_rows(inner: int, unit: int = _ROWS) -> int:
    """Rows of a matrix that the CPU backend makes plain at once: so many that they stay in its caches."""
    return max(unit, _AT_ONCE // inner // unit * unit)
