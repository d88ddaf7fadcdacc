"""RMS norms, with the residual added before and the result rounded to codes behind, in one pass over a row.

    s = x · scale + residual;  y = s / sqrt(mean(s²) + eps) · weight

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.case import MODEL, Case, Draw, Expected, expect
from kernels.triton.configs import config
from kernels.triton.lang import round_to
from kernels.triton.launch import launch
from kernels.triton.quantise import check_codes, expect_codes, largest_of, row_scale, to_codes

WIDEST = 32768  # numbers of a row, which one program holds


@triton.jit
def _rms_norm(
    x_ptr,  # [rows, WIDTH]
    residual_ptr,  # [rows, WIDTH] or none
    weight_ptr,  # float32 [WIDTH]
    total_ptr,  # [rows, WIDTH] or none: x · scale + residual
    y_ptr,  # [rows, WIDTH], numbers or codes
    scales_ptr,  # float32 [rows] of the codes, or none
    scale,
    eps,
    WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    TO_CODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < WIDTH
    at = row * WIDTH + offs
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x = x * scale + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rounded = round_to(x, total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps) * weight
    if TO_CODES:
        of_codes, inverse = row_scale(largest_of(y), y_ptr.dtype.element_ty)
        tl.store(scales_ptr + row, of_codes)
        tl.store(y_ptr + at, to_codes(y, inverse, y_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(y_ptr + at, round_to(y, y_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, scales: Tensor | None = None) -> None:
    """Write the norm of each row of x.

    Args:
        x: [rows, width], contiguous, as `out`.
        weight: float32 [width].
        eps: added under the root.
        out: as x; or int8 or float8_e4m3fn codes, where there are `scales`.
        scales: float32 [rows], of the codes.
    """
    _start(x, None, weight, None, out, 1.0, eps, scales)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    scale: float,
    total: Tensor,
    out: Tensor,
    scales: Tensor | None = None,
) -> None:
    """Write x·scale + residual to `total`, which may be `residual`, and the norm of what was written to `out`.

    Args:
        x: [rows, width], contiguous, as all but `weight`.
        residual: [rows, width].
        weight: float32 [width].
        eps: added under the root.
        scale: of x.
        total: [rows, width].
        out: [rows, width]; or int8 or float8_e4m3fn codes, where there are `scales`.
        scales: float32 [rows], of the codes.
    """
    _start(x, residual, weight, total, out, scale, eps, scales)


def _start(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    total: Tensor | None,
    out: Tensor,
    scale: float,
    eps: float,
    scales: Tensor | None,
) -> None:
    rows, width = x.shape
    check_codes(out.dtype)
    if width > WIDEST:
        raise ValueError(f"a row of {width} numbers; at most {WIDEST}")
    launch(
        _rms_norm,
        (rows,),
        x,
        residual,
        weight,
        total,
        out,
        scales,
        float(scale),
        eps,
        WIDTH=width,
        HAS_RESIDUAL=residual is not None,
        TO_CODES=scales is not None,
        BLOCK=triton.next_power_of_2(width),
        **config("rms_norm", width),
    )


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In float64."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Norms alone and with a residual, to numbers and to codes."""
    sizes = [(512, 4096), (1, 4096)] if scale == MODEL else [(3, 64), (1, 257), (2, 1)]
    for dtype in (torch.bfloat16, torch.float32):
        for rows, width in sizes:
            yield _plain(draw, dtype, rows, width)
            yield _added(draw, dtype, rows, width)
    for codes in (torch.int8, torch.float8_e4m3fn):
        for rows, width in sizes[:2]:
            yield _added(draw, torch.bfloat16, rows, width, codes)


def _plain(draw: Draw, dtype: torch.dtype, rows: int, width: int) -> Case:
    x, weight = draw.normal(rows, width, dtype=dtype), draw.normal(width, dtype=torch.float32)

    def run() -> tuple[Tensor, ...]:
        out = torch.empty_like(x)
        rms_norm(x, weight, 1e-5, out)
        return (out,)

    def expected() -> tuple[Expected, ...]:
        return (expect(reference(x, weight, 1e-5), dtype),)

    return Case(f"rms_norm {rows} x {width} {dtype}", run, expected, 2 * x.nbytes)


def _added(draw: Draw, dtype: torch.dtype, rows: int, width: int, codes: torch.dtype | None = None) -> Case:
    x, residual = draw.normal(rows, width, dtype=dtype), draw.normal(rows + 1, width, dtype=dtype, scale=3.0)[1:]
    weight = draw.normal(width, dtype=torch.float32)

    def run() -> tuple[Tensor, ...]:
        out, total = torch.empty_like(x, dtype=codes or dtype), torch.empty_like(x)
        scales = x.new_empty(rows, 1, dtype=torch.float32) if codes else None
        add_rms_norm(x, residual, weight, 1e-5, 0.5, total, out, scales)
        return total, out if scales is None else out.double() * scales.double()

    def expected() -> tuple[Expected, ...]:
        total = x.double() * 0.5 + residual.double()
        normed = reference(total.to(dtype), weight, 1e-5)
        return expect(total, dtype), expect_codes(normed, codes) if codes else expect(normed, dtype)

    name = f"add_rms_norm {rows} x {width} {dtype}" + (f" to {codes}" if codes else "")
    return Case(name, run, expected, 3 * x.nbytes + rows * width * (codes or dtype).itemsize)
