"""The last step of a draw: each row's token, in the order of ids, or of ranks where top-k or top-p cut it."""

import triton
import triton.language as tl

from kernels.triton.sampling_ranks import choose_by_rank
from kernels.triton.sampling_rows import asked, numbers, weights

_SLACK = tl.constexpr(2.0**-40)  # sums in two orders differ by less


@triton.jit
def _choose_by_id(
    logits_ptr, stride, masses_ptr, tokens_ptr, row, wanted, highest, inverse, floor, uniform,
    VOCABULARY: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the tokens at which the weight, summed in the order of ids, exceeds the share `uniform` of it."""
    chunk = tl.arange(0, WIDTH)[None, :]
    inside = wanted[:, None] & (chunk < CHUNKS)
    masses = tl.load(masses_ptr + row[:, None] * CHUNKS + chunk, mask=inside, other=0.0)
    sums = tl.cumsum(masses, axis=1)
    goal = uniform * tl.sum(masses, axis=1)
    last = tl.max(tl.where(masses > 0, chunk, 0), axis=1)
    own = tl.min(tl.where((masses > 0) & (sums > goal[:, None]), chunk, last[:, None]), axis=1)
    before = tl.sum(tl.where(chunk == own[:, None], sums - masses, 0.0), axis=1)
    at = own[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    inside = (at < VOCABULARY) & wanted[:, None]
    x = numbers(logits_ptr, stride, row, at, inside)
    weight = tl.where(inside, weights(x, highest, inverse, floor), 0.0)
    sums = before[:, None] + tl.cumsum(weight, axis=1)
    last = tl.max(tl.where(weight > 0, at, 0), axis=1)
    token = tl.min(tl.where((weight > 0) & (sums > goal[:, None]), at, last[:, None]), axis=1)
    tl.store(tokens_ptr + row, token, mask=wanted)


@triton.jit
def _searched(
    masses_ptr, listed_ptr, counts_ptr, row, ranked, top_k, top_p,
    VOCABULARY: tl.constexpr, CHUNKS: tl.constexpr, SEGMENT: tl.constexpr, LISTED: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """What all tokens of rows weigh, whether their lists have all that is kept, and how many to search."""
    chunk = tl.arange(0, WIDTH)[None, :]
    inside = ranked[:, None] & (chunk < CHUNKS)
    at = row[:, None] * CHUNKS + chunk
    mass = tl.sum(tl.load(masses_ptr + at, mask=inside, other=0.0), axis=1)
    listed = ranked & (row < 0)
    count = tl.where(ranked, VOCABULARY, 0)
    if LISTED > 0:
        counts = tl.load(counts_ptr + at, mask=inside, other=0)
        total = tl.sum(counts, axis=1)
        held = tl.sum(tl.load(listed_ptr + at, mask=inside, other=0.0), axis=1)
        fits = (tl.max(counts, axis=1) <= SEGMENT) & (total <= LISTED)
        enough = tl.where(top_k > 0, total >= top_k, held - held * _SLACK >= top_p * mass)
        listed = ranked & fits & enough
        count = tl.where(listed, total, count)
    return mass, listed, count


@triton.jit(do_not_specialize=["stride", "rows"])
def choose_tokens(
    logits_ptr,  # [rows, VOCABULARY], float32 or float64
    stride,
    temperature_ptr,  # float64 [rows]
    top_k_ptr,  # int64 [rows]
    top_p_ptr, uniform_ptr, min_p_ptr, highest_ptr,  # float64 [rows]
    finite_ptr,  # int32 [rows]
    masses_ptr, listed_ptr,  # float64 [rows, CHUNKS]
    counts_ptr,  # int32 [rows, CHUNKS]
    ids_ptr,  # int32 [rows, LISTED]
    tokens_ptr,  # int32 [rows]
    rows,
    VOCABULARY: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    LISTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The token of each row that is drawn; the others keep theirs."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    drawn, ranked, inverse, highest = asked(
        temperature_ptr, top_k_ptr, top_p_ptr, highest_ptr, finite_ptr, row, real
    )
    plain = drawn & ~ranked
    floor = tl.load(min_p_ptr + row, mask=real, other=0.0)
    uniform = tl.load(uniform_ptr + row, mask=real, other=0.0)
    if tl.max(plain.to(tl.int32), axis=0) > 0:
        _choose_by_id(
            logits_ptr, stride, masses_ptr, tokens_ptr, row, plain, highest, inverse, floor, uniform,
            VOCABULARY, CHUNKS, CHUNK, WIDTH,
        )  # fmt: skip
    if tl.max(ranked.to(tl.int32), axis=0) > 0:
        top_k = tl.load(top_k_ptr + row, mask=real, other=0)
        top_p = tl.load(top_p_ptr + row, mask=real, other=1.0)
        mass, listed, count = _searched(
            masses_ptr, listed_ptr, counts_ptr, row, ranked, top_k, top_p,
            VOCABULARY, CHUNKS, SEGMENT, LISTED, WIDTH,
        )  # fmt: skip
        token = choose_by_rank(
            logits_ptr, stride, ids_ptr, row, ranked, listed, count, highest, inverse, floor, top_k, top_p,
            uniform, mass, BLOCK, LISTED,
        )  # fmt: skip
        tl.store(tokens_ptr + row, token, mask=ranked & (token >= 0))
