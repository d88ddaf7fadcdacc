"""Rows of an embedding table, of any form, as plain numbers.

    y[t] = round(w[token[t]]) · scale

Each number is that of the table in float32, rounded to the type of y, times the scale, and rounded again.

Source: Gemma Team, "Gemma", 2024 (embeddings scaled in their own number type).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed import Packed, dequantise
from kernels.triton import linear_bytes, linear_int4, pointwise
from kernels.triton.case import MODEL, Case, Draw, Expected
from kernels.triton.configs import config
from kernels.triton.decode import code, plane, small_float, whole_byte
from kernels.triton.lang import round_to
from kernels.triton.launch import launch
from kernels.triton.weights import Form, Fp8, Int4, Int8, Plain, prepare_table, shape_of


@triton.jit
def _embed_words(
    ids_ptr,  # int32 [tokens]
    codes_ptr,  # int32 [N, spans * WIDTH]
    scales_ptr,  # float32 [G, N]
    zeros_ptr,  # float32 [G, N], or none
    table_ptr,  # float32 [16], or none
    out_ptr,  # [tokens, K]
    factor,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
):
    """A span of one row a program."""
    to, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(ids_ptr + to).to(tl.int64)
    offs_i = tl.arange(0, WIDTH)
    words = tl.load(codes_ptr + (row * tl.num_programs(1) + span) * WIDTH + offs_i)
    for p in tl.static_range(8):
        offs_k = (span * 8 + p) * WIDTH + offs_i
        mask = offs_k < K
        at = (offs_k // GROUP).to(tl.int64) * N + row
        if HAS_TABLE:
            w = tl.load(table_ptr + code(words, p))
        elif HAS_ZEROS:
            w = plane(words, p, tl.float32) + 8.0 - tl.load(zeros_ptr + at, mask=mask, other=0.0)
        else:
            w = plane(words, p, tl.float32)
        w *= tl.load(scales_ptr + at, mask=mask, other=0.0)
        _store(out_ptr + to * K + offs_k, w, factor, mask)


@triton.jit
def _embed_codes(
    ids_ptr,  # int32 [tokens]
    codes_ptr,  # int8, or uint8 bits of e4m3 [N, K]
    scales_ptr,  # float32 [G, N / ROWS]
    zeros_ptr,  # float32 [G, N], or none
    out_ptr,  # [tokens, K]
    factor,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Part of one row a program."""
    to = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + to).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_k < K
    w = tl.load(codes_ptr + row * K + offs_k, mask=mask, other=0)
    at = (offs_k // GROUP).to(tl.int64) * (N // ROWS) + row // ROWS
    w = whole_byte(w, tl.float32) if codes_ptr.dtype.element_ty == tl.int8 else small_float(w, tl.float32) * 256.0
    if zeros_ptr is not None:
        w -= tl.load(zeros_ptr + at, mask=mask, other=0.0)
    w *= tl.load(scales_ptr + at, mask=mask, other=0.0)
    _store(out_ptr + to * K + offs_k, w, factor, mask)


@triton.jit
def _store(ptrs, w, factor, mask):
    """Rounded, multiplied, and rounded again."""
    dtype: tl.constexpr = ptrs.dtype.element_ty
    tl.store(ptrs, round_to(round_to(w, dtype).to(tl.float32) * factor, dtype), mask=mask)


def embed(ids: Tensor, table: Form, scale: float, out: Tensor) -> None:
    """Write the rows `ids` of a table, times `scale`.

    Args:
        ids: int32 [tokens], each a row of the table.
        table: without `order`.
        scale: already of the type of `out`.
        out: [tokens, K], contiguous.
    """
    n, k = shape_of(table)
    if isinstance(table, Int4):
        launch(
            _embed_words,
            (len(ids), table.codes.shape[1] // table.width),
            ids,
            table.codes,
            table.scales,
            table.zeros,
            table.table,
            out,
            scale,
            N=n,
            K=k,
            GROUP=table.group,
            WIDTH=table.width,
            HAS_ZEROS=table.zeros is not None,
            HAS_TABLE=table.table is not None,
            num_warps=1,
        )
    elif isinstance(table, Plain):
        pointwise.embed(table.weight, ids, scale, out)
    else:
        _embed_bytes(ids, table, scale, out)


def _embed_bytes(ids: Tensor, table: Int8 | Fp8, scale: float, out: Tensor) -> None:
    settings = config("embed_codes", out.shape[1])
    codes, zeros, constants = linear_bytes.constants_of(table)
    del constants["IS_FLOAT"]  # the codes' type says it
    grid = (len(ids), triton.cdiv(out.shape[1], settings["BLOCK"]))
    launch(_embed_codes, grid, ids, codes, table.scales, zeros, out, scale, **constants, **settings)


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Every form."""
    n, k, tokens = (128256, 4096, 64) if scale == MODEL else (40, 272, 3)
    ids = draw.integers(0, n, tokens, dtype=torch.int32)
    for kind in ("signed", "fractions", "table"):
        yield _case(f"int4 {kind}", ids, linear_int4.draw_matrix(draw, n, k, 16, kind), draw)
    for kind in ("signed", "zeros", "float"):
        yield _case(f"bytes {kind}", ids, linear_bytes.draw_matrix(draw, n, k, 1, k, kind), draw)
    yield _case("plain", ids, draw.normal(n, k), draw)


def _case(name: str, ids: Tensor, matrix: Packed | Tensor, draw: Draw) -> Case:
    table = prepare_table(matrix, torch.bfloat16, draw.device)
    k = matrix.shape[1]

    def run() -> tuple[Tensor, ...]:
        out = torch.empty(len(ids), k, dtype=torch.bfloat16, device=draw.device)
        embed(ids, table, 1.5, out)
        return (out,)

    def expected() -> tuple[Expected, ...]:
        plain = dequantise(matrix) if isinstance(matrix, Packed) else matrix.float()
        return (Expected((plain[ids.long()].bfloat16() * 1.5).double(), None),)

    return Case(f"embed {name} {len(ids)} x {k}", run, expected, 3 * len(ids) * k)
