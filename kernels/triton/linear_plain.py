"""Products with plain matrices: cuBLAS's, or this file's own with one tile for any number of rows.

    y[m, n] = Σ over k of w[n, k] · x[m, k]

cuBLAS chooses by size how it sums; here every row's sum runs through the columns in one order, BLOCK_K after
BLOCK_K, so that its bits do not depend on what other rows there are.

Source: He et al., "Defeating Nondeterminism in LLM Inference", 2025 (batch invariance by fixed tiles).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.case import MODEL, Case, Draw, Expected, expect
from kernels.triton.configs import config
from kernels.triton.lang import dot
from kernels.triton.launch import is_recording, launch
from kernels.triton.split import write_tile

MUST = {"plain_product": {"wgmma"}}


@triton.jit(do_not_specialize=["rows"])
def _plain_product(
    x_ptr,  # [rows, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # float32 [N], or none
    out_ptr,  # [rows, STRIDE]
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N outputs of BLOCK_M rows a program."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    held_n = tl.minimum(offs_n, N - 1)
    mask_m = offs_m < rows
    w_ptrs = weight_ptr + held_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * K + offs_k[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        real = offs_k + k < K
        if K % BLOCK_K == 0:
            w = tl.load(w_ptrs + k)
            x = tl.load(x_ptrs + k, mask=mask_m[None, :], other=0.0)
        else:
            w = tl.load(w_ptrs + k, mask=real[None, :], other=0.0)
            x = tl.load(x_ptrs + k, mask=mask_m[None, :] & real[:, None], other=0.0)
        acc = dot(w, x, acc)
    write_tile(acc, offs_n, offs_m, bias_ptr, out_ptr, rows, 0, N, STRIDE)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, deterministic: bool = False) -> None:
    """x · weightᵀ + bias; cuBLAS's, but where it is to be deterministic or of another type than x.

    Args:
        x: [rows, K], contiguous.
        weight: [N, K], contiguous, of the type of x.
        bias: float32 [N].
        out: [rows, N], of any row stride; float32 of 16-bit inputs are logits and scores of experts.
        deterministic: a row's bits are the same whatever the other rows are.
    """
    if deterministic or out.dtype != x.dtype:
        own(x, weight, bias, out)
    elif not is_recording():
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias.to(out.dtype), x, weight.t(), out=out)


def own(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The same in this file's kernel."""
    (n, k), rows = weight.shape, len(x)
    settings = config("plain_product" + ("_float32" if x.dtype is torch.float32 else ""), 1)
    launch(
        _plain_product,
        (triton.cdiv(rows, settings["BLOCK_M"]), triton.cdiv(n, settings["BLOCK_N"])),
        x,
        weight,
        bias,
        out,
        rows,
        N=n,
        K=k,
        STRIDE=out.stride(0),
        **settings,
    )


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float64."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Every edge of a tile, with a bias and without."""
    sizes = [(1, 4096, 4096), (512, 28672, 4096)] if scale == MODEL else [(1, 70, 200), (67, 33, 64), (2, 16, 17)]
    for dtype in (torch.bfloat16, torch.float32):
        for rows, n, k in sizes:
            x, weight = draw.normal(rows, k, dtype=dtype), draw.normal(n, k, dtype=dtype, scale=0.02)
            yield _case(x, weight, draw.normal(n, dtype=torch.float32) if rows % 2 else None)


def _case(x: Tensor, weight: Tensor, bias: Tensor | None) -> Case:
    (n, k), rows = weight.shape, len(x)

    def run() -> tuple[Tensor, ...]:
        out = x.new_empty(rows, n)
        own(x, weight, bias, out)
        return (out,)

    def expected() -> tuple[Expected, ...]:
        return (expect(reference(x, weight, bias), x.dtype),)

    nbytes, arithmetic = x.nbytes + weight.nbytes + rows * n * x.itemsize, str(x.dtype).removeprefix("torch.")
    return Case(f"plain {rows} x {n} x {k} {x.dtype}", run, expected, nbytes, 2 * rows * n * k, arithmetic)
