"""Products with matrices of four bits and inputs as they are (W4A16): of few rows, more, and made plain for many.

    y[m, n] = Σ over groups g of scale[g, n] · Σ over k in g of (q[n, k] - zero[g, n]) · x[m, k]

Weights are the left factor: they go from memory through registers, where they are decoded, into the tensor cores;
the rows of x are the columns of the tile, of which 16 are enough. A code less a whole zero is exact, the
scale multiplies the float32 sum of a group, and so does what a zero is beside a whole number, times the sum of the
inputs: nothing is rounded but the answer. Of few rows each warp of a program takes every WAYS-th span of columns,
and the warps' sums are added at the end, in their order.

Source: Frantar et al., "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large Language Models", 2024
(4-bit products at the speed of memory to batches of 16 to 32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed import Packed, dequantise
from kernels.triton.case import MODEL, Case, Draw, Expected, expect
from kernels.triton.configs import config
from kernels.triton.decode import code, less, plane, raised, raised_by, whole_part
from kernels.triton.lang import dot, round_to
from kernels.triton.launch import is_recording, launch
from kernels.triton.layout import split_size
from kernels.triton.scratch import Scratch
from kernels.triton.split import add_parts, sum_of_inputs, write_tile
from kernels.triton.weights import PLANES, Int4, prepare_matrix

MUST = {"int4_few": {"no-i2f"}, "int4_many": {"wgmma", "no-i2f"}}

FEW = 8
"""Rows up to which a program's warps share the columns: more would be read more often than the codes."""

_LEAST_OUTPUTS = 32
"""Of a program over narrow spans with zeros: for fewer, zeros that are fractions spill registers."""


@triton.jit
def _weights(words, whole, table_ptr, P: tl.constexpr, HAS_ZEROS: tl.constexpr, dtype):
    """One plane, less the whole numbers next to its zeros."""
    if table_ptr is not None:
        return round_to(tl.load(table_ptr + code(words, P)), dtype)
    elif HAS_ZEROS:
        return less(raised(words, P, dtype), raised_by(whole, dtype))
    else:
        return plane(words, P, dtype)


@triton.jit
def _words(ptrs, real, ALL: tl.constexpr):
    """Codes that are read once; nothing is asked of spans that are not real."""
    if ALL:
        return tl.load(ptrs, eviction_policy="evict_first")
    else:
        return tl.load(ptrs, mask=real, other=0)


@triton.jit
def _scales(scales_ptr, zeros_ptr, at, HAS_FRACTIONS: tl.constexpr):
    """Scales, zeros, and the whole numbers next to these; where there are no zeros the latter mean nothing."""
    scale = tl.load(scales_ptr + at)
    zero = tl.load(zeros_ptr + at) if zeros_ptr is not None else scale
    return scale, zero, whole_part(zero) if HAS_FRACTIONS else zero


@triton.jit
def _add_span(
    acc,  # float32 [..., outputs, rows]
    words,  # int32 [..., outputs, WIDTH]
    x_ptrs,  # [..., WIDTH, rows]: inputs of the first plane
    mask,  # [..., 1, rows]: what is real of them
    offs_k,  # [..., WIDTH, 1]: their columns
    offs_n,  # [..., outputs]
    first,  # [..., 1], or a number: the first column
    scales_ptr,
    zeros_ptr,
    table_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    HAS_FRACTIONS: tl.constexpr,
):
    """acc, and what the eight planes of a span add to it."""
    for p in tl.static_range(8):
        if (p * WIDTH) % STEP == 0:
            at = tl.minimum((first + p * WIDTH) // GROUP, (K + GROUP - 1) // GROUP - 1) * N + offs_n
            scale, zero, whole = _scales(scales_ptr, zeros_ptr, at, HAS_FRACTIONS)
            part = tl.zeros(acc.shape, tl.float32)
        real = mask if K % (8 * WIDTH) == 0 else mask & (offs_k + p * WIDTH < K)
        x = tl.load(x_ptrs + p * WIDTH, mask=real, other=0.0)
        w = _weights(words, tl.expand_dims(whole, -1), table_ptr, p, zeros_ptr is not None, x.dtype)
        part = dot(w, x, part)
        if HAS_FRACTIONS:
            part += tl.expand_dims(whole - zero, -1) * sum_of_inputs(x)
        if ((p + 1) * WIDTH) % STEP == 0:
            acc += part * tl.expand_dims(scale, -1)
    return acc


@triton.jit(do_not_specialize=["rows"])
def _int4_few(
    x_ptr,  # [rows, K]
    codes_ptr,  # int32 [N, SPANS * WIDTH]
    scales_ptr,  # float32 [G, N]
    zeros_ptr,  # float32 [G, N], or none
    table_ptr,  # float32 [16], or none
    bias_ptr,  # float32 [N], or none
    out_ptr,  # [rows, STRIDE], or, where that is 0, float32 [splits, rows, N] without bias
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_FRACTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WAYS: tl.constexpr,
):
    """BLOCK_N outputs of BLOCK_M rows over SPLIT spans a program."""
    SPANS: tl.constexpr = (K + 8 * WIDTH - 1) // (8 * WIDTH)
    offs_w = tl.program_id(1) * SPLIT + tl.arange(0, WAYS)[:, None, None]
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    held_n = offs_n if N % BLOCK_N == 0 else tl.minimum(offs_n, N - 1)
    at_n = held_n.to(tl.int64)[None, :, None] * (SPANS * WIDTH)
    code_ptrs = codes_ptr + at_n + tl.arange(0, WIDTH)[None, None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, None, :] * K
    acc = tl.zeros([WAYS, BLOCK_N, BLOCK_M], tl.float32)
    for i in tl.range(0, (SPLIT + WAYS - 1) // WAYS):
        span = offs_w + i * WAYS
        real = span < tl.minimum(SPANS, (tl.program_id(1) + 1) * SPLIT)
        words = _words(code_ptrs + span * WIDTH, real, SPLIT % WAYS == 0 and SPANS % SPLIT == 0)
        offs_k = span * (8 * WIDTH) + tl.arange(0, WIDTH)[None, :, None]
        mask = (offs_m < rows)[None, None, :] & real
        first = tl.reshape(span, [WAYS, 1]) * (8 * WIDTH)
        acc = _add_span(acc, words, x_ptrs + offs_k, mask, offs_k, held_n[None, :], first, scales_ptr, zeros_ptr,
                        table_ptr, N, K, GROUP, WIDTH, STEP, HAS_FRACTIONS)  # fmt: skip
    write_tile(tl.sum(acc, axis=0), offs_n, offs_m, bias_ptr, out_ptr, rows, tl.program_id(1), N, STRIDE)


@triton.jit(do_not_specialize=["rows"])
def _int4_many(
    x_ptr,  # [rows, K]
    codes_ptr,  # int32 [N, SPANS * WIDTH]
    scales_ptr,  # float32 [G, N]
    zeros_ptr,  # float32 [G, N], or none
    table_ptr,  # float32 [16], or none
    bias_ptr,  # float32 [N], or none
    out_ptr,  # [rows, STRIDE], or, where that is 0, float32 [splits, rows, N] without bias
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_FRACTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """BLOCK_N outputs of BLOCK_M rows over SPLIT spans a program, span after span."""
    SPANS: tl.constexpr = (K + 8 * WIDTH - 1) // (8 * WIDTH)
    split = tl.program_id(2)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_i = tl.arange(0, WIDTH)
    held_n = offs_n if N % BLOCK_N == 0 else tl.minimum(offs_n, N - 1)
    code_ptrs = codes_ptr + held_n.to(tl.int64)[:, None] * (SPANS * WIDTH) + offs_i[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * K + offs_i[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for span in tl.range(split * SPLIT, tl.minimum((split + 1) * SPLIT, SPANS)):
        k = span * (8 * WIDTH)
        words = tl.load(code_ptrs + span * WIDTH)
        acc = _add_span(acc, words, x_ptrs + k, (offs_m < rows)[None, :], k + offs_i[:, None], held_n, k,
                        scales_ptr, zeros_ptr, table_ptr, N, K, GROUP, WIDTH, STEP, HAS_FRACTIONS)  # fmt: skip
    write_tile(acc, offs_n, offs_m, bias_ptr, out_ptr, rows, split, N, STRIDE)


@triton.jit(do_not_specialize=["first", "last"])
def _int4_plain(
    codes_ptr,  # int32 [N, SPANS * WIDTH]
    scales_ptr,  # float32 [G, N]
    zeros_ptr,  # float32 [G, N], or none
    table_ptr,  # float32 [16], or none
    out_ptr,  # [last - first, K]
    first,
    last,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The plain numbers of one span of BLOCK_N rows, from row `first` on, a program."""
    SPANS: tl.constexpr = (K + 8 * WIDTH - 1) // (8 * WIDTH)
    LAST: tl.constexpr = (K + GROUP - 1) // GROUP - 1
    span = tl.program_id(1)
    offs_n = first + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_i = tl.arange(0, WIDTH)
    real = offs_n < last
    at_n = offs_n.to(tl.int64)[:, None]
    words = tl.load(
        codes_ptr + at_n * (SPANS * WIDTH) + span * WIDTH + offs_i[None, :], mask=real[:, None], other=0
    )
    for p in tl.static_range(8):
        k = span * (8 * WIDTH) + p * WIDTH
        at = tl.minimum(k // GROUP, LAST) * N + offs_n
        w = _weights(words, 0.0, table_ptr, p, False, tl.float32)
        if HAS_ZEROS:
            w -= tl.load(zeros_ptr + at, mask=real, other=0.0)[:, None] - 8.0
        w *= tl.load(scales_ptr + at, mask=real, other=0.0)[:, None]
        mask = real[:, None] & (k + offs_i[None, :] < K)
        w = round_to(w, out_ptr.dtype.element_ty)
        tl.store(out_ptr + (at_n - first) * K + k + offs_i[None, :], w, mask=mask)


def few(
    x: Tensor, weight: Int4, bias: Tensor | None, out: Tensor, scratch: Scratch, *, whole: bool = False
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
    settings = config(("int4_fixed" if whole else "int4_few") + _suffix(x), len(weight.codes))
    if weight.zeros is not None and weight.width == 16:
        settings["BLOCK_N"] = max(_LEAST_OUTPUTS, settings["BLOCK_N"])
    blocks, steps = triton.cdiv(len(weight.codes), settings["BLOCK_N"]), _spans(weight)
    split = steps if whole else split_size(blocks, steps, settings["num_warps"])
    grid = (blocks, triton.cdiv(steps, split), triton.cdiv(len(x), settings["BLOCK_M"]))
    settings["WAYS"] = settings["num_warps"]
    _start(_int4_few, grid, grid[1], x, weight, bias, out, scratch, settings | {"SPLIT": split})


def many(x: Tensor, weight: Int4, bias: Tensor | None, out: Tensor, scratch: Scratch) -> None:
    """The same for more rows, in tiles that depend on how many; arguments as of `few`."""
    settings = config("int4_many" + _suffix(x), len(x))
    tiles = triton.cdiv(len(x), settings["BLOCK_M"]), triton.cdiv(len(weight.codes), settings["BLOCK_N"])
    split = split_size(tiles[0] * tiles[1], _spans(weight), 2)
    grid = (*tiles, triton.cdiv(_spans(weight), split))
    _start(_int4_many, grid, grid[2], x, weight, bias, out, scratch, settings | {"SPLIT": split})


def _suffix(x: Tensor) -> str:
    return "_float32" if x.dtype is torch.float32 else ""


def _spans(weight: Int4) -> int:
    return weight.codes.shape[1] // weight.width


def _start(
    kernel: object,
    grid: tuple[int, ...],
    splits: int,
    x: Tensor,
    weight: Int4,
    bias: Tensor | None,
    out: Tensor,
    scratch: Scratch,
    settings: dict[str, int],
) -> None:
    n = len(weight.codes)
    parts = scratch.take((splits, len(x), n), torch.float32) if splits > 1 else None
    if weight.table is not None:
        settings["num_stages"] = 1  # what is looked up would be fetched ahead as well
    for fractions in {weight.fractions, is_recording() and weight.zeros is not None}:  # which zeros tell when read
        launch(
            kernel,
            grid,
            x,
            *weight[:4],
            bias if parts is None else None,
            out if parts is None else parts,
            len(x),
            N=n,
            K=weight.inner,
            GROUP=weight.group,
            WIDTH=weight.width,
            STEP=_step(weight),
            STRIDE=out.stride(0) if parts is None else 0,
            HAS_FRACTIONS=fractions,
            **settings,
        )
    if parts is not None:
        add_parts(parts, bias, out)


def _step(weight: Int4) -> int:
    """Columns of a span between changes of the scale."""
    return PLANES * weight.width if weight.group >= weight.inner else gcd(weight.group, PLANES * weight.width)


def plain(weight: Int4, rows: range, out: Tensor) -> None:
    """Write the numbers of some rows, whose columns stay in their order.

    Args:
        weight: of which.
        rows: which, one after another.
        out: [len(rows), K], contiguous.
    """
    settings = config("int4_plain", len(rows))
    launch(
        _int4_plain,
        (triton.cdiv(len(rows), settings["BLOCK_N"]), _spans(weight)),
        *weight[:4],
        out,
        rows.start,
        rows.stop,
        N=len(weight.codes),
        K=weight.inner,
        GROUP=weight.group,
        WIDTH=weight.width,
        HAS_ZEROS=weight.zeros is not None,
        HAS_TABLE=weight.table is not None,
        **settings,
    )


def reference(x: Tensor, matrix: Packed, bias: Tensor | None) -> Tensor:
    """In float64."""
    y = x.double() @ dequantise(matrix._replace(order=None)).double().T
    return y if bias is None else y + bias.double()


def draw_matrix(draw: Draw, n: int, k: int, group: int, kind: str) -> Packed:
    """A matrix of four bits: "signed", "zeros", "fractions" or "table"."""
    groups = -(-k // group)
    codes = draw.integers(0, 16, n, k, dtype=torch.uint8)
    scales = draw.uniform(0.5, 1.5, n, groups) / 64
    zeros = table = None
    if kind == "signed":
        codes = draw.integers(-8, 8, n, k)
    elif kind == "table":
        table = draw.given(torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]))
    else:
        zeros = draw.uniform(4.0, 12.0, n, groups)
        zeros = zeros.round() if kind == "zeros" else zeros
    return Packed(codes, scales, 1, group, 4, zeros, table)


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Every kind of codes and group; few rows, more, and made plain."""
    if scale == MODEL:
        sizes = [(1, 4096, 4096, 128, "signed"), (1, 28672, 4096, 128, "zeros"), (16, 4096, 4096, 128, "signed")]
        sizes += [(64, 4096, 14336, 128, "signed"), (256, 28672, 4096, 128, "signed")]
    else:
        sizes = [(1, 70, 512, 128, "signed"), (3, 33, 256, 32, "zeros"), (4, 64, 384, 384, "fractions")]
        sizes += [(2, 40, 272, 16, "table"), (17, 32, 2048, 64, "fractions"), (20, 70, 160, 32, "signed")]
        sizes += [(1, 5, 37, 37, "fractions"), (9, 5, 37, 37, "zeros")]
    for rows, n, k, group, kind in sizes:
        matrix, x = draw_matrix(draw, n, k, group, kind), draw.normal(rows, k)
        bias = draw.normal(n, dtype=torch.float32) if rows % 2 else None
        yield _product(few if rows <= FEW else many, x, matrix, bias, kind)
    yield _product(
        few, draw.normal(2, 256, dtype=torch.float32), draw_matrix(draw, 32, 256, 64, "fractions"), None, ""
    )
    yield _made_plain(draw, *((8192, 4096) if scale == MODEL else (33, 272)))


def _product(launcher: Callable[..., None], x: Tensor, matrix: Packed, bias: Tensor | None, kind: str) -> Case:
    weight, (n, k) = cast(Int4, prepare_matrix(matrix, x.dtype, x.device)), matrix.shape

    def run() -> tuple[Tensor, ...]:
        out = x.new_empty(len(x), n)
        launcher(x, weight, bias, out, Scratch(x.new_empty(2**25, dtype=torch.uint8)))
        return (out,)

    def expected() -> tuple[Expected, ...]:
        return (expect(reference(x, matrix, bias), x.dtype),)

    name = f"{launcher.__name__} {len(x)} x {n} x {k} groups of {matrix.columns} {kind} {x.dtype}"
    return Case(
        name, run, expected, x.nbytes + weight.codes.nbytes + 2 * len(x) * n, 2 * len(x) * n * k, "bfloat16"
    )


def _made_plain(draw: Draw, n: int, k: int) -> Case:
    matrix = draw_matrix(draw, n, k, 16 if k < 4096 else 128, "fractions")
    weight, rows = cast(Int4, prepare_matrix(matrix, torch.bfloat16, draw.device)), range(1, n)

    def run() -> tuple[Tensor, ...]:
        out = torch.empty(len(rows), k, dtype=torch.bfloat16, device=draw.device)
        plain(weight, rows, out)
        return (out,)

    def expected() -> tuple[Expected, ...]:
        return (expect(dequantise(matrix)[rows.start : rows.stop], torch.bfloat16),)

    return Case(f"plain {n} x {k}", run, expected, weight.codes.nbytes + 2 * len(rows) * k)
