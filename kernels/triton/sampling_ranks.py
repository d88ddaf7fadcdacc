"""The last step of a draw: the token of each row, in the order of ids or, where top-k or top-p cut it, of ranks.

The order of ranks is by logit, and of equal ones the lower id first. With M(v) the weight of all tokens whose
logit is v or more, every question about that order is answered by one search for a logit v, four bits of its
key at a time: the highest with M(v) over some goal. The tokens that have this very logit share one weight w, so
that how many of them count is (goal - M(above v)) / w. So top-k finds its last token (with 1 for a
weight), top-p its last among these, and the random number its own.
"""

import triton
import triton.language as tl

from kernels.triton.sampling_rows import as_key, numbers, weights

_BITS = tl.constexpr(4)
_DIGITS = tl.constexpr(16)
_BELOW = tl.constexpr(2.0**-40)  # so that no rounding takes a random number beyond what all weigh
_LOWEST = tl.constexpr(-0x8000000000000000)


@triton.jit
def _source(ids_ptr, row, listed, at, inside, LISTED: tl.constexpr):
    """Tokens [ROWS, N] at places `at` [1, N] of the list, or of the whole row."""
    if LISTED > 0:
        held = tl.load(ids_ptr + row.to(tl.int64)[:, None] * LISTED + at, mask=inside & listed[:, None], other=0)
        return tl.where(listed[:, None], held, at)
    else:
        return tl.broadcast_to(at, inside.shape)


@triton.jit
def _amounts(
    logits_ptr, stride, ids_ptr, row, listed, count, highest, inverse, floor, by_count, pivots,
    BLOCK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """What tokens whose keys reach each of `pivots` [ROWS, N] weigh; or how many they are, where `by_count`."""
    total = tl.zeros_like(pivots).to(tl.float64)
    for start in range(0, tl.max(count, axis=0), BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = at < count[:, None]
        token = _source(ids_ptr, row, listed, at, inside, LISTED)
        x = numbers(logits_ptr, stride, row, token, inside)
        amount = tl.where(by_count[:, None], 1.0, weights(x, highest, inverse, floor))
        amount = tl.where(inside, amount, 0.0)
        reached = as_key(x)[:, :, None] >= pivots[:, None, :]
        total += tl.sum(tl.where(reached, amount[:, :, None], 0.0), axis=1)
    return total


@triton.jit
def _search(
    logits_ptr, stride, ids_ptr, row, listed, count, highest, inverse, floor, by_count, goal, reaches,
    BLOCK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The highest key [ROWS] such that tokens from it on weigh more than `goal`; or just as much, if `reaches`."""
    WIDTH: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth
    lowest: tl.constexpr = _LOWEST >> (64 - WIDTH)
    digits = tl.arange(0, _DIGITS)[None, :].to(tl.int64)
    key = tl.zeros_like(goal).to(tl.int64) + lowest
    step = tl.zeros_like(key) - (lowest >> (_BITS - 1))
    for _ in range(WIDTH // _BITS):
        pivots = key[:, None] + digits * step[:, None]
        amounts = _amounts(
            logits_ptr,
            stride,
            ids_ptr,
            row,
            listed,
            count,
            highest,
            inverse,
            floor,
            by_count,
            pivots,
            BLOCK,
            LISTED,
        )
        enough = (amounts > goal[:, None]) | (reaches[:, None] & (amounts == goal[:, None]))
        key += tl.sum(tl.where(enough & (digits > 0), 1, 0), axis=1) * step
        step = step >> _BITS
    return key


@triton.jit
def _around(
    logits_ptr, stride, ids_ptr, row, listed, count, highest, inverse, floor, key,
    BLOCK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Weight and number of the tokens above `key`; number of those that have it, and the weight of one."""
    above = tl.zeros_like(highest)
    more = tl.zeros_like(highest)
    equal = tl.zeros_like(highest)
    one = tl.zeros_like(highest)
    for start in range(0, tl.max(count, axis=0), BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = at < count[:, None]
        x = numbers(logits_ptr, stride, row, _source(ids_ptr, row, listed, at, inside, LISTED), inside)
        weight = weights(x, highest, inverse, floor)
        over = inside & (as_key(x) > key[:, None])
        same = inside & (as_key(x) == key[:, None])
        above += tl.sum(tl.where(over, weight, 0.0), axis=1)
        more += tl.sum(tl.where(over, 1.0, 0.0), axis=1)
        equal += tl.sum(tl.where(same, 1.0, 0.0), axis=1)
        one = tl.maximum(one, tl.max(tl.where(same, weight, 0.0), axis=1))
    return above, more, equal, one


@triton.jit
def _nth(
    logits_ptr, stride, ids_ptr, row, listed, count, key, nth, BLOCK: tl.constexpr, LISTED: tl.constexpr
):  # fmt: skip
    """The token [ROWS] that is number `nth`, from 0, among those that have `key`; -1: there is none."""
    seen = tl.zeros_like(key).to(tl.int32)
    found = seen - 1
    for start in range(0, tl.max(count, axis=0), BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = at < count[:, None]
        token = _source(ids_ptr, row, listed, at, inside, LISTED)
        same = inside & (as_key(numbers(logits_ptr, stride, row, token, inside)) == key[:, None])
        place = seen[:, None] + tl.cumsum(same.to(tl.int32), axis=1) - 1
        found = tl.maximum(found, tl.max(tl.where(same & (place == nth[:, None]), token, -1), axis=1))
        seen += tl.sum(same.to(tl.int32), axis=1)
    return found


@triton.jit
def choose_by_rank(
    logits_ptr, stride, ids_ptr, row, wanted, listed, count, highest, inverse, floor, top_k, top_p, uniform, mass,
    BLOCK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The tokens [ROWS] of rows that are `wanted`, out of `count` listed ones or all; `mass`: what all weigh."""
    last = tl.zeros_like(row).to(tl.int64) + _LOWEST  # the key of the last token kept so far
    ties = tl.zeros_like(mass) + 1e18  # how many of those with that key are kept
    kept = mass
    nth = tl.zeros_like(row).to(tl.int32)
    for stage in range(3):  # top-k, top-p, the draw
        by_count = wanted & (top_k > 0) & (stage == 0)
        goal = tl.where(by_count, top_k.to(tl.float64), top_p * kept)
        goal = tl.where(stage == 2, (uniform - uniform * _BELOW) * kept, goal)
        active = by_count | (wanted & (((stage == 1) & (top_p < 1)) | (stage == 2)))
        if tl.max(active.to(tl.int32), axis=0) > 0:
            reaches = active & (stage < 2)
            key = _search(
                logits_ptr, stride, ids_ptr, row, listed, count, highest, inverse, floor, by_count, goal, reaches,
                BLOCK, LISTED,
            )  # fmt: skip
            key = tl.maximum(key, last)
            above, more, equal, one = _around(
                logits_ptr, stride, ids_ptr, row, listed, count, highest, inverse, floor, key, BLOCK, LISTED
            )
            most = tl.maximum(tl.where(key == last, tl.minimum(ties, equal), equal), 1)
            lacking = tl.where(one > 0, (goal - above) / tl.where(one > 0, one, 1.0), 1.0)
            lacking = tl.minimum(tl.maximum(tl.where(by_count, goal - more, lacking), 0.0), most)
            whole = lacking.to(tl.int64).to(tl.float64)
            number = tl.minimum(tl.maximum(whole + tl.where(whole < lacking, 1.0, 0.0), 1.0), most)
            cut = active & (stage < 2) & (equal > 0)
            last = tl.where(cut | (stage == 2), key, last)
            ties = tl.where(cut, number, ties)
            kept = tl.where(cut, above + number * one, kept)
            nth = tl.where(stage == 2, tl.minimum(whole, most - 1), 0).to(tl.int32)
    return _nth(logits_ptr, stride, ids_ptr, row, listed, count, last, nth, BLOCK, LISTED)
