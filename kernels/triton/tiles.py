"""What prefill and decode attention share: queries against one tile of a row's keys and values after another.

    s = q·k · scale, or softcap · tanh(q·k · scale / softcap);  p = 2^(s·log2(e) - m);  l = Σ p;  o = Σ p·v

m is the largest s·log2(e) so far; what was summed before is multiplied by 2^(old m - new m). Tiles start at
multiples of BLOCK_N from the row's first token, and one that a query does not see leaves its numbers as they are,
so the bits of an answer do not depend on the tiles that other queries need.

Codes are multiplied as they are: a key's scale goes to the scores, a value's to the shares.

Source: Dao et al., "FlashAttention", NeurIPS 2022; Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018; Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024 (sinks).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import Attending, Heads
from kernels.triton.configs import Config, config
from kernels.triton.functions import tanh
from kernels.triton.kv_cache import KvPages, check_type
from kernels.triton.lang import INTERPRET, LOG2E, dot, round_to

WIDEST = 512  # numbers of a head, which a tile holds


@triton.jit
def widen(x, DOT: tl.constexpr):
    """Numbers or codes in the type in which they are multiplied; the interpreter's `dot` does so itself."""
    if INTERPRET:
        return x
    else:
        return x.to(DOT)


@triton.jit
def load_queries(at, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr):
    """Queries [BLOCK_M, BLOCK_D] that begin at the pointers `at` [BLOCK_M]."""
    offs = tl.arange(0, BLOCK_D)[None, :]
    q = tl.load(at[:, None] + offs, mask=mask[:, None] & (offs < D), other=0.0)
    if tl.float16 == DOT:  # what is larger is taken for the largest
        return tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(DOT)
    else:
        return widen(q, DOT)


@triton.jit
def begin(sinks_ptr, q_head, mask, HAS_SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """m, l, o and its unit before any key; a sink, where the mask has it, is a score without value."""
    if HAS_SINKS:
        most = tl.load(sinks_ptr + q_head, mask=mask, other=float("-inf")) * LOG2E
        total = tl.where(mask, 1.0, 0.0)
    else:
        most = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    return most, total, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), 1e-30


@triton.jit
def pages_of(table_ptr, start, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of each token start .. start + BLOCK_N - 1, or the one page of all; past the end there is none."""
    if PAGE % BLOCK_N == 0:
        return tl.load(table_ptr + start // PAGE, mask=start < end, other=0)
    else:
        offs = tl.arange(0, BLOCK_N)
        at = start // PAGE + offs // PAGE if BLOCK_N % PAGE == 0 else (start + offs) // PAGE
        return tl.load(table_ptr + at, mask=start + offs < end, other=0)


@triton.jit
def places(
    ptr, page, head, start, SIZE: tl.constexpr, HKV: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Pointers [BLOCK_N] to what tokens have in their pages: SIZE numbers each, at `ptr` of all pages."""
    offs = tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:
        within = start % PAGE + offs
    elif BLOCK_N % PAGE == 0:  # tiles start at multiples of BLOCK_N
        within = offs % PAGE
    else:
        within = (start + offs) % PAGE
    return (ptr + head * (PAGE * SIZE) + within * SIZE) + page.to(tl.int64) * (HKV * PAGE * SIZE)


@triton.jit
def load_tile(at, is_token, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Vectors [BLOCK_N, BLOCK_D] at pointers [BLOCK_N]; zeros beyond a row's end, whatever is there."""
    offs = tl.arange(0, BLOCK_D)[None, :]
    at = at[:, None] + offs
    if MASKED:
        return tl.load(at, mask=is_token[:, None] & (offs < D), other=0.0)
    elif D < BLOCK_D:
        return tl.load(at, mask=offs < D, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _scores(
    q, keys, key_scale_at, token, position, end, inner,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_M, BLOCK_N] of a tile, before they are multiplied by `step`."""
    scores = dot(q, tl.trans(widen(keys, DOT)), tl.zeros([q.shape[0], keys.shape[0]], tl.float32))
    if CODES:
        scores = scores * tl.load(key_scale_at, mask=token < end, other=0.0)[None, :]
    if CAPPED:
        scores = tanh(scores * inner)
    if MASKED:
        seen = token[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (token[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def attend(
    q, most, total, out, unit, position,
    keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, table_ptr,
    head, low, high, end, inner, step,
    HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """m, l, o and its unit after the keys of tokens low .. high - 1; low is a multiple of BLOCK_N.

    `inner` and `step` are as `factors` has them. MASKED: there are queries that do not see all of these keys;
    position [BLOCK_M] is theirs, and `end` the row's length. EXACT: what rounding takes from shares is multiplied
    with values, too.

    Codes fit float16, to which a device takes them at less cost than to bfloat16; what they stand for may not. So
    if DOT is float16, values and o are multiples of `unit`, the largest scale of values so far.
    """
    CODES: tl.constexpr = keys_ptr.dtype.element_ty.primitive_bitwidth == 8
    page = pages_of(table_ptr, low, end, PAGE, BLOCK_N)
    for start in range(low, high, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        key_at = places(keys_ptr, page, head, start, D, HKV, PAGE, BLOCK_N)
        value_at = places(values_ptr, page, head, start, D, HKV, PAGE, BLOCK_N)
        key_scale_at = places(key_scales_ptr, page, head, start, 1, HKV, PAGE, BLOCK_N) if CODES else None
        weight_at = places(value_scales_ptr, page, head, start, 1, HKV, PAGE, BLOCK_N) if CODES else None
        page = pages_of(table_ptr, start + BLOCK_N, end, PAGE, BLOCK_N)  # known before its keys are asked for
        keys = load_tile(key_at, token < end, D, BLOCK_D, MASKED)
        scores = _scores(
            q, keys, key_scale_at, token, position, end, inner, WINDOW, CAPPED, DOT, MASKED, CODES
        )  # fmt: skip
        newest = tl.maximum(most, tl.max(scores, axis=1) * step)
        base = tl.where(newest == float("-inf"), 0.0, newest) if WINDOW > 0 else newest
        shares = tl.exp2(tl.fma(scores, step, -base[:, None]))
        fade = tl.exp2(most - base)
        most, total = newest, total * fade + tl.sum(shares, axis=1)
        values = load_tile(value_at, token < end, D, BLOCK_D, MASKED)
        if CODES:
            weights = tl.load(weight_at, mask=token < end, other=0.0)
            if tl.float16 == DOT:
                before, unit = unit, tl.maximum(unit, tl.max(weights, axis=0))
                fade = fade * (before / unit)
                values = values.to(DOT) * (weights / unit).to(DOT)[:, None]
            else:
                shares = shares * weights[None, :]
        values, rounded, out = widen(values, DOT), round_to(shares, DOT), out * fade[:, None]
        if EXACT:
            out = dot(round_to(shares - rounded.to(tl.float32), DOT), values, out)
        out = dot(rounded, values, out)
    return most, total, out, unit


@triton.jit
def store_answers(ptr, place, out, total, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """o / l to the vectors at `place` [BLOCK_M]; where no key was seen, zeros."""
    offs = tl.arange(0, BLOCK_D)[None, :]
    answers = round_to(out / tl.where(total > 0, total, 1.0)[:, None], ptr.dtype.element_ty)
    tl.store(ptr + place[:, None] * D + offs, answers, mask=mask[:, None] & (offs < D))


def factors(attending: Attending) -> tuple[float, float]:
    """What q·k is multiplied by inside of tanh, where scores are capped, and then, to be scores to base 2."""
    log2e = 1.0 / math.log(2.0)
    if attending.softcap:
        return attending.scale / attending.softcap, attending.softcap * log2e
    return 1.0, attending.scale * log2e


def constants(q: Tensor, heads: Heads, attending: Attending, kv: KvPages, for_codes: tl.dtype) -> dict[str, Any]:
    """Of both kernels.

    Args:
        q: queries.
        heads: of these.
        attending: how.
        kv: pages.
        for_codes: what codes are multiplied in, where queries are not float32.

    Raises:
        ValueError: heads are too long, or scores would be turned round.
    """
    check_type(kv.keys.dtype)
    if heads.dim > WIDEST or attending.scale <= 0 or q.stride(-1) != 1:
        raise ValueError(f"{heads}, {attending}: heads have at most {WIDEST} numbers, and scales are positive")
    dot_type = for_codes if kv.key_scales is not None else _DOT[q.dtype]
    if torch.float32 in (q.dtype, kv.keys.dtype):
        dot_type = tl.float32
    return {
        "HQ": heads.query,
        "HKV": heads.kv,
        "D": heads.dim,
        "PAGE": kv.spec.block_size,
        "WINDOW": attending.window,
        "CAPPED": attending.softcap != 0,
        "HAS_SINKS": attending.sinks is not None,
        "DOT": dot_type,
        "BLOCK_D": max(16, triton.next_power_of_2(heads.dim)),
    }


def tile_config(kernel: str, kv: KvPages, shape: dict[str, Any], size: int) -> Config:
    """The configuration of a kernel, which has a table for each width of heads and each kind of pages."""
    name = f"{kernel}_{max(64, shape['BLOCK_D'])}"
    if shape["DOT"] == tl.float32:
        return config(f"{name}_float32", size)
    return config(f"{name}_codes" if kv.key_scales is not None else name, size)


_DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def case_name(heads: Heads, attending: Attending) -> str:
    """Of a case, in part."""
    return f"{heads.query} and {heads.kv} heads of {heads.dim}, {attending.window} {attending.softcap:g}"
