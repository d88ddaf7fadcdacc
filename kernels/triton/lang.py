"""What every kernel builds on: products and roundings that mean the same in the interpreter and on a device.

The interpreter adds and multiplies bfloat16 numbers as if they were integers, and cuts where a device rounds to
nearest even. So no kernel adds or multiplies numbers of 16 or 8 bits itself: it loads them, takes them to float32,
and writes through `round_to`.

Source: IEEE 754-2019, 4.3.1 (rounding to nearest, ties to even); Micikevicius et al., "FP8 Formats for Deep
Learning", 2022 (e4m3, whose largest number is 448).
"""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Kernels of this process run in Triton's interpreter, on the CPU; asked when this module is first imported."""

FP8_MAX = tl.constexpr(448.0)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc):
    """acc + a · b in float32 of a [M, K] and b [K, N]; M, N and K at least 16, K of 8-bit numbers at least 32."""
    if INTERPRET:
        # in float64, as numpy gives a row other bits in another place of a product of float32 numbers
        a, b = a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)
        return acc + tl.dot(a, b, input_precision="ieee").to(acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Float32 numbers as `dtype`, to nearest even; what is too large for e4m3 becomes its largest."""
    if dtype == tl.bfloat16:
        if INTERPRET:
            bits = x.to(tl.uint32, bitcast=True)
            even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
            return tl.where(x == x, even, x.to(tl.bfloat16))
        else:
            return x.to(tl.bfloat16)
    elif dtype == tl.float8e4nv:
        return _to_e4m3(x)
    elif dtype == tl.int8:
        return _nearest_integer(x).to(tl.int8)
    else:
        return x.to(dtype)


@triton.jit
def _to_e4m3(x):
    x = tl.clamp(x, -FP8_MAX, FP8_MAX)
    if INTERPRET:  # to a multiple of the number's last place, which the cast then keeps as it is
        exponent = ((x.to(tl.uint32, bitcast=True) >> 23) & 0xFF).to(tl.int32) - 127
        last = tl.exp2((tl.maximum(exponent, -6) - 3).to(tl.float32))
        x = _nearest_integer(x / last) * last
    return x.to(tl.float8e4nv)


@triton.jit
def _nearest_integer(x):
    """Numbers below 2^22 to the nearest whole one, ties to even: adding 1.5 * 2^23 leaves no fraction."""
    return (x + 12582912.0) - 12582912.0
