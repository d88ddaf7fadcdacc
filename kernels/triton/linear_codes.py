"""Products of codes with codes (W8A8): whole numbers summed exactly, or e4m3 whose sums are promoted every 128.

    y[m, n] = Σ over groups g of x_scale[g, m] · w_scale[g, n] · Σ over k in g of x[m, k] · q[n, k]

Hopper's tensor cores keep 14 bits of a running sum of e4m3 products, so each sum of 128 is added to float32
numbers outside of them. Where both have one scale a row, cuBLAS multiplies.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, 3.3.2 (promotion; scales of 128 and 128 x 128).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed import Packed, dequantise
from kernels.triton.case import MODEL, Case, Draw, Expected, expect
from kernels.triton.configs import config
from kernels.triton.inputs import BLOCK, Rounded
from kernels.triton.lang import dot
from kernels.triton.launch import is_recording, launch
from kernels.triton.layout import byte_columns
from kernels.triton.linear_bytes import draw_matrix
from kernels.triton.quantise import check_codes, quantise
from kernels.triton.split import write_tile
from kernels.triton.weights import Fp8, Int8, prepare_matrix

MUST = {"codes_product": {"wgmma"}}

_CUBLAS_UNIT = 16


@triton.jit
def _sum(w, x, acc):
    """acc + w · x of codes: int32 of int8, float32 of e4m3."""
    if w.dtype == tl.int8:
        return tl.dot(w, x, acc, out_dtype=tl.int32)
    else:
        return dot(w, x, acc)


@triton.jit
def _read(ptrs, real, REST: tl.constexpr):
    """Codes; where columns fill no whole block, nothing is asked of those that are not real."""
    if REST == 0:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=real, other=0.0)


@triton.jit
def _grown(total, w, x):
    """total + w · x; of e4m3 each block is added up by itself, as the tensor cores keep few bits of long sums."""
    if total.dtype == tl.int32:
        return _sum(w, x, total)
    else:
        return total + _sum(w, x, tl.zeros(total.shape, tl.float32))


@triton.jit
def _sum_of_group(w, x, acc, x_scales_ptr, scales_ptr, at, at_x, KIND: tl.constexpr, IN_BLOCKS: tl.constexpr):
    """acc, and what columns of one group add, with the scales of outputs and, in blocks, of rows."""
    part = _sum(w, x, tl.zeros(acc.shape, KIND)).to(tl.float32)
    if IN_BLOCKS:
        part *= tl.load(x_scales_ptr + at_x)[None, :]
    return acc + part * tl.load(scales_ptr + at)[:, None]


@triton.jit(do_not_specialize=["rows"])
def _codes_product(
    x_ptr,  # int8 or e4m3 [rows, K]
    x_scales_ptr,  # float32 [rows], or [K / 128, rows]
    codes_ptr,  # int8 or e4m3 [N, K]
    scales_ptr,  # float32 [G, N / ROWS]
    bias_ptr,  # float32 [N], or none
    out_ptr,  # [rows, STRIDE]
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    IN_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N outputs of BLOCK_M rows a program."""
    KIND: tl.constexpr = tl.int32 if codes_ptr.dtype.element_ty == tl.int8 else tl.float32
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    held_m, held_n = tl.minimum(offs_m, rows - 1), tl.minimum(offs_n, N - 1)
    code_ptrs = codes_ptr + held_n.to(tl.int64)[:, None] * K
    x_ptrs = x_ptr + held_m.to(tl.int64)[None, :] * K
    acc, total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32), tl.zeros([BLOCK_N, BLOCK_M], KIND)
    for k in tl.range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        w = _read(code_ptrs + offs_k[None, :], (offs_k < K)[None, :], K % BLOCK_K)
        x = _read(x_ptrs + offs_k[:, None], (offs_k < K)[:, None], K % BLOCK_K)
        if GROUP < K or IN_BLOCKS:
            at = tl.minimum(k // GROUP, (K + GROUP - 1) // GROUP - 1) * (N // ROWS) + held_n // ROWS
            at_x = (k // 128) * rows + held_m
            acc = _sum_of_group(w, x, acc, x_scales_ptr, scales_ptr, at, at_x, KIND, IN_BLOCKS)
        else:
            total = _grown(total, w, x)
    if not (GROUP < K or IN_BLOCKS):
        acc = total.to(tl.float32) * tl.load(scales_ptr + held_n // ROWS)[:, None]
    if not IN_BLOCKS:
        acc *= tl.load(x_scales_ptr + held_m)[None, :]
    write_tile(acc, offs_n, offs_m, bias_ptr, out_ptr, rows, 0, N, STRIDE)


def multiply(
    x: Rounded, weight: Int8 | Fp8, bias: Tensor | None, out: Tensor, *, deterministic: bool = False
) -> None:
    """x · weightᵀ + bias.

    Args:
        x: codes of the kind of the matrix's [rows, K].
        weight: without `order` and zeros.
        bias: float32 [N].
        out: [rows, N], of any row stride.
        deterministic: a row's bits are the same whatever the other rows are.

    Raises:
        Unsupported: the device lacks e4m3.
    """
    if not deterministic and _is_for_cublas(x, weight, out):
        _with_cublas(x, weight, bias, out)
    else:
        own(x, weight, bias, out, deterministic=deterministic)


def own(x: Rounded, weight: Int8 | Fp8, bias: Tensor | None, out: Tensor, *, deterministic: bool = False) -> None:
    """The same in this file's kernel, whatever the scales are."""
    check_codes(weight.codes.dtype)
    (n, k), rows = weight.codes.shape, len(x.codes)
    in_groups = weight.group < k or x.scales.dim() == 2
    many = "codes_product_in_groups" if in_groups else "codes_product"
    settings = config("codes_product_fixed" if deterministic else many, rows)
    launch(
        _codes_product,
        (triton.cdiv(rows, settings["BLOCK_M"]), triton.cdiv(n, settings["BLOCK_N"])),
        x.codes,
        x.scales,
        weight.codes,
        weight.scales,
        bias,
        out,
        rows,
        N=n,
        K=k,
        GROUP=weight.group,
        ROWS=weight.rows if isinstance(weight, Fp8) else 1,
        STRIDE=out.stride(0),
        IN_BLOCKS=x.scales.dim() == 2,
        BLOCK_K=min(BLOCK, byte_columns(k, weight.group)),
        **settings,
    )


def _is_for_cublas(x: Rounded, weight: Int8 | Fp8, out: Tensor) -> bool:
    """cuBLAS takes e4m3 with a scale for each row of both, sizes of whole units, and gives bfloat16 [rows, N]."""
    if not isinstance(weight, Fp8) or weight.rows != 1 or weight.scales.shape[0] != 1 or x.scales.dim() != 1:
        return False
    whole = all(size % _CUBLAS_UNIT == 0 for size in weight.codes.shape)
    return whole and out.dtype is torch.bfloat16 and out.is_contiguous()


def _with_cublas(x: Rounded, weight: Int8 | Fp8, bias: Tensor | None, out: Tensor) -> None:
    check_codes(weight.codes.dtype)
    if is_recording():
        return
    rounded = None if bias is None else bias.to(out.dtype)
    torch._scaled_mm(
        x.codes, weight.codes.t(), x.scales[:, None], weight.scales, bias=rounded, out_dtype=out.dtype, out=out
    )


def reference(x: Tensor, matrix: Packed, bias: Tensor | None) -> Tensor:
    """In float64, of inputs as their codes have them."""
    y = x.double() @ dequantise(matrix).double().T
    return y if bias is None else y + bias.double()


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Both kinds of codes; scales by row, by group and by block."""
    if scale == MODEL:
        sizes = [(16, 4096, 4096, 1, 4096, "signed", False), (512, 4096, 4096, 1, 4096, "signed", False)]
        sizes += [(16, 4096, 4096, 128, 128, "float", True), (512, 4096, 4096, 128, 128, "float", True)]
        sizes += [(512, 4096, 4096, 1, 4096, "float", False)]
    else:
        sizes = [(1, 70, 600, 1, 600, "signed", False), (3, 33, 256, 1, 64, "signed", False)]
        sizes += [(5, 128, 384, 128, 128, "float", True), (17, 33, 300, 33, 300, "float", False)]
    for rows, n, k, shared, group, kind, in_blocks in sizes:
        yield _case(draw, rows, draw_matrix(draw, n, k, shared, group, kind), in_blocks)


def _case(draw: Draw, rows: int, matrix: Packed, in_blocks: bool) -> Case:
    weight, (n, k) = cast(Int8 | Fp8, prepare_matrix(matrix, torch.bfloat16, draw.device)), matrix.shape
    x, bias = draw.normal(rows, k), draw.normal(n, dtype=torch.float32) if rows % 2 else None
    dtype, each = weight.codes.dtype, BLOCK if in_blocks else k
    some = [_codes(part, dtype) for part in x.split(each, 1)]
    codes = torch.cat([one[0].view(torch.uint8) for one in some], 1).view(dtype)
    scales = torch.cat([one[1] for one in some], 1).float().t().contiguous()
    inputs = Rounded(codes, scales if in_blocks else scales[0])

    def run() -> tuple[Tensor, ...]:
        out = x.new_empty(rows, n)
        own(inputs, weight, bias, out)
        return (out,)

    def expected() -> tuple[Expected, ...]:
        plain = codes.double() * scales.t().double().repeat_interleave(each, 1)[:, :k]
        return (expect(reference(plain, matrix, bias), torch.bfloat16),)

    arithmetic = "int8" if dtype is torch.int8 else "float8"
    name = f"{arithmetic} {rows} x {n} x {k} scales of {matrix.rows} x {matrix.columns}, inputs by {each}"
    return Case(name, run, expected, rows * k + n * k + 2 * rows * n, 2 * rows * n * k, arithmetic)


def _codes(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if x.is_meta:
        return torch.empty_like(x, dtype=dtype), x.new_empty(len(x), 1)
    return quantise(x.double(), dtype)
