"""Inputs of a product rounded to codes, with one scale a token, or one for each 128 numbers of a token.

    code = round(x / scale),  scale = max |x| / largest code

Source: Xiao et al., "SmoothQuant", ICML 2023 (by token); DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024
(by 128).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.case import MODEL, Case, Draw, Expected
from kernels.triton.configs import config
from kernels.triton.launch import launch
from kernels.triton.quantise import check_codes, expect_codes, largest_of, row_scale, to_codes
from kernels.triton.scratch import Scratch

BLOCK = 128
"""Numbers that share a scale where a token has many."""


class Rounded(NamedTuple):
    """Inputs as codes."""

    codes: Tensor  # int8 or float8_e4m3fn [rows, K]
    scales: Tensor  # float32 [rows], or [ceil(K / 128), rows]


@triton.jit(do_not_specialize=["rows"])
def _round_inputs(
    x_ptr,  # [rows, WIDTH]
    codes_ptr,  # [rows, WIDTH]
    scales_ptr,  # float32 [WIDTH / SHARE, rows]
    rows,
    WIDTH: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """SHARE numbers of one row a program."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs = part * SHARE + tl.arange(0, BLOCK)
    mask = offs < tl.minimum(WIDTH, (part + 1) * SHARE)
    x = tl.load(x_ptr + row * WIDTH + offs, mask=mask, other=0.0).to(tl.float32)
    scale, inverse = row_scale(largest_of(x), codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + row * WIDTH + offs, to_codes(x, inverse, codes_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + part * rows + row, scale)


def round_inputs(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Write codes and scales.

    Args:
        x: [rows, width], contiguous.
        codes: int8 or float8_e4m3fn, as x.
        scales: float32 [rows], or [ceil(width / 128), rows].

    Raises:
        Unsupported: the device has no numbers of the codes' type.
    """
    check_codes(codes.dtype)
    rows, width = x.shape
    share = width if scales.dim() == 1 else BLOCK
    launch(
        _round_inputs,
        (rows, triton.cdiv(width, share)),
        x,
        codes,
        scales,
        rows,
        WIDTH=width,
        SHARE=share,
        BLOCK=triton.next_power_of_2(share),
        **config("round_inputs", share),
    )


def rounded(x: Tensor, dtype: torch.dtype, in_blocks: bool, scratch: Scratch) -> Rounded:
    """x [rows, K] as codes of `dtype`, in scratch memory."""
    rows, width = x.shape
    shape = (triton.cdiv(width, BLOCK), rows) if in_blocks else (rows,)
    found = Rounded(scratch.take((rows, width), dtype), scratch.take(shape, torch.float32))
    round_inputs(x, *found)
    return found


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Both kinds of codes, by token and by 128 numbers."""
    sizes = [(512, 4096)] if scale == MODEL else [(3, 200), (1, 5)]
    for rows, width in sizes:
        for dtype in (torch.int8, torch.float8_e4m3fn):
            yield _case(draw, rows, width, dtype, False)
        yield _case(draw, rows, width, torch.float8_e4m3fn, True)


def _case(draw: Draw, rows: int, width: int, dtype: torch.dtype, in_blocks: bool) -> Case:
    x = draw.normal(rows, width)
    shares = triton.cdiv(width, BLOCK) if in_blocks else 1

    def run() -> tuple[Tensor, ...]:
        codes, scales = torch.empty_like(x, dtype=dtype), x.new_empty(shares, rows, dtype=torch.float32)
        round_inputs(x, codes, scales if in_blocks else scales[0])
        each = scales.repeat_interleave(BLOCK if in_blocks else width, 0)[:width]
        return (codes.float() * each.t(),)

    def expected() -> tuple[Expected, ...]:
        some = [expect_codes(part, dtype) for part in x.split(BLOCK if in_blocks else width, 1)]
        rounded = [one.rounded for one in some if one.rounded is not None]
        return (Expected(torch.cat([one.exact for one in some], 1), torch.cat(rounded, 1)),)

    kind = f"{dtype} {'by 128' if in_blocks else 'by token'}"
    return Case(f"round_inputs {rows} x {width} {kind}", run, expected, 3 * rows * width)
