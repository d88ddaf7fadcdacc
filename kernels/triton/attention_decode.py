"""Attention of one token a row over pages: the query heads of a KV head together, a row's tokens in pieces.

    o = Σ softmax(q·k · scale)·v over a row's tokens; pieces are put together by the logarithms of their sums

A program reads one KV head's keys and values of `split` tokens of a row and answers all query heads that share
them, as rows of one product: so pages are read once. The grid follows from sizes alone; programs beyond a row's
length end at once.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Ainslie et al., "GQA", EMNLP 2023.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import Attending, Heads, KvSpec
from kernels.triton.case import MODEL, Case, Draw, Expected, expect
from kernels.triton.configs import config
from kernels.triton.kv_cache import KvPages, exact_rows, pointers, random_pages
from kernels.triton.lang import round_to
from kernels.triton.launch import launch
from kernels.triton.layout import decode_split, decode_splits, decode_workspace_bytes
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


@triton.jit(do_not_specialize=["table_stride"])
def _decode_attention(
    q_ptr,  # [R, HQ · D], rows q_stride apart
    keys_ptr,  # [pages, HKV, PAGE, D]
    values_ptr,  # as keys
    key_scales_ptr,  # float32 [pages, HKV, PAGE], or none
    value_scales_ptr,  # as key scales
    tables_ptr,  # int32 [R, pages of a row], rows table_stride apart
    lengths_ptr,  # int32 [R]
    sinks_ptr,  # float32 [HQ], or none
    out_ptr,  # [R, HQ, D]; float32 [R, HQ, SPLITS, D] where there are several
    sums_ptr,  # float32 [R, HQ, SPLITS], or none: log2 of what each was divided by
    q_stride, table_stride, inner, step,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, HAS_SINKS: tl.constexpr, DOT: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One KV head, one piece and one row a program."""
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    low, high = tl.maximum(split * SPLIT, first), tl.minimum((split + 1) * SPLIT, length)
    if (SPLITS > 1) & (low >= high):
        return
    mask = tl.arange(0, BLOCK_M) < HQ // HKV
    q_head = head * (HQ // HKV) + tl.arange(0, BLOCK_M)
    q = load_queries(q_ptr + row * q_stride + q_head * D, mask, D, BLOCK_D, DOT)
    most, total, out, unit = begin(sinks_ptr, q_head, mask & (split * SPLIT <= first), HAS_SINKS, BLOCK_M, BLOCK_D)
    position = tl.zeros([BLOCK_M], tl.int32) + (length - 1)
    most, total, out, unit = attend(
        q, most, total, out, unit, position,
        keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, tables_ptr + row * table_stride,
        head, low // BLOCK_N * BLOCK_N, high, high, inner, step,
        HKV, D, PAGE, WINDOW, CAPPED, DOT, BLOCK_N, BLOCK_D, True, tl.bfloat16 == DOT,
    )  # fmt: skip
    if (tl.float16 == DOT) & (keys_ptr.dtype.element_ty.primitive_bitwidth == 8):
        out = out * unit
    place = (row * HQ + q_head) * SPLITS + split
    store_answers(out_ptr, place, out, total, mask, D, BLOCK_D)
    if SPLITS > 1:
        tl.store(sums_ptr + place, most + tl.log2(total), mask=mask)


@triton.jit
def _combine_splits(
    parts_ptr,  # float32 [R, HQ, SPLITS, D]
    sums_ptr,  # float32 [R, HQ, SPLITS]
    lengths_ptr,  # int32 [R]
    out_ptr,  # [R, HQ, D]
    HQ: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One query head of a row a program."""
    row, head = tl.program_id(1), tl.program_id(0)
    length = tl.load(lengths_ptr + row)
    low = tl.maximum(length - WINDOW, 0) // SPLIT if WINDOW > 0 else 0
    high = tl.cdiv(length, SPLIT)
    place = (row.to(tl.int64) * HQ + head) * SPLITS
    split = tl.arange(0, BLOCK_SPLITS)
    sums = tl.load(sums_ptr + place + split, mask=(split >= low) & (split < high), other=float("-inf"))
    most = tl.where(length > 0, tl.max(sums, axis=0), 0.0)
    total = tl.sum(tl.exp2(sums - most), axis=0)
    offs = tl.arange(0, BLOCK_D)
    out = tl.zeros([BLOCK_D], tl.float32)
    for start in range(low, high, BLOCK_S):
        some = start + tl.arange(0, BLOCK_S)
        share = tl.exp2(tl.load(sums_ptr + place + some, mask=some < high, other=float("-inf")) - most)
        at = parts_ptr + (place + some)[:, None] * D + offs[None, :]
        parts = tl.load(at, mask=(some < high)[:, None] & (offs < D)[None, :], other=0.0)
        out += tl.sum(parts * share[:, None], axis=0)
    out = out / tl.where(length > 0, total, 1.0)
    at = out_ptr + (row.to(tl.int64) * HQ + head) * D + offs
    tl.store(at, round_to(out, out_ptr.dtype.element_ty), mask=offs < D)


def decode_attention(
    q: Tensor,
    kv: KvPages,
    layer: int,
    block_tables: Tensor,
    lengths: Tensor,
    heads: Heads,
    attending: Attending,
    out: Tensor,
    workspace: Tensor | None,
    most_tokens: int,
) -> None:
    """Write the attention of one token of each row, its last.

    Args:
        q: [R, at least query·dim], in rows as far apart as they may be.
        kv: the pages.
        layer: of these.
        block_tables: int32 [R, pages], in rows as far apart as they may be.
        lengths: int32 [R], tokens of each row, the one that attends included; of 0 the answer is zeros.
        heads: of q and the pages.
        attending: how; sinks in float32.
        out: [R, query·dim], contiguous.
        workspace: float32, as long as `layout.decode_workspace_bytes` says; None where that is 0.
        most_tokens: no row is longer.
    """
    rows = len(lengths)
    shape = constants(q, heads, attending, kv, tl.float16)
    split, splits = decode_split(rows, heads.kv), decode_splits(rows, heads.kv, most_tokens)
    parts, sums = _parts(workspace, splits, rows * heads.query * splits, heads.dim)
    launch(
        _decode_attention,
        (heads.kv, splits, rows),
        q,
        *pointers(kv, layer),
        block_tables,
        lengths,
        attending.sinks,
        out if parts is None else parts,
        sums,
        q.stride(0),
        block_tables.stride(0),
        *factors(attending),
        **shape,
        SPLIT=split,
        SPLITS=splits,
        BLOCK_M=max(16, triton.next_power_of_2(heads.query // heads.kv)),
        **tile_config("decode_attention", kv, shape, 1),
    )
    if parts is not None and sums is not None:
        _combine((parts, sums), lengths, heads, attending, out, (split, splits))


def _parts(
    workspace: Tensor | None, splits: int, answers: int, dim: int
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Where the splits' answers go, and their sums; nowhere if there is one split."""
    if splits == 1:
        return None, None
    if workspace is None or len(workspace) < answers * (dim + 1):
        raise ValueError(f"{splits} splits want a workspace of {answers * (dim + 1)} numbers")
    return workspace[: answers * dim], workspace[answers * dim :]


def _combine(
    made: tuple[Tensor, Tensor],
    lengths: Tensor,
    heads: Heads,
    attending: Attending,
    out: Tensor,
    sizes: tuple[int, int],
) -> None:
    """Put the answers and sums of splits together; sizes are tokens of a split, and splits."""
    width = triton.next_power_of_2(heads.dim)
    launch(
        _combine_splits,
        (heads.query, len(lengths)),
        *made,
        lengths,
        out,
        HQ=heads.query,
        D=heads.dim,
        WINDOW=attending.window,
        SPLIT=sizes[0],
        SPLITS=sizes[1],
        BLOCK_SPLITS=triton.next_power_of_2(sizes[1]),
        BLOCK_D=width,
        **config("combine_splits", width),
    )


def reference(q: Tensor, keys: Tensor, values: Tensor, attending: Attending) -> Tensor:
    """One token of a row in float64: q [query, dim] over keys and values [tokens, KV heads, dim] up to itself."""
    seen = slice(-attending.window or None, None)
    keys, values = (x[seen].repeat_interleave(len(q) // x.shape[1], dim=1) for x in (keys, values))
    scores = torch.einsum("hd,nhd->hn", q.double(), keys) * attending.scale
    if attending.softcap:
        scores = attending.softcap * torch.tanh(scores / attending.softcap)
    if attending.sinks is not None:
        scores = torch.cat([scores, attending.sinks.double()[:, None]], dim=1)
    return torch.einsum("hn,nhd->hd", scores.softmax(-1)[:, : len(values)], values)


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Lengths at the edges of pages, tiles and splits, and none; windows, caps, sinks; every type of pages."""
    bf16 = torch.bfloat16
    if scale == MODEL:
        eight, one = Heads(32, 8, 128), Heads(32, 8, 64)
        for kv_dtype in ("bfloat16", "int8", "float8"):
            yield _case(draw, [4096] * 128, eight, Attending(128**-0.5), 16, kv_dtype, bf16)
        yield _case(draw, [1024] * 256, eight, Attending(128**-0.5), 16, "bfloat16", bf16)
        yield _case(draw, [16384], eight, Attending(128**-0.5), 16, "bfloat16", bf16)
        yield _case(draw, [4096] * 64, one, Attending(0.125), 16, "bfloat16", bf16)
        yield _case(draw, [4096] * 64, Heads(64, 8, 64), _with_all(draw, 64), 16, "bfloat16", bf16)
        yield _case(draw, [4096] * 64, Heads(16, 8, 256), Attending(0.0625, 0, 50.0), 64, "bfloat16", bf16)
        return
    plain = Attending(0.25)
    yield _case(draw, [257, 0, 1, 300], Heads(4, 2, 16), plain, 16, "bfloat16", bf16)
    yield _case(draw, [40, 64, 0], Heads(3, 3, 24), plain, 7, "bfloat16", bf16)
    yield _case(draw, [270, 33], Heads(18, 1, 40), _with_all(draw, 18), 128, "float32", torch.float32)
    yield _case(draw, [600, 515, 20], Heads(4, 1, 16), _with_all(draw, 4), 1, "int8", bf16)
    yield _case(draw, [130], Heads(2, 1, 64), plain, 1024, "float8", bf16)
    yield _case(draw, [90, 3], Heads(4, 2, 32), Attending(0.2, 20, 5.0), 32, "bfloat16", torch.float32)
    yield _case(draw, [300, 257, 1, 0], Heads(2, 1, 16), Attending(0.25, 1), 1, "bfloat16", bf16)


def _with_all(draw: Draw, heads: int) -> Attending:
    """A window, a cap, and sinks."""
    return Attending(0.3, 100, 2.0, draw.normal(heads, dtype=torch.float32))


def _case(
    draw: Draw,
    lengths: list[int],
    heads: Heads,
    attending: Attending,
    page: int,
    kv_dtype: str,
    dtype: torch.dtype,
) -> Case:
    rows, pages = len(lengths), -(-max(lengths) // page)
    kv = random_pages(draw, KvSpec(2, rows * pages, page, heads.kv, heads.dim), kv_dtype)
    wide = draw.normal(rows, heads.query + 1, heads.dim, dtype=dtype).flatten(1)
    table = draw.given(torch.randperm(rows * pages, generator=torch.Generator().manual_seed(1)).int())
    tables, counted = table.view(rows, pages), draw.given(torch.tensor(lengths, dtype=torch.int32))

    def run() -> tuple[Tensor, ...]:
        out = torch.empty(rows, heads.query * heads.dim, dtype=dtype, device=wide.device)
        needed = decode_workspace_bytes(rows, max(lengths), heads.query, heads.kv, heads.dim) // 4
        workspace = torch.empty(needed, device=wide.device) if needed else None
        decode_attention(wide, kv, 1, tables, counted, heads, attending, out, workspace, max(lengths))
        return (out,)

    def expected() -> tuple[Expected, ...]:
        out = torch.zeros(rows, heads.query, heads.dim, dtype=torch.float64, device=wide.device)
        for row, length in enumerate(lengths):
            if length:
                q = wide[row].view(-1, heads.dim)[: heads.query]
                out[row] = reference(q, *exact_rows(kv, 1, tables[row], length), attending)
        return (expect(out.flatten(1), dtype),)

    seen = sum(min(length, attending.window or length) for length in lengths)
    item = kv.keys.itemsize * heads.dim + (4 if kv.key_scales is not None else 0)
    name = f"decode {rows} x {max(lengths)}, {case_name(heads, attending)}, {kv_dtype} by {page}, {str(dtype)[6:]}"
    return Case(name, run, expected, 2 * seen * heads.kv * item, 4 * seen * heads.query * heads.dim, "bfloat16")
