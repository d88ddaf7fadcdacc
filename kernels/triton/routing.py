"""Which experts a token asks, and the tokens sorted by expert: what stands before a mixture's products.

    chosen = the top_k experts of the largest scores, ties to the lower;  weights = softmax over those, or of all

Sorting is by counting: each expert's entries (a token and one of its experts) come one after another, and every
expert begins a tile of BLOCK_M rows of its own. How many tiles there are at most follows from the sizes alone, so
that grids do not depend on what was chosen.

Source: Shazeer et al., "Outrageously Large Neural Networks", ICLR 2017; Gale et al., "MegaBlocks", MLSys 2023
(padding experts to whole tiles).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import Routing
from kernels.triton.case import MODEL, Case, Draw, Expected, expect
from kernels.triton.configs import config
from kernels.triton.launch import launch

AT_ONCE = 128  # entries that a program sorts at once
CHUNKS = 64  # programs that sort, at most
TILES = 64  # tiles that a program describes


class Sorted(NamedTuple):
    """Room for entries sorted by expert.

    Attributes:
        entries: int32 [tiles · BLOCK_M]: token · top_k + place; what is not filled means nothing.
        tiles: int32 [tiles, 2]: of each its expert, and how many of its rows are filled.
        counts: int32 [CHUNKS, experts rounded up to a power of 2]: workspace.
    """

    entries: Tensor
    tiles: Tensor
    counts: Tensor


def most_tiles(entries: int, experts: int, block_m: int) -> int:
    """Tiles that `entries` fill at most, however they choose."""
    return min(entries, (entries + min(entries, experts) * (block_m - 1)) // block_m)


def allocate(entries: int, experts: int, block_m: int, device: torch.device) -> Sorted:
    """Room for so many entries."""
    tiles = most_tiles(entries, experts, block_m)
    return Sorted(
        torch.empty(tiles * block_m, dtype=torch.int32, device=device),
        torch.empty(tiles, 2, dtype=torch.int32, device=device),
        torch.empty(CHUNKS, triton.next_power_of_2(experts), dtype=torch.int32, device=device),
    )


@triton.jit(do_not_specialize=["tokens"])
def _route(
    scores_ptr,  # [tokens, EXPERTS]
    slots_ptr,  # int64 [tokens] or none; a token with a slot below 0 asks nobody
    chosen_ptr,  # int32 [tokens, TOP_K], ascending; -1: nobody
    weights_ptr,  # float32 [tokens, TOP_K]
    tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A few tokens a program; what is no number is chosen first, so that it shows."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    there = (token < tokens)[:, None] & (expert < EXPERTS)[None, :]
    at = token.to(tl.int64)[:, None] * EXPERTS + expert[None, :]
    scores = tl.load(scores_ptr + at, mask=there, other=0.0).to(tl.float32)
    keys = tl.where(scores == scores, scores, float("inf"))
    left = (expert < EXPERTS)[None, :] & (token >= 0)[:, None]
    for _ in tl.static_range(TOP_K):
        most = tl.max(tl.where(left, keys, float("-inf")), axis=1)
        best = tl.min(tl.where(left & (keys == most[:, None]), expert[None, :], BLOCK_E), axis=1)
        left = left & (expert[None, :] != best[:, None])
    taken = (expert < EXPERTS)[None, :] & (left == 0)
    counted = taken if NORMALISE else (expert < EXPERTS)[None, :] & (token >= 0)[:, None]
    most = tl.max(tl.where(counted, keys, float("-inf")), axis=1)
    masses = tl.where(counted, tl.exp(scores - most[:, None]), 0.0)
    weights = masses / tl.sum(masses, axis=1)[:, None]
    place = tl.cumsum(taken.to(tl.int32), axis=1) - 1
    chosen = tl.broadcast_to(expert[None, :], [BLOCK_T, BLOCK_E])
    if HAS_SLOTS:
        slots = tl.load(slots_ptr + token, mask=token < tokens, other=0)
        chosen = tl.where((slots < 0)[:, None], -1, chosen)
    to = token.to(tl.int64)[:, None] * TOP_K + place
    tl.store(chosen_ptr + to, chosen, mask=taken & there)
    tl.store(weights_ptr + to, weights, mask=taken & there)


@triton.jit
def _count_entries(chosen_ptr, first, last, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the entries first .. last - 1 chose each expert; int32 [BLOCK_E]."""
    counts = tl.zeros([BLOCK_E], tl.int32)
    for at in range(first, last, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        expert = tl.load(chosen_ptr + offs, mask=offs < last, other=-1)
        counts += tl.sum((expert[:, None] == tl.arange(0, BLOCK_E)[None, :]).to(tl.int32), axis=0)
    return counts


@triton.jit(do_not_specialize=["entries", "chunk"])
def _count(
    chosen_ptr,  # int32 [entries]
    counts_ptr,  # int32 [chunks, BLOCK_E]
    entries,
    chunk,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A chunk of entries a program."""
    first = tl.program_id(0) * chunk
    counts = _count_entries(chosen_ptr, first, tl.minimum(first + chunk, entries), BLOCK_E, BLOCK)
    tl.store(counts_ptr + tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=["entries", "chunk", "chunks", "tiles"])
def _place(
    chosen_ptr,  # int32 [entries]
    counts_ptr,  # int32 [chunks, BLOCK_E]
    entries_ptr,  # int32 [tiles · BLOCK_M]
    tiles_ptr,  # int32 [tiles, 2]
    entries,
    chunk,
    chunks,
    tiles,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST_CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The first programs place a chunk of entries each; those behind describe BLOCK_T tiles each."""
    me = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    if MOST_CHUNKS == 1:
        total = _count_entries(chosen_ptr, 0, entries, BLOCK_E, BLOCK)
        before = tl.zeros([BLOCK_E], tl.int32)
    else:
        of = tl.arange(0, MOST_CHUNKS)[:, None]
        counts = tl.load(counts_ptr + of * BLOCK_E + expert[None, :], mask=of < chunks, other=0)
        total = tl.sum(counts, axis=0)
        before = tl.sum(tl.where(of < me, counts, 0), axis=0)
    padded = (total + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    start = tl.cumsum(padded, axis=0) - padded
    if me < chunks:
        to = start + before
        last = tl.minimum(me * chunk + chunk, entries)
        for at in range(me * chunk, last, BLOCK):
            offs = at + tl.arange(0, BLOCK)
            asked = tl.load(chosen_ptr + offs, mask=offs < last, other=-1)
            mine = (asked[:, None] == expert[None, :]).to(tl.int32)
            place = tl.sum(mine * (to[None, :] + tl.cumsum(mine, axis=0) - 1), axis=1)
            tl.store(entries_ptr + place, offs, mask=asked >= 0)
            to += tl.sum(mine, axis=0)
    else:
        tile = (me - chunks) * BLOCK_T + tl.arange(0, BLOCK_T)
        _describe(tiles_ptr, tile, tiles, start, total, BLOCK_M)


@triton.jit
def _describe(tiles_ptr, tile, tiles, start, total, BLOCK_M: tl.constexpr):
    """Write which expert each tile has, whose rows begin at `start`, and how many rows it fills."""
    row = (tile * BLOCK_M)[:, None]
    left = (start + total)[None, :] - row
    within = (start[None, :] <= row) & (left > 0)
    expert = tl.arange(0, start.shape[0])[None, :]
    filled = tl.minimum(left, BLOCK_M)
    tl.store(tiles_ptr + 2 * tile, tl.sum(tl.where(within, expert, 0), axis=1), mask=tile < tiles)
    tl.store(tiles_ptr + 2 * tile + 1, tl.sum(tl.where(within, filled, 0), axis=1), mask=tile < tiles)


def route(scores: Tensor, routing: Routing, slots: Tensor | None, chosen: Tensor, weights: Tensor) -> None:
    """Choose experts.

    Args:
        scores: [T, experts], contiguous, of any float type.
        routing: how.
        slots: int64 [T]; a token with a slot below 0 asks nobody; None: all ask.
        chosen: int32 [T, top_k], ascending; -1: nobody.
        weights: float32 [T, top_k].
    """
    tokens, experts = scores.shape
    launched = config("route", experts)
    launch(
        _route,
        (triton.cdiv(tokens, launched["BLOCK_T"]),),
        scores,
        slots,
        chosen,
        weights,
        tokens,
        EXPERTS=experts,
        TOP_K=routing.top_k,
        NORMALISE=routing.normalise,
        HAS_SLOTS=slots is not None,
        BLOCK_E=triton.next_power_of_2(experts),
        **launched,
    )


def sort(chosen: Tensor, block_m: int, into: Sorted) -> None:
    """Sort entries by expert.

    Args:
        chosen: int32 [T, top_k]; -1: nobody.
        block_m: rows of a tile.
        into: as `allocate` makes it for as many entries.
    """
    entries, tiles, block_e = chosen.numel(), len(into.tiles), into.counts.shape[1]
    if not entries:
        return
    chunk = AT_ONCE * triton.cdiv(entries, AT_ONCE * CHUNKS)
    chunks = triton.cdiv(entries, chunk)
    how = config("sort_entries", block_e)
    if chunks > 1:
        launch(_count, (chunks,), chosen, into.counts, entries, chunk, BLOCK_E=block_e, BLOCK=AT_ONCE, **how)
    launch(
        _place,
        (chunks + triton.cdiv(tiles, TILES),),
        chosen,
        into.counts,
        into.entries,
        into.tiles,
        entries,
        chunk,
        chunks,
        tiles,
        BLOCK_E=block_e,
        BLOCK_M=block_m,
        BLOCK=AT_ONCE,
        MOST_CHUNKS=1 if chunks == 1 else CHUNKS,
        BLOCK_T=TILES,
        **how,
    )


def reference(scores: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Chosen experts [T, top_k], ascending, and their weights in float64."""
    scores = scores.double()
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    chosen = order[:, : routing.top_k].sort(dim=-1).values
    if routing.normalise:
        return chosen, torch.softmax(scores.gather(1, chosen), dim=-1)
    return chosen, torch.softmax(scores, dim=-1).gather(1, chosen)


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Choosing with many ties, and sorting of few and many entries."""
    sizes = [(1, 128, 8), (256, 128, 8), (4096, 128, 8), (64, 8, 2)]
    small = [(1, 8, 2), (5, 3, 3), (7, 32, 4), (150, 5, 1)]
    for at, (tokens, experts, top_k) in enumerate(sizes if scale == MODEL else small):
        yield _case(draw, tokens, experts, Routing(top_k, at % 2 == 0))


def _case(draw: Draw, tokens: int, experts: int, routing: Routing) -> Case:
    scores = draw.integers(-6, 6, tokens, experts, dtype=torch.bfloat16) / 2
    block_m = 16

    def run() -> tuple[Tensor, ...]:
        chosen = torch.empty(tokens, routing.top_k, dtype=torch.int32, device=scores.device)
        weights = torch.empty_like(chosen, dtype=torch.float32)
        into = allocate(chosen.numel(), experts, block_m, chosen.device)
        into.entries.fill_(-1)
        route(scores, routing, None, chosen, weights)
        sort(chosen, block_m, into)
        return chosen, weights, into.entries.view(-1, block_m), into.tiles

    def expected() -> tuple[Expected, ...]:
        chosen, weights = reference(scores, routing)
        entries = torch.full((most_tiles(chosen.numel(), experts, block_m), block_m), -1)
        tiles = torch.zeros(len(entries), 2, dtype=torch.int64)
        at = 0
        for expert in range(experts):
            for some in torch.where(chosen.cpu().flatten() == expert)[0].split(block_m):
                if len(some):
                    entries[at, : len(some)] = some
                    tiles[at] = torch.tensor([expert, len(some)])
                    at += 1
        return (
            Expected(chosen, None),
            expect(weights, torch.float32),
            Expected(entries, None),
            Expected(tiles, None),
        )

    name = f"route {tokens} tokens to {routing.top_k} of {experts}" + (", normalised" if routing.normalise else "")
    return Case(name, run, expected, scores.nbytes + 8 * tokens * routing.top_k)
