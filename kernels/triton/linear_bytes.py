"""Products with matrices of bytes and inputs as they are (W8A16): whole numbers or e4m3, of few rows and of more.

    y[m, n] = Σ over groups g of scale[g, n] · Σ over k in g of (q[n, k] - zero[g, n]) · x[m, k]

Built as the products with four bits: weights go from memory through registers into the tensor cores, scales
multiply float32 sums, and a zero times the sum of the inputs is taken off a group's sum. Bytes of e4m3 are decoded
bit by bit, so that devices without e4m3 multiply them as well.

Source: as `linear_int4`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed import Packed, dequantise
from kernels.triton.case import MODEL, Case, Draw, Expected, expect
from kernels.triton.configs import config
from kernels.triton.decode import small_float, whole_byte
from kernels.triton.lang import dot, round_to
from kernels.triton.launch import launch
from kernels.triton.layout import byte_columns, split_size
from kernels.triton.scratch import Scratch
from kernels.triton.split import add_parts, sum_of_inputs, write_tile
from kernels.triton.weights import Fp8, Int8, prepare_matrix

MUST = {"bytes_few": {"no-i2f"}, "bytes_many": {"wgmma", "no-i2f"}}

FEW = 8
"""Rows up to which a program's warps share the columns."""


@triton.jit
def _numbers(codes, IS_FLOAT: tl.constexpr, dtype: tl.constexpr):
    """Codes as numbers; of e4m3 2^-8 of them."""
    if IS_FLOAT:
        return small_float(codes, dtype)
    else:
        return whole_byte(codes, dtype)


@triton.jit
def _scales(scales_ptr, at, IS_FLOAT: tl.constexpr):
    if IS_FLOAT:
        return tl.load(scales_ptr + at) * 256.0
    else:
        return tl.load(scales_ptr + at)


@triton.jit
def _add_block(acc, codes, x, at, scales_ptr, zeros_ptr, IS_FLOAT: tl.constexpr):
    """acc, and what columns of one group add: codes [..., outputs, columns], x [..., columns, rows]."""
    part = dot(_numbers(codes, IS_FLOAT, x.dtype), x, tl.zeros(acc.shape, tl.float32))
    if zeros_ptr is not None:
        part -= tl.expand_dims(tl.load(zeros_ptr + at), -1) * sum_of_inputs(x)
    return acc + part * tl.expand_dims(_scales(scales_ptr, at, IS_FLOAT), -1)


@triton.jit
def _codes(ptrs, real, ALL: tl.constexpr, POLICY: tl.constexpr = ""):
    """Codes; unless all columns are real nothing is asked of those that are not."""
    if ALL:
        return tl.load(ptrs, eviction_policy=POLICY)
    else:
        return tl.load(ptrs, mask=real, other=0)


@triton.jit(do_not_specialize=["rows"])
def _bytes_few(
    x_ptr,  # [rows, K]
    codes_ptr,  # int8, or uint8 bits of e4m3 [N, K]
    scales_ptr,  # float32 [G, N / ROWS]
    zeros_ptr,  # float32 [G, N], or none
    bias_ptr,  # float32 [N], or none
    out_ptr,  # [rows, STRIDE], or, where that is 0, float32 [splits, rows, N] without bias
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    STRIDE: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WAYS: tl.constexpr,
):
    """BLOCK_N outputs of BLOCK_M rows over SPLIT blocks of columns a program."""
    ALL: tl.constexpr = SPLIT % WAYS == 0 and K % (SPLIT * BLOCK_K) == 0
    split = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    held_n = tl.minimum(offs_n, N - 1)
    offs_w = (split * SPLIT + tl.arange(0, WAYS)[:, None]) * BLOCK_K
    code_ptrs = codes_ptr + held_n.to(tl.int64)[None, :, None] * K
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, None, :] * K
    acc = tl.zeros([WAYS, BLOCK_N, BLOCK_M], tl.float32)
    for first in tl.range(0, SPLIT * BLOCK_K, WAYS * BLOCK_K):
        k = offs_w + first + tl.arange(0, BLOCK_K)[None, :]
        real = k < tl.minimum(K, (split + 1) * (SPLIT * BLOCK_K))
        codes = _codes(code_ptrs + k[:, None, :], real[:, None, :], ALL, "evict_first")
        mask = (offs_m < rows)[None, None, :]
        x = tl.load(x_ptrs + k[:, :, None], mask=mask if ALL else mask & real[:, :, None], other=0.0)
        group = tl.minimum((offs_w + first) // GROUP, (K + GROUP - 1) // GROUP - 1)
        at = group * (N // ROWS) + (held_n // ROWS)[None, :]
        acc = _add_block(acc, codes, x, at, scales_ptr, zeros_ptr, IS_FLOAT)
    write_tile(tl.sum(acc, axis=0), offs_n, offs_m, bias_ptr, out_ptr, rows, split, N, STRIDE)


@triton.jit(do_not_specialize=["rows"])
def _bytes_many(
    x_ptr,  # [rows, K]
    codes_ptr,  # int8, or uint8 bits of e4m3 [N, K]
    scales_ptr,  # float32 [G, N / ROWS]
    zeros_ptr,  # float32 [G, N], or none
    bias_ptr,  # float32 [N], or none
    out_ptr,  # [rows, STRIDE], or, where that is 0, float32 [splits, rows, N] without bias
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    STRIDE: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N outputs of BLOCK_M rows over SPLIT blocks of columns a program, block after block."""
    IN_GROUPS: tl.constexpr = GROUP < K or zeros_ptr is not None
    split = tl.program_id(2)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    held_n, mask_m = tl.minimum(offs_n, N - 1), (offs_m < rows)[None, :]
    code_ptrs = codes_ptr + held_n.to(tl.int64)[:, None] * K
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in tl.range(split * SPLIT, tl.minimum((split + 1) * SPLIT, (K + BLOCK_K - 1) // BLOCK_K)):
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        codes = _codes(code_ptrs + offs_k[None, :], (offs_k < K)[None, :], K % BLOCK_K == 0)
        mask = mask_m if K % BLOCK_K == 0 else mask_m & (offs_k < K)[:, None]
        x = tl.load(x_ptrs + offs_k[:, None], mask=mask, other=0.0)
        if IN_GROUPS:
            at = tl.minimum((step * BLOCK_K) // GROUP, (K + GROUP - 1) // GROUP - 1) * (N // ROWS) + held_n // ROWS
            acc = _add_block(acc, codes, x, at, scales_ptr, zeros_ptr, IS_FLOAT)
        else:
            acc = dot(_numbers(codes, IS_FLOAT, x.dtype), x, acc)
    if not IN_GROUPS:
        acc *= _scales(scales_ptr, held_n // ROWS, IS_FLOAT)[:, None]
    write_tile(acc, offs_n, offs_m, bias_ptr, out_ptr, rows, split, N, STRIDE)


@triton.jit(do_not_specialize=["first", "last"])
def _bytes_plain(
    codes_ptr,  # int8, or uint8 bits of e4m3 [N, K]
    scales_ptr,  # float32 [G, N / ROWS]
    zeros_ptr,  # float32 [G, N], or none
    out_ptr,  # [last - first, K]
    first,
    last,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The plain numbers of a block of columns of BLOCK_N rows, from row `first` on, a program."""
    offs_n = first + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    at_n = offs_n.to(tl.int64)[:, None]
    mask = (offs_n < last)[:, None] & (offs_k < K)[None, :]
    w = _numbers(tl.load(codes_ptr + at_n * K + offs_k[None, :], mask=mask, other=0), IS_FLOAT, tl.float32)
    at = (offs_k // GROUP)[None, :] * (N // ROWS) + (offs_n // ROWS)[:, None]
    if zeros_ptr is not None:
        w -= tl.load(zeros_ptr + at, mask=mask, other=0.0)
    scale = tl.load(scales_ptr + at, mask=mask, other=0.0) * (256.0 if IS_FLOAT else 1.0)
    tl.store(
        out_ptr + (at_n - first) * K + offs_k[None, :], round_to(w * scale, out_ptr.dtype.element_ty), mask=mask
    )


def few(
    x: Tensor, weight: Int8 | Fp8, bias: Tensor | None, out: Tensor, scratch: Scratch, *, whole: bool = False
) -> None:
    """x · weightᵀ + bias, fastest where rows are at most FEW.

    Args:
        x: [rows, K], contiguous.
        weight: without `order`.
        bias: float32 [N].
        out: [rows, N], of any row stride.
        scratch: for the sums of splits.
        whole: in one configuration whatever the rows are, and unsplit, so that scratch is not needed.
    """
    n, columns = len(weight.codes), _columns(x, weight)
    settings = config(("bytes_fixed" if whole else "bytes_few") + _suffix(x), n)
    settings |= {"WAYS": settings["num_warps"], "BLOCK_K": columns}
    blocks, steps = triton.cdiv(n, settings["BLOCK_N"]), triton.cdiv(weight.codes.shape[1], columns)
    settings["SPLIT"] = steps if whole else split_size(blocks, steps, settings["num_warps"])
    grid = (blocks, triton.cdiv(steps, settings["SPLIT"]), triton.cdiv(len(x), settings["BLOCK_M"]))
    _start(_bytes_few, grid, grid[1], x, weight, bias, out, scratch, settings)


def many(x: Tensor, weight: Int8 | Fp8, bias: Tensor | None, out: Tensor, scratch: Scratch) -> None:
    """The same for more rows, in tiles that depend on how many; arguments as of `few`."""
    n, columns = len(weight.codes), _columns(x, weight)
    settings = config("bytes_many" + _suffix(x), len(x)) | {"BLOCK_K": columns}
    tiles = triton.cdiv(len(x), settings["BLOCK_M"]), triton.cdiv(n, settings["BLOCK_N"])
    steps = triton.cdiv(weight.codes.shape[1], columns)
    settings["SPLIT"] = split_size(tiles[0] * tiles[1], steps, 4)
    grid = (*tiles, triton.cdiv(steps, settings["SPLIT"]))
    _start(_bytes_many, grid, grid[2], x, weight, bias, out, scratch, settings)


def _suffix(x: Tensor) -> str:
    return "_float32" if x.dtype is torch.float32 else ""


def _columns(x: Tensor, weight: Int8 | Fp8) -> int:
    """Multiplied at once: of float32 numbers, which no tensor core takes, few."""
    columns = byte_columns(weight.codes.shape[1], weight.group)
    return min(32, columns) if x.dtype is torch.float32 else columns


def constants_of(weight: Int8 | Fp8) -> tuple[Tensor, Tensor | None, dict[str, int]]:
    """Codes as bytes, zeros, and what a kernel has of the form as constants."""
    n, k = weight.codes.shape
    constants = {"N": n, "K": k, "GROUP": weight.group}
    if isinstance(weight, Fp8):
        return (
            weight.codes.view(torch.uint8),
            None,
            constants | {"ROWS": weight.rows, "IS_FLOAT": True},
        )
    return (
        weight.codes,
        weight.zeros,
        constants | {"ROWS": 1, "IS_FLOAT": False},
    )


def _start(
    kernel: object,
    grid: tuple[int, ...],
    splits: int,
    x: Tensor,
    weight: Int8 | Fp8,
    bias: Tensor | None,
    out: Tensor,
    scratch: Scratch,
    settings: dict[str, int],
) -> None:
    codes, zeros, constants = constants_of(weight)
    parts = scratch.take((splits, len(x), len(codes)), torch.float32) if splits > 1 else None
    launch(
        kernel,
        grid,
        x,
        codes,
        weight.scales,
        zeros,
        bias if parts is None else None,
        out if parts is None else parts,
        len(x),
        STRIDE=out.stride(0) if parts is None else 0,
        **constants,
        **settings,
    )
    if parts is not None:
        add_parts(parts, bias, out)


def plain(weight: Int8 | Fp8, rows: range, out: Tensor) -> None:
    """Write the numbers of some rows, whose columns stay in their order.

    Args:
        weight: of which.
        rows: which, one after another.
        out: [len(rows), K], contiguous.
    """
    codes, zeros, constants = constants_of(weight)
    settings = config("bytes_plain", len(rows))
    grid = (triton.cdiv(len(rows), settings["BLOCK_N"]), triton.cdiv(codes.shape[1], settings["BLOCK_K"]))
    launch(_bytes_plain, grid, codes, weight.scales, zeros, out, rows.start, rows.stop, **constants, **settings)


def draw_matrix(draw: Draw, n: int, k: int, rows: int, group: int, kind: str) -> Packed:
    """A matrix of bytes: "signed", "zeros" or "float"."""
    shape = (triton.cdiv(n, rows), triton.cdiv(k, group))
    codes, scales, zeros = draw.integers(-128, 128, n, k), draw.uniform(0.5, 1.5, *shape) / 1024, None
    if kind == "zeros":
        codes, zeros = draw.integers(0, 256, n, k, dtype=torch.uint8), draw.uniform(100.0, 150.0, *shape)
    elif kind == "float":
        codes = draw.normal(n, k, dtype=torch.float8_e4m3fn, scale=64.0)
    return Packed(codes, scales, rows, group, 8, zeros)


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Both kinds of bytes, every kind of group; few rows, more, and made plain."""
    if scale == MODEL:
        sizes = [
            (1, 4096, 4096, 1, 4096, "signed"),
            (1, 4096, 4096, 1, 4096, "float"),
            (1, 128256, 4096, 1, 4096, "signed"),
        ]
        sizes += [(16, 4096, 4096, 1, 4096, "signed"), (64, 4096, 14336, 128, 128, "float")]
    else:
        sizes = [(1, 70, 600, 1, 600, "signed"), (2, 33, 256, 1, 64, "zeros"), (3, 256, 384, 128, 128, "float")]
        sizes += [(17, 33, 2600, 33, 2600, "float"), (20, 70, 256, 1, 32, "zeros"), (9, 40, 512, 1, 512, "signed")]
        sizes += [(1, 5, 37, 1, 37, "zeros"), (9, 5, 37, 1, 37, "signed")]
    for rows, n, k, shared, group, kind in sizes:
        matrix, x = draw_matrix(draw, n, k, shared, group, kind), draw.normal(rows, k)
        bias = draw.normal(n, dtype=torch.float32) if rows % 2 else None
        yield _product(few if rows <= FEW else many, x, matrix, bias, kind)
    x = draw.normal(2, 256, dtype=torch.float32)
    yield _product(few, x, draw_matrix(draw, 32, 256, 1, 256, "float"), None, "float")
    for kind in ("zeros", "float"):
        yield _made_plain(draw, *((8192, 4096) if scale == MODEL else (33, 200)), kind)


def _product(launcher: Callable[..., None], x: Tensor, matrix: Packed, bias: Tensor | None, kind: str) -> Case:
    weight, (n, k) = cast(Int8 | Fp8, prepare_matrix(matrix, x.dtype, x.device)), matrix.shape

    def run() -> tuple[Tensor, ...]:
        out = x.new_empty(len(x), n)
        launcher(x, weight, bias, out, Scratch(x.new_empty(2**25, dtype=torch.uint8)))
        return (out,)

    def expected() -> tuple[Expected, ...]:
        return (expect(reference(x, matrix, bias), x.dtype),)

    name = f"{launcher.__name__} {len(x)} x {n} x {k} scales of {matrix.rows} x {matrix.columns} {kind} {x.dtype}"
    return Case(
        name, run, expected, x.nbytes + weight.codes.nbytes + 2 * len(x) * n, 2 * len(x) * n * k, "bfloat16"
    )


def reference(x: Tensor, matrix: Packed, bias: Tensor | None) -> Tensor:
    """In float64."""
    y = x.double() @ dequantise(matrix).double().T
    return y if bias is None else y + bias.double()


def _made_plain(draw: Draw, n: int, k: int, kind: str) -> Case:
    matrix = draw_matrix(draw, n, k, 1, k if k < 4096 else 128, kind)
    weight, rows = cast(Int8 | Fp8, prepare_matrix(matrix, torch.bfloat16, draw.device)), range(1, n)

    def run() -> tuple[Tensor, ...]:
        out = torch.empty(len(rows), k, dtype=torch.bfloat16, device=draw.device)
        plain(weight, rows, out)
        return (out,)

    def expected() -> tuple[Expected, ...]:
        return (expect(dequantise(matrix)[rows.start : rows.stop], torch.bfloat16),)

    return Case(f"plain {n} x {k} {kind}", run, expected, weight.codes.nbytes + 2 * len(rows) * k)
