"""Weight matrices in the forms that the Triton kernels read.

    Plain   numbers of the type that is computed in
    Int4    w = (q - zero) · scale, or table[q] · scale; q of four bits, eight columns in a word of 32 bits
    Int8    w = (q - zero) · scale
    Fp8     w = q · scale of e4m3 numbers q

Which one follows from `kernels.triton.layout.form_of`, from sizes and kinds alone. Groups of columns that are no
whole number of planes (of four bits: 16 columns; of eight: 32) have no fast form, nor have tables of 256 values:
such a matrix is made plain when it is prepared. Tables of 16 values stay codes, which a kernel looks up. Where
columns are in an order of their own, inputs are gathered in that order first.

Column k = s · 8 · width + p · width + i of Int4 is in bits 4p to 4p + 3 of word [n, s · width + i]; columns beyond
the last are zero. Prepared objects are named tuples of tensors and numbers: see `kernels.ops.Backend.layout_id`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom
from torch import Tensor

from kernels.packed import Layout, Packed, dequantise
from kernels.triton.layout import form_of, fp8_rows, int4_width

PLANES = 8
_AT_ONCE = 2**24  # codes that are put into words at once


class Plain(NamedTuple):
    """Numbers."""

    weight: Tensor  # [N, K]


class Int4(NamedTuple):
    """Codes of four bits."""

    codes: Tensor  # int32 [N, spans * width]
    scales: Tensor  # float32 [G, N]
    zeros: Tensor | None  # float32 [G, N]; None: 8
    table: Tensor | None  # float32 [16], then there are no zeros
    order: Tensor | None  # int64 [K]; column k multiplies input order[k]
    group: int  # columns that share a scale; K: all
    width: int  # words of a span
    inner: int  # K
    fractions: bool  # zeros are no whole numbers; False where they cannot be read


class Int8(NamedTuple):
    """Whole numbers of eight bits."""

    codes: Tensor  # int8 [N, K]
    scales: Tensor  # float32 [G, N]
    zeros: Tensor | None  # float32 [G, N]; None: 0
    order: Tensor | None  # int64 [K]
    group: int


class Fp8(NamedTuple):
    """Floats of eight bits."""

    codes: Tensor  # float8_e4m3fn [N, K]
    scales: Tensor  # float32 [G, N / rows]
    order: Tensor | None  # int64 [K]
    rows: int  # that share a scale: 1 or 128
    group: int


Form: TypeAlias = Plain | Int4 | Int8 | Fp8


class Linear(NamedTuple):
    """Matrices over one input, their outputs side by side, and their biases."""

    parts: tuple[Form, ...]
    bias: Tensor | None  # float32 [N]


def shape_of(form: Form) -> tuple[int, int]:
    """Outputs and inputs."""
    if isinstance(form, Plain):
        return form.weight.shape[0], form.weight.shape[1]
    return form.codes.shape[0], form.inner if isinstance(form, Int4) else form.codes.shape[1]


def layout_of(matrix: Packed) -> Layout:
    """What was known of `matrix` before it was read."""
    kind = "float8" if matrix.codes.dtype == torch.float8_e4m3fn else "int" if matrix.table is None else "table"
    zeros, order = matrix.zeros is not None, matrix.order is not None
    return Layout(matrix.rows, matrix.columns, matrix.bits, kind, zeros, order)


def prepare_linear(
    matrices: Sequence[Tensor | Packed], biases: Sequence[Tensor], dtype: torch.dtype, device: torch.device | str
) -> Linear:
    """Matrices [N_i, K] over one input, nothing of which is shared; those of one form become one.

    Args:
        matrices: plain or quantised.
        biases: one for each, or none.
        dtype: that is computed in.
        device: where they are to be; "meta": their sizes alone.
    """
    parts: list[Form] = []
    for matrix in matrices:
        form = prepare_matrix(matrix, dtype, device)
        if parts and _joins(parts[-1], form):
            parts[-1] = _join(parts[-1], form)
        else:
            parts.append(form)
    bias = torch.cat([bias.to(device, torch.float32) for bias in biases]) if biases else None
    return Linear(tuple(parts), bias)


def prepare_table(matrix: Tensor | Packed, dtype: torch.dtype, device: torch.device | str) -> Form:
    """An embedding table [vocabulary, hidden] without `order`: every form lets its rows be read."""
    return prepare_matrix(matrix, dtype, device)


def tie(table: Form) -> Linear:
    """The table as the matrix that makes logits; nothing is copied."""
    return Linear((table,), None)


def prepare_matrix(matrix: Tensor | Packed, dtype: torch.dtype, device: torch.device | str) -> Form:
    """One matrix [N, K] in its form."""
    if isinstance(matrix, Tensor):
        return Plain(matrix.to(device, dtype, copy=True).contiguous())
    layout = layout_of(matrix)
    form = form_of(layout, matrix.shape)
    matrix = matrix._replace(**{name: part.to(device) for name, part in matrix._asdict().items() if _is(part)})
    if form == "plain":
        return Plain(dequantise(matrix).to(dtype))
    group = min(matrix.columns, matrix.shape[1])
    order = None if matrix.order is None else matrix.order.clone()
    if form == "fp8":
        rows = fp8_rows(layout, matrix.shape)
        scales = _by_group(matrix.scales, matrix.rows if rows == 1 else 1, matrix.shape[0] // rows)
        return Fp8(matrix.codes.clone().contiguous(), scales, order, rows, group)
    scales = _by_group(matrix.scales, matrix.rows, matrix.shape[0])
    codes, zeros = _whole_codes(matrix)
    zeros = None if zeros is None else _by_group(zeros, matrix.rows, matrix.shape[0])
    if form == "int8":
        return Int8(codes.contiguous(), scales, zeros, order, group)
    width = int4_width(matrix.shape[1], matrix.columns)
    table = None if matrix.table is None else matrix.table.to(torch.float32, copy=True)
    return Int4(
        _words(codes, width), scales, zeros, table, order, group, width, matrix.shape[1], _has_fractions(zeros)
    )


def _is(part: object) -> bool:
    return isinstance(part, Tensor)


def _by_group(numbers: Tensor, rows: int, out: int) -> Tensor:
    """Scales or zeros [ceil(out / rows), G] as float32 [G, out]."""
    return numbers.float().repeat_interleave(rows, 0)[:out].t().contiguous() if rows > 1 else _turned(numbers)


def _turned(numbers: Tensor) -> Tensor:
    turned = torch.empty(numbers.shape[::-1], dtype=torch.float32, device=numbers.device)
    return turned.copy_(numbers.t())


def _whole_codes(matrix: Packed) -> tuple[Tensor, Tensor | None]:
    """Codes, and zeros where they are not what the form has of itself: of four bits 0 to 15, of eight int8."""
    codes, zeros, is_signed = matrix.codes, matrix.zeros, matrix.codes.dtype == torch.int8
    if matrix.table is not None:
        return codes, None
    shift = (8 if is_signed else 0) if matrix.bits == 4 else (0 if is_signed else -128)
    if zeros is None and not is_signed:
        zeros = torch.zeros_like(matrix.scales)
    shifted = _plus(codes.to(torch.int16), shift).to(torch.uint8 if matrix.bits == 4 else torch.int8)
    return shifted, None if zeros is None else _plus(zeros.float(), shift)


def _plus(numbers: Tensor, shift: int) -> Tensor:
    """Where there are sizes alone, arithmetic would load torch's compiler, which takes seconds."""
    return numbers if numbers.is_meta else numbers + shift


def _has_fractions(zeros: Tensor | None) -> bool:
    return zeros is not None and not zeros.is_meta and not torch.equal(zeros, zeros.round())


def _words(codes: Tensor, width: int) -> Tensor:
    """Codes [N, K] of 0 to 15 as words [N, spans * width]."""
    out, inner = codes.shape
    spans = -(-inner // (PLANES * width))
    words = torch.empty(out, spans * width, dtype=torch.int32, device=codes.device)
    shifts = torch.arange(0, 4 * PLANES, 4, dtype=torch.int32, device=codes.device)[:, None]
    for some in () if codes.is_meta else _blocks(out, max(1, _AT_ONCE // inner)):
        padded = F.pad(codes[some].int(), (0, spans * PLANES * width - inner))
        planes = padded.view(-1, spans, PLANES, width) << shifts
        words[some] = planes.sum(2, dtype=torch.int32).flatten(1)
    return words


def _blocks(out: int, at_once: int) -> Iterator[slice]:
    return (slice(first, min(first + at_once, out)) for first in range(0, out, at_once))


def _joins(one: Form, other: Form) -> bool:
    """Whether two matrices can be one below the other: tables and orders are each matrix's own."""
    if type(one) is not type(other) or getattr(one, "order", None) is not None:
        return False
    if getattr(one, "table", None) is not None or getattr(other, "table", None) is not None:
        return False
    return _kinds(one) == _kinds(other)


def _kinds(form: Form) -> list[object]:
    return ["tensor" if _is(part) else None if isinstance(part, bool) else part for part in form]


def _join(one: Form, other: Form) -> Form:
    if isinstance(one, Plain) and isinstance(other, Plain):
        return Plain(torch.cat([one.weight, other.weight]))
    changed: dict[str, Any] = {}
    for name, part in one._asdict().items():
        if isinstance(part, Tensor):
            dim = 0 if name == "codes" else 1
            changed[name] = torch.cat([part, getattr(other, name)], dim)
        if isinstance(part, bool):
            changed[name] = part or getattr(other, name)
    return one._replace(**changed)
