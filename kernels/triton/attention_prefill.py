"""Attention of rows of any number of tokens over pages, each token over its row up to itself.

    o_t = Σ softmax(q_t·k_n · scale)·v_n over n = max(0, t - window + 1) .. t

A program answers a tile of consecutive tokens of one row, with all query heads that share a KV head. The grid has
room for every row's last tile to be incomplete: T // tile + R programs, whatever the rows; each finds its row by
the rows' first tokens. Tiles of keys that no query sees are left out; only those that some do not see are masked.

An answer's bits depend on the token's position and the pages alone, not on how its row was cut into steps nor on
the other rows, where the tile sizes are the same.

Source: Dao, "FlashAttention-2", ICLR 2024; Ainslie et al., "GQA", EMNLP 2023.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import Attending, Heads, KvSpec
from kernels.triton.attention_decode import reference
from kernels.triton.case import MODEL, Case, Draw, Expected, expect
from kernels.triton.kv_cache import KvPages, exact_rows, pointers, random_pages
from kernels.triton.launch import launch
from kernels.triton.tiles import (
    attend,
    begin,
    case_name,
    constants,
    factors,
    load_queries,
    store_answers,
    tile_config,
)

MUST = {"prefill_attention": {"wgmma"}}

_ROWS = 256


@triton.jit
def _tile_of(query_starts_ptr, rows, tile, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr):
    """A tile's row, the row's first token in the step and how many it has, and which of these is the tile's first.

    Row r's tiles begin at query_starts[r] // BLOCK_Q + r.
    """
    found = 0
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        first = tl.load(query_starts_ptr + row, mask=row < rows, other=0) // BLOCK_Q + row
        found += tl.sum(((first <= tile) & (row < rows)).to(tl.int32), axis=0)
    first = tl.load(query_starts_ptr + found - 1)
    count = tl.load(query_starts_ptr + found) - first
    return found - 1, first, count, (tile - first // BLOCK_Q - (found - 1)) * BLOCK_Q


@triton.jit(do_not_specialize=["rows", "table_stride"])
def _prefill_attention(
    q_ptr,  # [T, HQ · D], rows q_stride apart
    keys_ptr,  # [pages, HKV, PAGE, D]
    values_ptr,  # as keys
    key_scales_ptr,  # float32 [pages, HKV, PAGE], or none
    value_scales_ptr,  # as key scales
    tables_ptr,  # int32 [R, pages of a row], rows table_stride apart
    starts_ptr,  # int32 [R]: tokens of each row before the step
    query_starts_ptr,  # int32 [R + 1]
    sinks_ptr,  # float32 [HQ], or none
    out_ptr,  # [T, HQ, D]
    rows, q_stride, table_stride, inner, step,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, HAS_SINKS: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of a row's tokens and one KV head a program, those of the highest positions first."""
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    row, first_token, count, first = _tile_of(query_starts_ptr, rows, tile, BLOCK_Q, ROWS)
    if first >= count:
        return
    start = tl.load(starts_ptr + row)
    place = tl.arange(0, BLOCK_M)
    query = first + place // (HQ // HKV)
    mask = (query < count) & (place < BLOCK_Q * (HQ // HKV))
    q_head = head * (HQ // HKV) + place % (HQ // HKV)
    token = (first_token + query).to(tl.int64)
    q = load_queries(q_ptr + token * q_stride + q_head * D, mask, D, BLOCK_D, DOT)
    most, total, out, unit = begin(sinks_ptr, q_head, mask, HAS_SINKS, BLOCK_M, BLOCK_D)
    table_ptr = tables_ptr + row.to(tl.int64) * table_stride
    for part in tl.static_range(0 if WINDOW > 0 else 1, 3):
        low, high = _part(part, start + first, start + tl.minimum(first + BLOCK_Q, count), WINDOW, BLOCK_N)
        most, total, out, unit = attend(
            q, most, total, out, unit, start + query,
            keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, table_ptr,
            head, low, high, start + count, inner, step,
            HKV, D, PAGE, WINDOW, CAPPED, DOT, BLOCK_N, BLOCK_D, part != 1, False,
        )  # fmt: skip
    store_answers(out_ptr, token * HQ + q_head, out, total, mask, D, BLOCK_D)


@triton.jit
def _part(part: tl.constexpr, first, end, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys for queries at first .. end - 1: 0 those that windows have left, 1 that all see, 2 that are to come."""
    low, seen_from = 0, 0
    if WINDOW > 0:
        low = tl.maximum(first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        seen_from = tl.cdiv(tl.maximum(end - WINDOW, 0), BLOCK_N) * BLOCK_N
    middle = tl.minimum(tl.maximum(low, seen_from), end)
    seen_by_all = (first + 1) // BLOCK_N * BLOCK_N
    if part == 0:
        return low, middle
    elif part == 1:
        return middle, seen_by_all
    else:
        return tl.maximum(middle, seen_by_all), end


def prefill_attention(
    q: Tensor,
    kv: KvPages,
    layer: int,
    block_tables: Tensor,
    starts: Tensor,
    query_starts: Tensor,
    heads: Heads,
    attending: Attending,
    out: Tensor,
    most_tokens: int,
    deterministic: bool,
) -> None:
    """Write the attention of a step's tokens; those past the last row's are left as they are.

    Args:
        q: [T, at least query·dim], in rows as far apart as they may be.
        kv: the pages, which have the step's own keys and values.
        layer: of these.
        block_tables: int32 [R, pages], in rows as far apart as they may be.
        starts: int32 [R], tokens of each row before the step.
        query_starts: int32 [R + 1], where each row's tokens begin among the step's; rows may have none.
        heads: of q and the pages.
        attending: how; sinks in float32.
        out: [T, query·dim], contiguous.
        most_tokens: of a row in this step; tiles are chosen by it.
        deterministic: all steps have tiles of one size.
    """
    shape = constants(q, heads, attending, kv, tl.bfloat16)
    fold = heads.query // heads.kv
    kernel = "prefill_attention_fixed" if deterministic else "prefill_attention"
    chosen = tile_config(kernel, kv, shape, 1 if deterministic else most_tokens * fold)
    chosen["BLOCK_M"] = max(chosen["BLOCK_M"], triton.next_power_of_2(fold))
    tokens = chosen["BLOCK_M"] // fold
    launch(
        _prefill_attention,
        (len(q) // tokens + len(starts), heads.kv),
        q,
        *pointers(kv, layer),
        block_tables,
        starts,
        query_starts,
        attending.sinks,
        out,
        len(starts),
        q.stride(0),
        block_tables.stride(0),
        *factors(attending),
        **shape,
        BLOCK_Q=tokens,
        ROWS=_ROWS,
        **chosen,
    )


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Rows of one token, of none, of parts of tiles and of several; windows, caps, sinks; every kind of pages."""
    bf16, f32 = torch.bfloat16, torch.float32
    if scale == MODEL:
        eight, plain = Heads(32, 8, 128), Attending(128**-0.5)
        for kv_dtype in ("bfloat16", "int8", "float8"):
            yield _case(draw, [(0, 8192)], eight, plain, 16, kv_dtype, bf16)
        yield _case(draw, [(0, 4096)] * 2, eight, plain, 16, "bfloat16", bf16, deterministic=True)
        yield _case(draw, [(3000, 4)] * 64, eight, plain, 16, "bfloat16", bf16)
        yield _case(draw, [(3000, 16)] * 16, eight, plain, 16, "bfloat16", bf16)
        yield _case(draw, [(0, 8192)], Heads(32, 8, 64), Attending(0.125), 16, "bfloat16", bf16)
        yield _case(draw, [(0, 8192)], Heads(64, 8, 64), _with_all(draw, 64), 16, "bfloat16", bf16)
        yield _case(draw, [(0, 8192)], Heads(16, 8, 256), Attending(0.0625, 4096, 50.0), 64, "bfloat16", bf16)
        return
    plain = Attending(0.25)
    yield _case(draw, [(130, 1), (0, 0), (0, 70), (3, 5)], Heads(4, 2, 16), plain, 16, "bfloat16", bf16)
    yield _case(draw, [(40, 140), (200, 1)], Heads(3, 1, 24), plain, 7, "bfloat16", bf16, deterministic=True)
    yield _case(draw, [(120, 20), (0, 3)], Heads(5, 1, 40), _with_all(draw, 5), 128, "float32", f32)
    yield _case(draw, [(0, 60), (250, 9)], Heads(4, 2, 16), _with_all(draw, 4), 1, "int8", bf16)
    yield _case(draw, [(64, 64)], Heads(2, 1, 64), plain, 1024, "float8", bf16)
    yield _case(draw, [(0, 70), (33, 1)], Heads(2, 1, 16), Attending(0.25, 1), 1, "bfloat16", bf16)


def _with_all(draw: Draw, heads: int) -> Attending:
    """A window, a cap, and sinks."""
    return Attending(0.3, 100, 2.0, draw.normal(heads, dtype=torch.float32))


def _case(
    draw: Draw,
    rows: list[tuple[int, int]],
    heads: Heads,
    attending: Attending,
    page: int,
    kv_dtype: str,
    dtype: torch.dtype,
    deterministic: bool = False,
) -> Case:
    counts = [count for _, count in rows]
    pages = -(-max(start + count for start, count in rows) // page)
    kv = random_pages(draw, KvSpec(2, len(rows) * pages, page, heads.kv, heads.dim), kv_dtype)
    wide = draw.normal(sum(counts), heads.query + 1, heads.dim, dtype=dtype).flatten(1)
    order = torch.randperm(len(rows) * pages, generator=torch.Generator().manual_seed(1))
    tables = draw.given(order.int().view(len(rows), pages))
    starts = draw.given(torch.tensor([start for start, _ in rows], dtype=torch.int32))
    firsts = draw.given(torch.tensor([0, *counts]).cumsum(0).int())

    def run() -> tuple[Tensor, ...]:
        out = torch.empty(len(wide), heads.query * heads.dim, dtype=dtype, device=wide.device)
        tiles = (tables, starts, firsts, heads, attending, out, max(counts), deterministic)
        prefill_attention(wide, kv, 1, *tiles)
        return (out,)

    def expected() -> tuple[Expected, ...]:
        found = []
        queries = iter(wide.view(len(wide), -1, heads.dim)[:, : heads.query])
        for row, (start, count) in enumerate(rows):
            keys, values = exact_rows(kv, 1, tables[row], start + count)
            ends = range(start + 1, start + count + 1)
            found += [reference(next(queries), keys[:end], values[:end], attending) for end in ends]
        return (expect(torch.stack(found).flatten(1), dtype),)

    window = attending.window or max(start + count for start, count in rows)
    seen = sum(min(end, window) for start, count in rows for end in range(start + 1, start + count + 1))
    flops = 4 * heads.query * heads.dim * seen
    name = f"prefill {rows[:4]}, {case_name(heads, attending)}, {kv_dtype} by {page}, {deterministic}"
    return Case(name, run, expected, 2 * wide.nbytes, flops, "bfloat16")
