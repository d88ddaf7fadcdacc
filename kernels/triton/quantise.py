"""Rows of numbers as codes of eight bits with one scale a row: what every kernel that writes codes has in common.

    code = round(y / scale),  scale = max |y| / largest code

Source: Xiao et al., "SmoothQuant", ICML 2023 (scales of activations by token).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.case import Expected
from kernels.triton.configs import capability
from kernels.triton.lang import FP8_MAX, round_to
from kernels.triton.launch import Unsupported

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Of the codes of each format."""

_FLOAT8 = 89  # the compute capability from which on there are such numbers


@triton.jit
def largest_of(y, axis: tl.constexpr = 0):
    """The largest size of the numbers along an axis of y; infinite where one is no number."""
    return tl.max(tl.where(y == y, tl.abs(y), float("inf")), axis=axis)


@triton.jit
def row_scale(most, dtype: tl.constexpr):
    """The scale for rows whose largest size is `most`, and what to multiply with in its place: of zeros, zero.

    Of an infinite size the scale is no number: so nor is what the codes stand for, whatever they are.
    """
    largest = 127.0 if dtype == tl.int8 else FP8_MAX
    scale = tl.where(most < float("inf"), most / largest, float("nan"))
    return scale, tl.where(most < 1e-30, 0.0, largest / most)


@triton.jit
def to_codes(y, inverse, dtype: tl.constexpr):
    """The codes of float32 numbers; of a row that is not finite they mean nothing, and its scale is not either."""
    if dtype == tl.int8:
        return round_to(tl.clamp(y * inverse, -127.0, 127.0), dtype)
    else:
        return round_to(y * inverse, dtype)


def has_float8() -> bool:
    """The selected device has e4m3 numbers."""
    return capability() >= _FLOAT8


def check_codes(dtype: torch.dtype) -> None:
    """That the selected device has numbers of this type.

    Raises:
        Unsupported: it has none.
    """
    if dtype is torch.float8_e4m3fn and not has_float8():
        raise Unsupported(f"e4m3 numbers need compute capability 8.9, not {capability() / 10}")


def quantise(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of `dtype` and scales [rows, 1], float64, of float64 rows."""
    scales = y.abs().amax(-1, keepdim=True) / LARGEST[dtype]
    codes = y / scales.where(scales != 0, torch.ones_like(scales))
    return (codes.round() if dtype is torch.int8 else codes.float()).to(dtype), scales


def expect_codes(y: Tensor, dtype: torch.dtype) -> Expected:
    """Exact rows that are written as codes with scales."""
    codes, scales = quantise(y.double(), dtype)
    return Expected(y.double(), codes.double() * scales)
