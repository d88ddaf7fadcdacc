"""The gate of an MLP: act(gate) · up of two halves of a row, rounded to the number type, or to codes with a scale.

    silu             g · sigmoid(g) · u
    gelu             g · (1 + erf(g / sqrt(2))) / 2 · u
    gelu_tanh        g · sigmoid(2 · sqrt(2 / pi) · (g + 0.044715 · g³)) · u
    clamped_swiglu   g · sigmoid(1.702 · g) · (u + 1), g = min(gate, 7), u = clamp(up, -7, 7)

Source: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian Error Linear Units",
2016 (whose tanh is written as a sigmoid here).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import ACTIVATIONS
from kernels.reference import ReferenceBackend
from kernels.triton.case import MODEL, Case, Draw, Expected, expect
from kernels.triton.configs import config
from kernels.triton.functions import erf, sigmoid
from kernels.triton.lang import round_to
from kernels.triton.launch import launch
from kernels.triton.quantise import check_codes, expect_codes, largest_of, row_scale, to_codes

WIDEST = 32768  # numbers of a row that becomes codes, which one program holds


@triton.jit
def gate(g, u, ACTIVATION: tl.constexpr):
    """act(g) · u of float32 numbers."""
    if ACTIVATION == "silu":
        return g * sigmoid(g) * u
    elif ACTIVATION == "gelu":
        return g * (1.0 + erf(g * 0.7071067811865476)) * 0.5 * u
    elif ACTIVATION == "gelu_tanh":
        return g * sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g)) * u
    else:
        tl.static_assert(ACTIVATION == "clamped_swiglu")
        g = tl.where(g > 7.0, 7.0, g)  # what is no number stays none
        u = tl.where(u > 7.0, 7.0, tl.where(u < -7.0, -7.0, u))
        return g * sigmoid(1.702 * g) * (u + 1.0)


@triton.jit
def _gated(
    x_ptr,  # [rows, 2 · WIDTH], gate first
    y_ptr,  # [rows, WIDTH]
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Part of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < WIDTH
    g = tl.load(x_ptr + row * 2 * WIDTH + offs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + row * 2 * WIDTH + WIDTH + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * WIDTH + offs, round_to(gate(g, u, ACTIVATION), y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_codes(
    x_ptr,  # [rows, 2 · WIDTH], gate first
    codes_ptr,  # int8 or float8 [rows, WIDTH]
    scales_ptr,  # float32 [rows]
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < WIDTH
    g = tl.load(x_ptr + row * 2 * WIDTH + offs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + row * 2 * WIDTH + WIDTH + offs, mask=mask, other=0.0).to(tl.float32)
    y = tl.where(mask, gate(g, u, ACTIVATION), 0.0)
    scale, inverse = row_scale(largest_of(y), codes_ptr.dtype.element_ty)
    tl.store(scales_ptr + row, scale)
    tl.store(codes_ptr + row * WIDTH + offs, to_codes(y, inverse, codes_ptr.dtype.element_ty), mask=mask)


def gated(x: Tensor, activation: str, out: Tensor) -> None:
    """Write act(gate) · up.

    Args:
        x: [rows, 2·width], contiguous, gate first.
        activation: one of ACTIVATIONS.
        out: [rows, width], contiguous.
    """
    rows, width = out.shape
    chosen = config("gated", rows)
    launch(
        _gated,
        (rows, triton.cdiv(width, chosen["BLOCK"])),
        x,
        out,
        WIDTH=width,
        ACTIVATION=activation,
        **chosen,
    )


def gated_codes(x: Tensor, activation: str, codes: Tensor, scales: Tensor) -> None:
    """Write act(gate) · up as codes.

    Args:
        x: [rows, 2·width], contiguous, gate first.
        activation: one of ACTIVATIONS.
        codes: int8 or float8_e4m3fn [rows, width], contiguous.
        scales: float32 [rows].

    Raises:
        ValueError: a row is too long for one program.
        Unsupported: the device has no numbers of the codes' type.
    """
    check_codes(codes.dtype)
    rows, width = codes.shape
    if width > WIDEST:
        raise ValueError(f"a row of {width} numbers; at most {WIDEST}")
    launch(
        _gated_codes,
        (rows,),
        x,
        codes,
        scales,
        WIDTH=width,
        ACTIVATION=activation,
        BLOCK=triton.next_power_of_2(width),
        **config("gated_codes", width),
    )


def reference(x: Tensor, activation: str) -> Tensor:
    """In float64."""
    return ReferenceBackend(torch.float64).gated(x.double(), activation)


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Every activation to numbers and to codes."""
    if scale == MODEL:
        for rows in (1, 16, 256, 4096):
            yield _case(draw, "silu", torch.bfloat16, rows, 14336)
        for codes in (torch.int8, torch.float8_e4m3fn):
            yield _codes_case(draw, "silu", codes, 256, 14336)
        for activation in ACTIVATIONS[1:]:
            yield _case(draw, activation, torch.bfloat16, 256, 8192)
        return
    for activation in ACTIVATIONS:
        yield _case(draw, activation, torch.bfloat16, 3, 1025)
        yield _case(draw, activation, torch.float32, 2, 40)
        yield _codes_case(draw, activation, torch.int8, 3, 100)
    yield _codes_case(draw, "silu", torch.float8_e4m3fn, 2, 64)
    yield _case(draw, "silu", torch.float16, 1, 1)


def _case(draw: Draw, activation: str, dtype: torch.dtype, rows: int, width: int) -> Case:
    x = draw.normal(rows, 2 * width, dtype=dtype, scale=3.0)

    def run() -> tuple[Tensor, ...]:
        out = x.new_empty(rows, width)
        gated(x, activation, out)
        return (out,)

    def expected() -> tuple[Expected, ...]:
        return (expect(reference(x, activation), dtype),)

    return Case(f"{activation} {rows} x {width} {dtype}", run, expected, x.nbytes * 3 // 2)


def _codes_case(draw: Draw, activation: str, dtype: torch.dtype, rows: int, width: int) -> Case:
    x = draw.normal(rows, 2 * width, scale=3.0)

    def run() -> tuple[Tensor, ...]:
        codes, scales = x.new_empty(rows, width, dtype=dtype), x.new_empty(rows, 1, dtype=torch.float32)
        gated_codes(x, activation, codes, scales)
        return (codes.double() * scales.double(),)

    def expected() -> tuple[Expected, ...]:
        return (expect_codes(reference(x, activation), dtype),)

    return Case(f"{activation} to {dtype} {rows} x {width}", run, expected, x.nbytes + rows * width)
