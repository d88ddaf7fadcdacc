"""Codes of weights to the numbers they stand for, before their scales, in few instructions and without rounding.

A float whose last place is worth one has a small integer in its low bits: `0x4300 | q` is the bfloat16 number
128 + q, `0x6400 | q` the float16 number 1024 + q, `0x4B000000 | q` the float32 number 2^23 + q. What is then taken
off is exact too, so no instruction converts integers. Of four bits, eight columns share a word of 32 bits, plane p
of them in bits 4p to 4p + 3: one shift and one mask then make two of them.

Source: Kim et al., "Who Says Elephants Can't Run: Bringing Large Scale MoE Models into Cloud Scale Production",
2022 (integers by exponent bits).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.lang import INTERPRET, round_to


@triton.jit
def raised(words, P: tl.constexpr, dtype: tl.constexpr):
    """Codes of one plane of words, int32, in the last places of numbers of `dtype`: q + 2^7, 2^10 or 2^23.

    Args:
        words: eight codes of four bits each.
        P: which of them, 0 to 7.
        dtype: bfloat16, float16 or float32.
    """
    if dtype == tl.float32:
        return (((words >> (4 * P)) & 0xF) | 0x4B000000).to(tl.float32, bitcast=True)
    else:
        exponent: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
        pair = ((words >> (4 * (P % 4))) & 0x000F000F) | exponent
        half = (pair >> 16) if P >= 4 else pair
        return half.to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def raised_by(zero, dtype: tl.constexpr):
    """Whole numbers, float32, plus what `raised` adds to codes: exact."""
    return zero + (8388608.0 if dtype == tl.float32 else 128.0 if dtype == tl.bfloat16 else 1024.0)


@triton.jit
def plane(words, P: tl.constexpr, dtype: tl.constexpr):
    """q - 8 of one plane of words as `dtype`, exact; arguments as of `raised`."""
    offset: tl.constexpr = 8388616.0 if dtype == tl.float32 else 136.0 if dtype == tl.bfloat16 else 1032.0
    if INTERPRET:
        return round_to(raised(words, P, dtype).to(tl.float32) - offset, dtype)
    else:
        return raised(words, P, dtype) - offset


@triton.jit
def code(words, P: tl.constexpr):
    """q of one plane of words, 0 to 15, int32."""
    return (words >> (4 * P)) & 0xF


@triton.jit
def whole_part(zero):
    """The nearest whole number of float32 numbers below 2^22."""
    return (zero + 12582912.0) - 12582912.0


@triton.jit
def less(w, whole):
    """w - whole in the type of w: exact of whole numbers that it has, and whose difference it has.

    Args:
        w: of any type.
        whole: float32, of a shape that fits.
    """
    if w.dtype == tl.float32:
        return w - whole
    elif INTERPRET:
        return round_to(w.to(tl.float32) - whole, w.dtype)
    else:
        return w - whole.to(w.dtype)


@triton.jit
def whole_byte(codes, dtype: tl.constexpr):
    """int8 numbers as `dtype`: exact."""
    bits = (codes.to(tl.uint8, bitcast=True).to(tl.int32) ^ 0x80) | 0x4B000000
    return round_to(bits.to(tl.float32, bitcast=True) - 8388736.0, dtype)


@triton.jit
def small_float(codes, dtype: tl.constexpr):
    """Bits of e4m3 numbers, uint8, as `dtype`, exact, on devices that lack e4m3 too: 2^-8 of what they are.

    Shifted to the places of a float16 number they have its exponent less 8. (Not-a-number becomes 480.)
    """
    bits = codes.to(tl.int32)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
    return round_to(half.to(tl.float32), dtype)
