"""Adding up products whose columns were split among programs, always in the same order.

y[m, n] = bias[n] + Σ over splits s of part[s, m, n]
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


@triton.jit
def sum_of_inputs(x):
    """Of each row, [..., 1, rows], of inputs [..., columns, rows]: what a zero point is multiplied by."""
    return tl.sum(x.to(tl.float32), axis=len(x.shape) - 2, keep_dims=True)


@triton.jit
def write_tile(
    y,  # float32 [BLOCK_N, BLOCK_M]: outputs of rows, one row a column
    offs_n,
    offs_m,
    bias_ptr,  # float32 [N], or none
    out_ptr,  # [rows, STRIDE], or, where that is 0, float32 [splits, rows, N]
    rows,
    split,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Write what is real of a tile, with its bias, or as the part of one split."""
    mask_n = offs_n < N
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    at_row = offs_m.to(tl.int64) * STRIDE if STRIDE > 0 else (split * rows + offs_m).to(tl.int64) * N
    mask = mask_n[:, None] & (offs_m < rows)[None, :]
    tl.store(out_ptr + at_row[None, :] + offs_n[:, None], round_to(y, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _add_parts(
    parts_ptr,  # float32 [SPLITS, rows, N]
    bias_ptr,  # float32 [N], or none
    out_ptr,  # [rows, STRIDE]
    rows,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Part of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    y = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        y = tl.load(bias_ptr + offs, mask=mask, other=0.0)
    for split in tl.static_range(SPLITS):
        y += tl.load(parts_ptr + (split * rows + row) * N + offs, mask=mask, other=0.0)
    tl.store(out_ptr + row * STRIDE + offs, round_to(y, out_ptr.dtype.element_ty), mask=mask)


def add_parts(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the sum over splits, and the bias.

    Args:
        parts: float32 [splits, rows, n], contiguous.
        bias: float32 [n].
        out: [rows, n], of any row stride.
    """
    splits, rows, n = parts.shape
    settings = config("add_parts", n)
    launch(
        _add_parts,
        (rows, triton.cdiv(n, settings["BLOCK"])),
        parts,
        bias,
        out,
        rows,
        N=n,
        SPLITS=splits,
        STRIDE=out.stride(0),
        HAS_BIAS=bias is not None,
        **settings,
    )


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """With a bias and without."""
    sizes = [(4, 16, 4096)] if scale == MODEL else [(3, 2, 70), (1, 1, 16)]
    for splits, rows, n in sizes:
        parts = draw.normal(splits, rows, n, dtype=torch.float32)
        bias = draw.normal(n, dtype=torch.float32) if rows > 1 else None
        yield _case(f"add_parts {splits} x {rows} x {n}", parts, bias)


def _case(name: str, parts: Tensor, bias: Tensor | None) -> Case:
    def run() -> tuple[Tensor, ...]:
        out = parts.new_empty(parts.shape[1:], dtype=torch.bfloat16)
        add_parts(parts, bias, out)
        return (out,)

    def expected() -> tuple[Expected, ...]:
        exact = parts.double().sum(0)
        return (expect(exact if bias is None else exact + bias.double(), torch.bfloat16),)

    return Case(name, run, expected, parts.nbytes)
