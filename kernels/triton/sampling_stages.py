"""The steps of a draw that many programs share: what a row's chunks hold, weigh and list.

A list has the tokens not under a pivot. The pivot is so chosen that `REACHING` blocks of `SUB` tokens reach it,
which makes a list of some more than that many tokens however the logits are spread.
"""

import triton
import triton.language as tl

from kernels.triton.sampling_rows import as_key, asked, numbers, weights


@triton.jit(do_not_specialize=["stride", "rows"])
def scan_chunks(
    logits_ptr,  # [rows, VOCABULARY], float32 or float64
    stride,
    maxima_ptr,  # float64 [rows, CHUNKS]
    places_ptr,  # int32 [rows, CHUNKS]
    sound_ptr,  # int32 [rows, CHUNKS]
    tops_ptr,  # float32 [rows, CHUNKS * CHUNK / SUB]
    rows,
    VOCABULARY: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SUB: tl.constexpr,
    LISTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The highest number of a chunk, its place, whether all are finite, and the highest of each block of SUB."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
    real = row < rows
    inside = (at < VOCABULARY) & real[:, None]
    x = numbers(logits_ptr, stride, row, at, inside)
    finite = tl.abs(x) < float("inf")
    x = tl.where(finite, x, float("-inf"))
    highest = tl.max(x, axis=1)
    place = tl.min(tl.where(x == highest[:, None], at, VOCABULARY - 1), axis=1)
    out = row * CHUNKS + chunk
    tl.store(maxima_ptr + out, highest.to(tl.float64), mask=real)
    tl.store(places_ptr + out, place, mask=real)
    tl.store(sound_ptr + out, tl.min((finite | ~inside).to(tl.int32), axis=1), mask=real)
    if LISTED > 0:
        tops = tl.max(tl.reshape(x, (ROWS, CHUNK // SUB, SUB)), axis=2).to(tl.float32)
        blocks = chunk * (CHUNK // SUB) + tl.arange(0, CHUNK // SUB)[None, :]
        tl.store(tops_ptr + row[:, None] * (CHUNKS * (CHUNK // SUB)) + blocks, tops, mask=real[:, None])


@triton.jit(do_not_specialize=["rows"])
def settle_rows(
    maxima_ptr,  # float64 [rows, CHUNKS]
    places_ptr,  # int32 [rows, CHUNKS]
    sound_ptr,  # int32 [rows, CHUNKS]
    tops_ptr,  # float32 [rows, TOPS]
    highest_ptr,  # float64 [rows]
    pivot_ptr,  # float32 [rows]
    tokens_ptr,  # int32 [rows]
    finite_ptr,  # int32 [rows]
    rows,
    CHUNKS: tl.constexpr,
    TOPS: tl.constexpr,
    REACHING: tl.constexpr,
    AGAIN: tl.constexpr,
    LISTED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MANY: tl.constexpr,
):
    """A row's highest number, its token, whether all are finite, and the pivot, of which 16 bits are found."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    chunk = tl.arange(0, WIDTH)[None, :]
    inside = real[:, None] & (chunk < CHUNKS)
    maxima = tl.load(maxima_ptr + row[:, None] * CHUNKS + chunk, mask=inside, other=float("-inf"))
    places = tl.load(places_ptr + row[:, None] * CHUNKS + chunk, mask=inside, other=0x7FFFFFFF)
    highest = tl.max(maxima, axis=1)
    token = tl.min(tl.where(maxima == highest[:, None], places, 0x7FFFFFFF), axis=1)
    tl.store(highest_ptr + row, highest, mask=real)
    if AGAIN:
        tl.store(tokens_ptr + row, token, mask=real & (highest > float("-inf")))
    else:
        tl.store(tokens_ptr + row, token, mask=real)
        sound = tl.load(sound_ptr + row[:, None] * CHUNKS + chunk, mask=inside, other=1)
        tl.store(finite_ptr + row, tl.min(sound, axis=1), mask=real)
    if LISTED > 0:
        block = tl.arange(0, MANY)[None, :]
        inside = real[:, None] & (block < TOPS)
        tops = tl.load(tops_ptr + row[:, None] * TOPS + block, mask=inside, other=float("-inf"))
        tl.store(pivot_ptr + row, _pivot(tops, REACHING), mask=real)


@triton.jit
def _pivot(tops, REACHING: tl.constexpr):
    """What REACHING of each row of `tops` [ROWS, N] reach, in 16 bits."""
    keys = as_key(tops)
    pivot = tl.zeros_like(tl.max(keys, axis=1)) - 0x80000000
    step = tl.zeros_like(pivot) + 0x80000000
    for _ in range(16):
        higher = pivot + step
        reaching = tl.sum((keys >= higher[:, None]).to(tl.int32), axis=1)
        pivot = tl.where(reaching >= REACHING, higher, pivot)
        step = step >> 1
    low = pivot.to(tl.int32)
    low = low ^ ((low >> 31) & 0x7FFFFFFF)
    return low.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["stride", "rows"])
def weigh_chunks(
    logits_ptr,  # [rows, VOCABULARY], float32 or float64
    stride,
    temperature_ptr,  # float64 [rows]
    top_k_ptr,  # int64 [rows]
    top_p_ptr,  # float64 [rows]
    min_p_ptr,  # float64 [rows]
    highest_ptr,  # float64 [rows]
    finite_ptr,  # int32 [rows]
    pivot_ptr,  # float32 [rows]
    masses_ptr,  # float64 [rows, CHUNKS]
    listed_ptr,  # float64 [rows, CHUNKS]
    counts_ptr,  # int32 [rows, CHUNKS]
    segments_ptr,  # int32 [rows, CHUNKS, SEGMENT]
    rows,
    VOCABULARY: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    LISTED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What a chunk weighs; and its tokens from the pivot on, if the segment holds them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    drawn, ranked, inverse, highest = asked(
        temperature_ptr, top_k_ptr, top_p_ptr, highest_ptr, finite_ptr, row, real
    )
    if tl.max(drawn.to(tl.int32), axis=0) > 0:
        chunk = tl.program_id(1)
        at = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
        inside = (at < VOCABULARY) & drawn[:, None]
        x = numbers(logits_ptr, stride, row, at, inside)
        floor = tl.load(min_p_ptr + row, mask=real, other=0.0)
        weight = tl.where(inside, weights(x, highest, inverse, floor), 0.0)
        out = row * CHUNKS + chunk
        tl.store(masses_ptr + out, tl.sum(weight, axis=1), mask=drawn)
        if LISTED > 0:
            pivot = tl.load(pivot_ptr + row, mask=ranked, other=0.0).to(x.dtype)
            chosen = inside & ranked[:, None] & (x >= pivot[:, None])
            tl.store(listed_ptr + out, tl.sum(tl.where(chosen, weight, 0.0), axis=1), mask=ranked)
            tl.store(counts_ptr + out, tl.sum(chosen.to(tl.int32), axis=1), mask=ranked)
            _list(segments_ptr, out, at, chosen, SEGMENT)


@triton.jit
def _list(segments_ptr, out, at, chosen, SEGMENT: tl.constexpr):
    """Put the `chosen` [ROWS, N] of tokens `at` one after another into segments `out` [ROWS]."""
    place = tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    to_ptr = segments_ptr + out.to(tl.int64)[:, None] * SEGMENT + place
    tl.store(to_ptr, at + tl.zeros_like(place), mask=chosen & (place < SEGMENT))


@triton.jit(do_not_specialize=["rows"])
def gather_segments(
    counts_ptr,  # int32 [rows, CHUNKS]
    segments_ptr,  # int32 [rows, CHUNKS, SEGMENT]
    temperature_ptr,  # float64 [rows]
    top_k_ptr,  # int64 [rows]
    top_p_ptr,  # float64 [rows]
    highest_ptr,  # float64 [rows]
    finite_ptr,  # int32 [rows]
    ids_ptr,  # int32 [rows, LISTED]
    rows,
    CHUNKS: tl.constexpr,
    SEGMENT: tl.constexpr,
    LISTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Put what the chunks have listed one after another."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    _, ranked, _, _ = asked(temperature_ptr, top_k_ptr, top_p_ptr, highest_ptr, finite_ptr, row, real)
    if tl.max(ranked.to(tl.int32), axis=0) > 0:
        chunk = tl.arange(0, WIDTH)[None, :]
        inside = ranked[:, None] & (chunk < CHUNKS)
        counts = tl.load(counts_ptr + row[:, None] * CHUNKS + chunk, mask=inside, other=0)
        before = tl.cumsum(counts, axis=1) - counts
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
        begun = (before[:, None, :] <= at[:, :, None]) & (chunk < CHUNKS)[:, None, :]
        own = tl.sum(begun.to(tl.int32), axis=2) - 1
        place = at - tl.max(tl.where(begun, before[:, None, :], 0), axis=2)
        held = ranked[:, None] & (at < tl.sum(counts, axis=1)[:, None]) & (place < SEGMENT)
        from_ptr = segments_ptr + (row[:, None] * CHUNKS + own).to(tl.int64) * SEGMENT + place
        to_ptr = ids_ptr + row.to(tl.int64)[:, None] * LISTED + at
        tl.store(to_ptr, tl.load(from_ptr, mask=held, other=0), mask=held)
