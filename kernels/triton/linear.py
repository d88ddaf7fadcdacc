"""Products of a step's activations with matrices of any form, each in the kernel that form and rows ask for.

Inputs stay as they are (W8A16, W4A16), few rows, more, or so many that cuBLAS and a plain copy of some rows of the
matrix at a time are faster; or they are rounded to codes by token first, where both are of eight bits (W8A8). A
deterministic product takes one kernel with one configuration whatever the rows: int4 and bytes that for few.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.triton import linear_bytes, linear_codes, linear_int4, linear_plain
from kernels.triton.inputs import BLOCK, Rounded, rounded
from kernels.triton.layout import form_scratch_bytes, plain_rows
from kernels.triton.quantise import has_float8
from kernels.triton.scratch import Scratch
from kernels.triton.weights import Form, Fp8, Int4, Int8, Linear, Plain, shape_of

MANY = 256
"""Rows above which a quantised matrix is made plain for cuBLAS, so many rows of it at a time."""

ROUNDED = 16
"""Rows up to which products wait for weights alone, so that inputs stay as they are."""


class _How(NamedTuple):
    deterministic: bool
    round_inputs: bool


def linear(
    x: Tensor | Rounded,
    weight: Linear,
    out: Tensor,
    scratch: Tensor,
    *,
    deterministic: bool = False,
    round_inputs: bool = False,
) -> None:
    """x · weightᵀ + bias.

    Args:
        x: [rows, K], contiguous, of the type that the matrix was prepared for; or codes as `rounds_to` says.
        weight: of `kernels.triton.weights.prepare_linear`.
        out: [rows, N], of any row stride, its last dimension contiguous.
        scratch: uint8, of `scratch_bytes`; what it holds means nothing before and after.
        deterministic: a row's bits are the same whatever the other rows are.
        round_inputs: where `rounds_to` names a type, inputs of more than ROUNDED rows, and in a deterministic
            product all, are rounded to it.

    Raises:
        ValueError: inputs are not contiguous, scratch is too small, or codes are none that the matrix takes.
    """
    how, first = _How(deterministic, round_inputs), 0
    for part in weight.parts:
        last = first + shape_of(part)[0]
        bias = None if weight.bias is None else weight.bias[first:last]
        _multiply(x, part, bias, out[:, first:last], Scratch(scratch), how)
        first = last


def rounds_to(weight: Linear) -> torch.dtype | None:
    """The type of codes, one scale a token, that this matrix multiplies; None: it multiplies numbers alone."""
    kinds = {_rounds_to(part) for part in weight.parts}
    return kinds.pop() if len(kinds) == 1 else None


def scratch_bytes(weight: Linear, most_rows: int, item: int) -> int:
    """What `linear` needs at most for so many rows; `kernels.triton.layout.linear_scratch_bytes` is the same.

    Args:
        weight: of which.
        most_rows: of inputs.
        item: bytes of a number of them.
    """
    return max(_scratch_bytes(part, most_rows, item) for part in weight.parts)


def _scratch_bytes(part: Form, most_rows: int, item: int) -> int:
    if isinstance(part, Plain):
        return 0
    form = {Int4: "int4", Int8: "int8", Fp8: "fp8"}[type(part)]
    return form_scratch_bytes(form, part.order is not None, shape_of(part), most_rows, item)


def _rounds_to(part: Form) -> torch.dtype | None:
    if isinstance(part, Fp8):
        return torch.float8_e4m3fn if has_float8() else None
    return torch.int8 if isinstance(part, Int8) and part.zeros is None else None


def _multiply(
    x: Tensor | Rounded, part: Form, bias: Tensor | None, out: Tensor, scratch: Scratch, how: _How
) -> None:
    if not isinstance(x, Rounded) and not x.is_contiguous():
        raise ValueError("inputs are not contiguous")
    if isinstance(part, Plain):
        linear_plain.multiply(_numbers(x), part.weight, bias, out, deterministic=how.deterministic)
        return
    x = _in_order(x, part.order, scratch)
    if not isinstance(part, Int4):
        x = _codes(x, part, scratch, how)
        if isinstance(x, Rounded):
            linear_codes.multiply(x, part, bias, out, deterministic=how.deterministic)
            return
    x, family = _numbers(x), linear_int4 if isinstance(part, Int4) else linear_bytes
    if how.deterministic or len(x) <= family.FEW:
        family.few(x, part, bias, out, scratch, whole=how.deterministic)
    elif len(x) <= MANY:
        family.many(x, part, bias, out, scratch)
    else:
        _multiply_plain(x, part, bias, out, scratch, family)


def _numbers(x: Tensor | Rounded) -> Tensor:
    if isinstance(x, Rounded):
        raise ValueError(f"codes of {x.codes.dtype} for a matrix that multiplies numbers")
    return x


def _in_order(x: Tensor | Rounded, order: Tensor | None, scratch: Scratch) -> Tensor | Rounded:
    """Inputs in the order of a matrix's columns."""
    if order is None:
        return x
    given = x.codes if isinstance(x, Rounded) else x
    found = scratch.take((given.shape[0], given.shape[1]), given.dtype)
    if isinstance(x, Rounded):
        torch.index_select(x.codes.view(torch.uint8), 1, order, out=found.view(torch.uint8))
        return Rounded(found, x.scales)
    torch.index_select(x, 1, order, out=found)
    return found


def _codes(x: Tensor | Rounded, part: Int8 | Fp8, scratch: Scratch, how: _How) -> Tensor | Rounded:
    """Inputs rounded, where that is asked for and worth it; as they are otherwise."""
    dtype = _rounds_to(part)
    if isinstance(x, Rounded):
        if x.codes.dtype != dtype:
            raise ValueError(f"codes of {x.codes.dtype} for a matrix that multiplies {dtype or 'numbers'}")
        return x
    if dtype is None or not how.round_inputs or not (how.deterministic or len(x) > ROUNDED):
        return x
    in_blocks = isinstance(part, Fp8) and part.group % BLOCK == 0 and part.group < x.shape[1]
    return rounded(x, dtype, in_blocks, scratch)


def _multiply_plain(
    x: Tensor,
    part: Int4 | Int8 | Fp8,
    bias: Tensor | None,
    out: Tensor,
    scratch: Scratch,
    family: ModuleType,
) -> None:
    """So many rows of the matrix at a time as numbers, and each time cuBLAS's product."""
    n, k = shape_of(part)
    at_once = plain_rows(n, k * x.itemsize)
    numbers = scratch.take((at_once, k), x.dtype)
    for first in range(0, n, at_once):
        rows = range(first, min(first + at_once, n))
        some = numbers[: len(rows)]
        family.plain(part, rows, some)
        of = slice(rows.start, rows.stop)
        linear_plain.multiply(x, some, None if bias is None else bias[of], out[:, of])
