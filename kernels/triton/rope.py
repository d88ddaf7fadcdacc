"""Queries and keys normed and rotated, keys and values written to their pages, in one pass over a projection.

    y = norm(x);  (y[i], y[i + n]) -> (y[i]·cos - y[i + n]·sin, y[i + n]·cos + y[i]·sin) for i < n;  the rest stays

Source: Su et al., "RoFormer", 2021; Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", 2023
(norms of queries and keys).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import Heads, KvSpec, QkNorm
from kernels.triton.case import MODEL, Case, Draw, Expected, expect
from kernels.triton.configs import config
from kernels.triton.kv_cache import KvPages, check_type, pointers, random_pages
from kernels.triton.lang import round_to
from kernels.triton.launch import launch
from kernels.triton.quantise import expect_codes, largest_of, row_scale

_NUMBERS = 1024
"""That a program holds, where its norm does not need all of a token."""


@triton.jit
def _rope_and_write(
    qkv_ptr,  # [T, (HQ + 2 · HKV) · D]; queries are rotated in place
    positions_ptr,  # int32 [T]
    slots_ptr,  # int64 [T]
    cos_ptr,  # float32 [positions, N]
    sin_ptr,  # float32 [positions, N]
    query_weight_ptr,  # float32 [D], or [HQ · D] where WHOLE, or none
    key_weight_ptr,  # float32 [D], or [HKV · D] where WHOLE, or none
    keys_ptr,  # [pages, HKV, PAGE, D]
    values_ptr,  # as keys
    key_scales_ptr,  # float32 [pages, HKV, PAGE], or none
    value_scales_ptr,  # as key scales
    eps,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
    NORMED: tl.constexpr, WHOLE: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One token and QUERY_BLOCK query heads, or KEY_BLOCK KV heads, a program."""
    token, part, pair = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_N)
    x_ptr = qkv_ptr + token * ((HQ + 2 * HKV) * D)
    angle = tl.load(positions_ptr + token).to(tl.int64) * N + pair
    cos = tl.load(cos_ptr + angle, mask=pair < N, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=pair < N, other=0.0)[None, :]
    if part < tl.cdiv(HQ, QUERY_BLOCK):
        head = part * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
        first, second, rest = _normed(
            x_ptr, query_weight_ptr, eps, head, HQ, D, N, NORMED, WHOLE, BLOCK_N, BLOCK_REST
        )
        _store(x_ptr, head * D, head < HQ, first * cos - second * sin, second * cos + first * sin, rest, D, N)
    else:
        slot = tl.load(slots_ptr + token)
        if slot < 0:
            return
        kv_head = (part - tl.cdiv(HQ, QUERY_BLOCK)) * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
        vector, mask = (slot // PAGE * HKV + kv_head) * PAGE + slot % PAGE, kv_head < HKV
        # Names of their own: a compiled branch must leave the shapes of the other one's.
        k1, k2, k3 = _normed(
            x_ptr + HQ * D, key_weight_ptr, eps, kv_head, HKV, D, N, NORMED, WHOLE, BLOCK_N, BLOCK_REST
        )
        _write(keys_ptr, key_scales_ptr, vector, mask, k1 * cos - k2 * sin, k2 * cos + k1 * sin, k3, D, N)
        v1, v2, v3 = _load(x_ptr + (HQ + HKV) * D, kv_head * D, mask, D, N, BLOCK_N, BLOCK_REST)
        _write(values_ptr, value_scales_ptr, vector, mask, v1, v2, v3, D, N)


@triton.jit
def _load(ptr, start, mask, D: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_REST: tl.constexpr):
    """The halves that are rotated, and the rest, of vectors that begin at `start`; in float32."""
    pair, rest = tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_REST)[None, :]
    at, mask = ptr + start[:, None], mask[:, None]
    first = tl.load(at + pair, mask=mask & (pair < N), other=0.0).to(tl.float32)
    second = tl.load(at + N + pair, mask=mask & (pair < N), other=0.0).to(tl.float32)
    last = tl.load(at + 2 * N + rest, mask=mask & (rest < D - 2 * N), other=0.0).to(tl.float32)
    return first, second, last


@triton.jit
def _store(ptr, start, mask, first, second, last, D: tl.constexpr, N: tl.constexpr):
    """What `_load` loads, back; in the type of `ptr`."""
    pair, rest = tl.arange(0, first.shape[1])[None, :], tl.arange(0, last.shape[1])[None, :]
    at, mask = ptr + start[:, None], mask[:, None]
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(at + pair, round_to(first, dtype), mask=mask & (pair < N))
    tl.store(at + N + pair, round_to(second, dtype), mask=mask & (pair < N))
    tl.store(at + 2 * N + rest, round_to(last, dtype), mask=mask & (rest < D - 2 * N))


@triton.jit
def _normed(
    x_ptr,
    weight_ptr,
    eps,
    head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    NORMED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Heads of a token, normed where they are to be."""
    mask = head < HEADS
    first, second, rest = _load(x_ptr, head * D, mask, D, N, BLOCK_N, BLOCK_REST)
    if NORMED:
        total = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1) + tl.sum(rest * rest, axis=1)
        if WHOLE:  # one program has all heads
            root = tl.rsqrt(tl.sum(total, axis=0) / (HEADS * D) + eps)
            w1, w2, w3 = _load(weight_ptr, head * D, mask, D, N, BLOCK_N, BLOCK_REST)
        else:
            root = tl.rsqrt(total / D + eps)[:, None]
            w1, w2, w3 = _load(weight_ptr, tl.zeros_like(head), mask, D, N, BLOCK_N, BLOCK_REST)
        first, second, rest = first * root * w1, second * root * w2, rest * root * w3
    return first, second, rest


@triton.jit
def _write(ptr, scales_ptr, vector, mask, first, second, rest, D: tl.constexpr, N: tl.constexpr):
    """Vectors to their places in pages, as numbers, or as codes with a scale each."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if dtype.primitive_bitwidth == 8:
        most = tl.maximum(largest_of(first, 1), largest_of(second, 1))
        scale, inverse = row_scale(tl.maximum(most, largest_of(rest, 1)), dtype)
        tl.store(scales_ptr + vector, scale, mask=mask)
        inverse = inverse[:, None]
        first, second, rest = first * inverse, second * inverse, rest * inverse
    _store(ptr, vector * D, mask, first, second, rest, D, N)


def rope_and_write(
    qkv: Tensor,
    heads: Heads,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: KvPages,
    layer: int,
    norms: QkNorm | None,
) -> None:
    """Norm and rotate the queries in `qkv`, and write its keys, normed and rotated, and its values to pages.

    Args:
        qkv: [T, (query + 2·kv)·dim], contiguous; its first query·dim columns are changed.
        heads: how it splits.
        positions: int32 [T].
        slots: int64 [T]; where it is -1, nothing is written.
        cos: float32 [positions, n], n at most dim / 2.
        sin: as cos.
        kv: the pages.
        layer: of these.
        norms: before the rotation, with float32 weights; None: none.
    """
    check_type(kv.keys.dtype)
    shape = _shape(heads, norms, cos.shape[1])
    query_block, key_block = shape["QUERY_BLOCK"], shape["KEY_BLOCK"]
    launch(
        _rope_and_write,
        (len(qkv), triton.cdiv(heads.query, query_block) + triton.cdiv(heads.kv, key_block)),
        qkv,
        positions,
        slots,
        cos,
        sin,
        *(norms[:2] if norms else (None, None)),
        *pointers(kv, layer),
        norms.eps if norms else 0.0,
        PAGE=kv.spec.block_size,
        **shape,
        **config("rope_and_write", query_block * triton.next_power_of_2(heads.dim)),
    )


def _shape(heads: Heads, norms: QkNorm | None, pairs: int) -> dict[str, int]:
    """Constants of the kernel."""
    whole = norms is not None and norms.whole
    most = max(1, _NUMBERS // triton.next_power_of_2(heads.dim))
    return {
        "HQ": heads.query,
        "HKV": heads.kv,
        "D": heads.dim,
        "N": pairs,
        "NORMED": norms is not None,
        "WHOLE": whole,
        "QUERY_BLOCK": triton.next_power_of_2(heads.query if whole else min(heads.query, most)),
        "KEY_BLOCK": triton.next_power_of_2(heads.kv if whole else min(heads.kv, most)),
        "BLOCK_N": triton.next_power_of_2(max(1, pairs)),
        "BLOCK_REST": triton.next_power_of_2(max(1, heads.dim - 2 * pairs)),
    }


def reference(x: Tensor, weight: Tensor | None, eps: float, whole: bool, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [T, heads, dim] normed and rotated, in float64; cos and sin [T, n]."""
    x = x.double()
    if weight is not None:
        mean = x.square().mean((-2, -1) if whole else -1, keepdim=True)
        x = x / (mean + eps).sqrt() * weight.double().view(-1, x.shape[-1])
    n = cos.shape[-1]
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    first, second, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Norms of each kind or none, whole and partial rotation, every type of pages, slots of no page."""
    bf16, f32 = torch.bfloat16, torch.float32
    if scale == MODEL:
        for tokens in (1, 256, 8192):
            for kv_dtype in ("bfloat16", "int8", "float8"):
                yield _case(draw, tokens, Heads(32, 8, 128), 64, kv_dtype, None, bf16)
        yield _case(draw, 256, Heads(16, 8, 128), 64, "bfloat16", False, bf16)
        yield _case(draw, 256, Heads(32, 32, 128), 64, "bfloat16", True, bf16)
        return
    yield _case(draw, 5, Heads(5, 2, 16), 8, "bfloat16", None, bf16)
    yield _case(draw, 3, Heads(2, 2, 7), 2, "int8", None, bf16)
    yield _case(draw, 4, Heads(3, 1, 12), 6, "float8", False, bf16)
    yield _case(draw, 1, Heads(4, 2, 8), 4, "float32", True, f32)
    yield _case(draw, 2, Heads(6, 3, 10), 3, "int8", True, f32)


def _case(
    draw: Draw, tokens: int, heads: Heads, pairs: int, kv_dtype: str, whole: bool | None, dtype: torch.dtype
) -> Case:
    spec = KvSpec(2, tokens // 8 + 3, 16 if heads.dim >= 64 else 4, heads.kv, heads.dim)
    made = draw.normal(tokens, (heads.query + 2 * heads.kv) * heads.dim, dtype=dtype, scale=2.0)
    weights = [
        draw.normal(count * heads.dim if whole else heads.dim, dtype=torch.float32)
        for count in (heads.query, heads.kv)
    ]
    norms = None if whole is None else QkNorm(weights[0], weights[1], 1e-5, whole)
    places = torch.arange(tokens)
    positions, slots = (
        draw.given((places * 7 % 50).int()),
        draw.given(torch.where(places % 4 == 2, -1, places * 2)),
    )
    cos, sin = draw.uniform(-1, 1, 50, pairs), draw.uniform(-1, 1, 51, pairs)

    def run() -> tuple[Tensor, ...]:
        qkv, kv = made.clone(), random_pages(draw, spec, kv_dtype)
        rope_and_write(qkv, heads, positions, slots, cos, sin, kv, 1, norms)
        return (qkv, *_vectors(kv))

    def expected() -> tuple[Expected, ...]:
        x = made.view(tokens, -1, heads.dim)
        q, k, v = torch.split(x, [heads.query, heads.kv, heads.kv], dim=1)
        angles = cos[positions], sin[positions]
        q = reference(q, norms and norms.query, 1e-5, bool(whole), *angles)
        k = reference(k, norms and norms.key, 1e-5, bool(whole), *angles)
        queries = torch.cat([q.flatten(1), made[:, heads.query * heads.dim :].double()], dim=1)
        return (expect(queries, dtype), *_written(random_pages(draw, spec, kv_dtype), slots, (k, v.double())))

    nbytes = made.nbytes * 2
    return Case(f"rope_and_write {tokens} {heads} {pairs} {kv_dtype} {whole} {dtype}", run, expected, nbytes)


def _vectors(kv: KvPages) -> list[Tensor]:
    """Keys, and values, as the numbers they stand for [layers, pages, KV heads, page size, dim]."""
    pairs = ((kv.keys, kv.key_scales), (kv.values, kv.value_scales))
    return [codes if scales is None else codes.float() * scales[..., None] for codes, scales in pairs]


def _written(kv: KvPages, slots: Tensor, exact: tuple[Tensor, Tensor]) -> list[Expected]:
    """What layer 1 of the pages should hold, where vectors [T, KV heads, dim] were written to slots."""
    kept, size = slots >= 0, kv.spec.block_size
    pages, offsets = slots[kept] // size, slots[kept] % size
    found = []
    for before, vectors in zip(_vectors(kv), exact, strict=True):
        after, rounded = before.double(), before.double()
        exactly, nearly = _rounded(vectors[kept], kv.keys.dtype)
        after[1, pages, :, offsets] = exactly
        rounded[1, pages, :, offsets] = exactly if nearly is None else nearly
        found.append(Expected(after, rounded))
    return found


def _rounded(vectors: Tensor, dtype: torch.dtype) -> Expected:
    return expect_codes(vectors, dtype) if dtype.itemsize == 1 else expect(vectors, dtype)
