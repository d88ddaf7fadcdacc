"""Products of tokens sorted by expert with the matrices of their experts, several experts in one start.

    inner[e]  = act(W_gate · x + b_gate) · (W_up · x + b_up);   answer[e] = W_down · inner[e] + b_down

A program holds a tile of one expert's outputs, over a tile of that expert's rows. Outputs stand where a product
has its first operand: codes then become numbers in registers, and few rows still fill a tensor core. Scales
multiply sums of products, so that nothing is rounded but the answer.

Source: Gale et al., "MegaBlocks", MLSys 2023; Frantar et al., "MARLIN", 2024 (codes to numbers in registers).
"""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.configs import Config, config
from kernels.triton.decode import code, less, plane, small_float, whole_byte, whole_part
from kernels.triton.gated import gate
from kernels.triton.lang import dot, round_to
from kernels.triton.launch import launch
from kernels.triton.routing import Sorted

WIDEST = 128
MOST_ROWS = {"int4": 64}  # of a tile: inputs of a whole span wait in shared memory


class Stacked(NamedTuple):
    """Matrices [experts, N, K] of one form of `kernels.triton.weights`, one behind the other.

    Attributes:
        kind: "plain", "int4", "int8" or "float8".
        codes: [experts, N, ...].
        scales: float32 [experts, ceil(K / group), N / rows]; None of plain ones.
        zeros: float32, as scales, or None.
        table: float32 [experts, 16], or None.
        order: int64 [experts, K], or None.
        group: columns that share a scale.
        rows: rows that share a scale.
        width: words of a span of int4; divides `group`.
        inner: K.
    """

    kind: str
    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    table: Tensor | None
    order: Tensor | None
    group: int
    rows: int
    width: int
    inner: int


@triton.jit
def _inputs(x_ptr, there, order_ptr, offs_k, K: tl.constexpr, IS_WHOLE: tl.constexpr):
    """Columns offs_k of the rows at x_ptr; [columns, BLOCK_M]."""
    mask = there[None, :] if IS_WHOLE else there[None, :] & (offs_k < K)[:, None]
    if order_ptr is not None:
        offs_k = tl.load(order_ptr + tl.minimum(offs_k, K - 1))
    return tl.load(x_ptr[None, :] + offs_k[:, None], mask=mask, other=0.0)


@triton.jit
def _of_words(
    acc,  # [BLOCK_N, BLOCK_M]
    x_ptr,  # [BLOCK_M]
    there,
    order_ptr,
    codes_ptr,  # [BLOCK_N], where rows of the matrix begin
    scales_ptr,  # [BLOCK_N]
    zeros_ptr,
    table_ptr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NEXT: tl.constexpr,
    PLANES: tl.constexpr,  # of a span that share a scale
    WIDTH: tl.constexpr,
):
    """acc and the products of all columns, eight of which share a word."""
    last: tl.constexpr = (K + GROUP - 1) // GROUP - 1
    codes_ptr = codes_ptr[:, None] + tl.arange(0, WIDTH)[None, :]
    for k in range(0, K, 8 * WIDTH):
        words = tl.load(codes_ptr + k // 8)
        for p in tl.static_range(0, 8, PLANES):
            at = tl.minimum((k + p * WIDTH) // GROUP, last) * NEXT
            zeros = 0.0 if zeros_ptr is None else tl.load(zeros_ptr + at) - 8.0
            some = tl.zeros_like(acc)
            rest = tl.zeros([WIDTH, acc.shape[1]], tl.float32)
            for i in tl.static_range(PLANES):
                offs_k = k + (p + i) * WIDTH + tl.arange(0, WIDTH)
                x = _inputs(x_ptr, there, order_ptr, offs_k, K, K % (8 * WIDTH) == 0)
                some = dot(_plane(words, zeros, zeros_ptr, table_ptr, p + i, x.dtype), x, some)
                if zeros_ptr is not None:
                    rest += x.to(tl.float32)
            if zeros_ptr is not None:
                some += (whole_part(zeros) - zeros)[:, None] * tl.sum(rest, axis=0)[None, :]
            acc += some * tl.load(scales_ptr + at)[:, None]
    return acc


@triton.jit
def _plane(words, zeros, zeros_ptr, table_ptr, P: tl.constexpr, dtype: tl.constexpr):
    """What one plane of words stands for, less the whole part of its zeros."""
    if table_ptr is not None:
        return round_to(tl.load(table_ptr + code(words, P)), dtype)
    elif zeros_ptr is not None:
        return less(plane(words, P, dtype), whole_part(zeros)[:, None])
    else:
        return plane(words, P, dtype)


@triton.jit
def _of_codes(
    acc,  # [BLOCK_N, BLOCK_M]
    x_ptr,  # [BLOCK_M]
    there,
    order_ptr,
    codes_ptr,  # [BLOCK_N], where rows of the matrix begin
    scales_ptr,  # [BLOCK_N]
    zeros_ptr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NEXT: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc and the products of all columns; where all share a scale it multiplies at the end."""
    codes_ptr = codes_ptr[:, None] + tl.arange(0, BLOCK_K)[None, :]
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = _inputs(x_ptr, there, order_ptr, offs_k, K, K % BLOCK_K == 0)
        if K % BLOCK_K == 0:
            codes = tl.load(codes_ptr + k)
        else:
            codes = tl.load(codes_ptr + k, mask=(offs_k < K)[None, :], other=0)
        values = _values(codes, KIND, x.dtype)
        if GROUP < K or zeros_ptr is not None:
            some = dot(values, x, tl.zeros_like(acc))
            if zeros_ptr is not None:
                zeros = tl.load(zeros_ptr + k // GROUP * NEXT)
                some -= zeros[:, None] * tl.sum(x.to(tl.float32), axis=0)[None, :]
            acc += some * tl.load(scales_ptr + k // GROUP * NEXT)[:, None]
        else:
            acc = dot(values, x, acc)
    if KIND != "plain" and GROUP >= K and zeros_ptr is None:
        acc *= tl.load(scales_ptr)[:, None]
    return acc * 256.0 if KIND == "float8" else acc


@triton.jit
def _values(codes, KIND: tl.constexpr, dtype: tl.constexpr):
    """What codes stand for, of float8 2^-8 of it."""
    if KIND == "plain":
        return codes
    elif KIND == "float8":
        return small_float(codes, dtype)
    else:
        return whole_byte(codes, dtype)


@triton.jit
def _product(
    acc,  # [BLOCK_N, BLOCK_M]
    x_ptr,  # [BLOCK_M]
    there,
    expert,
    row,  # [BLOCK_N], of the expert's matrix
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    table_ptr,
    order_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    LONG: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc and the products of some rows of an expert's matrix over all columns."""
    wide: tl.constexpr = (N + ROWS - 1) // ROWS  # scales of a group
    shared = expert * (wide * ((K + GROUP - 1) // GROUP)) + row // ROWS
    scales_ptr = scales_ptr if scales_ptr is None else scales_ptr + shared
    zeros_ptr = zeros_ptr if zeros_ptr is None else zeros_ptr + shared
    table_ptr = table_ptr if table_ptr is None else table_ptr + expert * 16
    order_ptr = order_ptr if order_ptr is None else order_ptr + expert * K
    codes_ptr += (expert * N + row) * LONG
    if KIND == "int4":
        return _of_words(acc, x_ptr, there, order_ptr, codes_ptr, scales_ptr, zeros_ptr, table_ptr,
                         K, GROUP, wide, PLANES, BLOCK_K)  # fmt: skip
    else:
        return _of_codes(acc, x_ptr, there, order_ptr, codes_ptr, scales_ptr, zeros_ptr,
                         K, GROUP, wide, KIND, BLOCK_K)  # fmt: skip


@triton.jit
def _ask(
    x_ptr,  # [rows, K]; an entry's row is entry // FOLD
    entries_ptr,  # int32 [tiles, BLOCK_M]
    tiles_ptr,  # int32 [tiles, 2]: expert, rows filled
    codes_ptr,  # [experts, N, LONG]
    scales_ptr,  # float32 [experts, ceil(K / GROUP), N / ROWS], or none
    zeros_ptr,  # as scales, or none
    table_ptr,  # float32 [experts, 16], or none
    order_ptr,  # int64 [experts, K], or none
    bias_ptr,  # float32 [experts, N], or none
    out_ptr,  # [entries, N], or [entries, N / 2] of gate and up
    FOLD: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    LONG: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PLANES: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "": none, and no gate
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of outputs of one expert over one tile of its rows; of a gate and its up by turns."""
    tile = tl.program_id(0)
    filled = tl.load(tiles_ptr + 2 * tile + 1)
    if filled == 0:
        return
    expert = tl.load(tiles_ptr + 2 * tile).to(tl.int64)
    there = tl.arange(0, BLOCK_M) < filled
    entry = tl.load(entries_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M), mask=there, other=0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    row = row % 2 * (N // 2) + row // 2 if ACTIVATION != "" else row
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc = _product(acc, x_ptr + entry // FOLD * K, there, expert, row, codes_ptr, scales_ptr, zeros_ptr, table_ptr,
                   order_ptr, N, K, LONG, KIND, GROUP, ROWS, PLANES, BLOCK_K)  # fmt: skip
    acc = acc if bias_ptr is None else acc + tl.load(bias_ptr + expert * N + row)[:, None]
    _write(acc, out_ptr, entry, there, n, N, ACTIVATION)


@triton.jit
def _write(acc, out_ptr, entry, there, n, N: tl.constexpr, ACTIVATION: tl.constexpr):
    """A tile of outputs [BLOCK_N, BLOCK_M] to the rows of its entries, of gates and ups what comes of them."""
    if ACTIVATION != "":
        g, u = acc.reshape([acc.shape[0] // 2, 2, acc.shape[1]]).permute(0, 2, 1).split()
        n = tl.program_id(1) * (acc.shape[0] // 2) + tl.arange(0, acc.shape[0] // 2)
        mask = (n < N // 2)[:, None] & there[None, :]
        to = out_ptr + (entry * (N // 2))[None, :] + n[:, None]
        tl.store(to, round_to(gate(g, u, ACTIVATION), out_ptr.dtype.element_ty), mask=mask)
    else:
        to = out_ptr + (entry * N)[None, :] + n[:, None]
        tl.store(to, round_to(acc, out_ptr.dtype.element_ty), mask=(n < N)[:, None] & there[None, :])


@triton.jit
def _combine(
    answers_ptr,  # [tokens, TOP_K, WIDTH]
    chosen_ptr,  # int32 [tokens, TOP_K]; -1: nobody
    weights_ptr,  # float32 [tokens, TOP_K]
    out_ptr,  # [tokens, WIDTH]
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Part of a token a program: the sum of its answers by their weights, in the experts' order."""
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(TOP_K):
        at = token * TOP_K + place
        asked = tl.load(chosen_ptr + at) >= 0
        weight = tl.load(weights_ptr + at)
        answer = tl.load(answers_ptr + at * WIDTH + offs, mask=mask & asked, other=0.0).to(tl.float32)
        total += tl.where(asked, weight, 0.0) * answer
    tl.store(out_ptr + token * WIDTH + offs, round_to(total, out_ptr.dtype.element_ty), mask=mask)


def tile_rows(entries: int, matrices: tuple[Stacked, ...], deterministic: bool) -> int:
    """BLOCK_M for `entries` that ask these matrices; one for all sizes where bits must not change."""
    if deterministic:
        return config("experts_fixed", 1)["BLOCK_M"]
    each = -(-entries // len(matrices[0].codes))
    return min(config("experts", each)["BLOCK_M"], *(MOST_ROWS.get(one.kind, WIDEST) for one in matrices))


def ask(
    x: Tensor, matrices: Stacked, bias: Tensor | None, by_expert: Sorted, fold: int, activation: str, out: Tensor
) -> None:
    """Write what experts answer to their entries.

    Args:
        x: [rows, K], contiguous; the row of an entry is entry // fold.
        matrices: of the experts.
        bias: float32 [experts, N]; None: none.
        by_expert: the entries, sorted.
        fold: entries of a row.
        activation: of gate and up, which are stacked in N, gate first; "": N outputs as they are.
        out: [entries, N], of gate and up [entries, N / 2]; contiguous.
    """
    tiles, n = len(by_expert.tiles), matrices.codes.shape[1]
    if not tiles:
        return
    block_m = len(by_expert.entries) // tiles
    chosen = _tile(matrices, block_m, x.dtype)
    launch(
        _ask,
        (tiles, triton.cdiv(n, chosen["BLOCK_N"])),
        x,
        by_expert.entries,
        by_expert.tiles,
        matrices.codes.view(torch.uint8) if matrices.kind == "float8" else matrices.codes,
        matrices.scales,
        matrices.zeros,
        matrices.table,
        matrices.order,
        bias,
        out,
        FOLD=fold,
        N=n,
        ACTIVATION=activation,
        BLOCK_M=block_m,
        **_constants(matrices),
        **chosen,
    )


def _constants(matrices: Stacked) -> dict[str, Any]:
    whole = matrices.group >= matrices.inner
    return {
        "K": matrices.inner,
        "LONG": matrices.codes.shape[2],
        "KIND": matrices.kind,
        "GROUP": matrices.group,
        "ROWS": matrices.rows,
        "PLANES": 8 if whole or not matrices.width else gcd(matrices.group // matrices.width, 8),
    }


def _tile(matrices: Stacked, block_m: int, dtype: torch.dtype) -> Config:
    """Columns of a step share a scale, so that they may be fewer than the table says."""
    chosen = config("experts_float32" if dtype is torch.float32 else f"experts_{matrices.kind}", block_m)
    if matrices.kind == "int4":
        chosen["BLOCK_K"] = matrices.width
    elif matrices.group < matrices.inner:
        chosen["BLOCK_K"] = gcd(chosen["BLOCK_K"], matrices.group)
    return chosen


def combine(answers: Tensor, chosen: Tensor, weights: Tensor, out: Tensor) -> None:
    """Write the sum of each token's answers by their weights.

    Args:
        answers: [T · top_k, width], contiguous.
        chosen: int32 [T, top_k]; -1: nobody.
        weights: float32 [T, top_k].
        out: [T, width], contiguous.
    """
    tokens, width = out.shape
    launched = config("combine", width)
    grid = (tokens, triton.cdiv(width, launched["BLOCK"]))
    launch(_combine, grid, answers, chosen, weights, out, TOP_K=chosen.shape[1], WIDTH=width, **launched)
