"""Quantised matrices as their files have them, in one form for all formats, and the numbers they stand for.

    w[n, k] = (value(codes[n, k]) - zeros[n // rows, k // columns]) · scales[n // rows, k // columns]

A code's value is itself, or what `table` has for it. Formats differ in how they pack codes, which `engine/weights`
undoes; nothing here knows a format's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Packed(NamedTuple):
    """A quantised matrix [out, in].

    Attributes:
        codes: [out, in], one a number: uint8 or int8 integers, float8_e4m3fn numbers, or uint8 indexes of `table`.
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


def take_rows(matrix: Tensor | Packed, chosen: slice) -> Tensor | Packed:
    """Some rows of a plain matrix, or of a packed one whose rows have scales of their own; a view of it."""
    if not isinstance(matrix, Packed):
        return matrix[chosen]
    if matrix.rows != 1:
        raise ValueError(f"{matrix.rows} rows share a scale and cannot be taken apart")
    zeros = matrix.zeros[chosen] if matrix.zeros is not None else None
    return matrix._replace(codes=matrix.codes[chosen], scales=matrix.scales[chosen], zeros=zeros)


def dequantise(matrix: Packed) -> Tensor:
    """The plain matrix [out, in] in float32, its columns in the order of the inputs."""
    values = matrix.codes.float() if matrix.table is None else matrix.table[matrix.codes.long()]
    scales = _spread(matrix.scales, matrix)
    if matrix.zeros is not None:
        values = values - _spread(matrix.zeros, matrix)
    plain = values * scales
    if matrix.order is None:
        return plain
    placed = plain.new_empty(plain.shape)
    placed[:, matrix.order] = plain
    return placed


def _spread(groups: Tensor, matrix: Packed) -> Tensor:
    """One number per group, as one per number of the matrix."""
    out, inner = matrix.shape
    return groups.repeat_interleave(matrix.rows, 0)[:out].repeat_interleave(matrix.columns, 1)[:, :inner]
