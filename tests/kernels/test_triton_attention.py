"""Attention and pages in Triton: bits that depend on nothing else in a step, and pages that nobody may read."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.ops import Attending, Heads, KvSpec, QkNorm
from kernels.triton import configs, layout
from kernels.triton.attention_decode import decode_attention
from kernels.triton.attention_prefill import prefill_attention
from kernels.triton.case import Draw
from kernels.triton.kv_cache import KV_TYPES, KvPages, allocate, random_pages, scrub
from kernels.triton.launch import Unsupported
from kernels.triton.rope import rope_and_write
from tests.kernels.proofs import DEVICE

HEADS = Heads(2, 1, 16)
SPEC = KvSpec(1, 24, 16, HEADS.kv, HEADS.dim)
PLAIN = Attending(0.25)


def table(pages: list[int]) -> Tensor:
    return torch.tensor([pages], dtype=torch.int32, device=DEVICE)


def prefill(
    q: Tensor, kv: KvPages, tables: Tensor, rows: list[tuple[int, int]], attending: Attending = PLAIN
) -> Tensor:
    """Answers to rows of (tokens before, tokens), whose queries lie one after another in q."""
    starts = torch.tensor([start for start, _ in rows], dtype=torch.int32, device=DEVICE)
    firsts = torch.tensor([0, *(count for _, count in rows)], device=DEVICE).cumsum(0).int()
    out = torch.empty_like(q)
    most = max(count for _, count in rows)
    prefill_attention(q, kv, 0, tables, starts, firsts, HEADS, attending, out, most, deterministic=True)
    return out


def decode(q: Tensor, kv: KvPages, tables: Tensor, lengths: list[int], most: int) -> Tensor:
    """Answers to one token of each row."""
    needed = layout.decode_workspace_bytes(len(q), most, HEADS.query, HEADS.kv, HEADS.dim) // 4
    workspace = torch.full((needed,), torch.nan, device=DEVICE) if needed else None
    out = torch.empty_like(q)
    counted = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    decode_attention(q, kv, 0, tables, counted, HEADS, PLAIN, out, workspace, most)
    return out


@pytest.mark.parametrize(
    ("kv_dtype", "attending"),
    [("bfloat16", PLAIN), ("int8", PLAIN), ("bfloat16", Attending(0.25, 50, 2.0))],
)
def test_an_answer_has_the_same_bits_however_its_row_is_cut_and_whatever_rows_share_the_step(
    kv_dtype: str, attending: Attending
) -> None:
    draw = Draw(DEVICE)
    kv, q = random_pages(draw, SPEC, kv_dtype), draw.normal(130, HEADS.query * HEADS.dim)
    own, other = table(list(range(11))), table(list(range(11, 22)))
    whole = prefill(q, kv, own, [(0, 130)], attending)
    for first, last in pairwise([0, 48, 112, 129, 130]):
        alone = prefill(q[first:last], kv, own, [(first, last - first)], attending)
        assert torch.equal(alone, whole[first:last]), f"tokens {first} to {last} alone"
    shared = torch.cat([q[:21], q[129:], q[:3]])
    answers = prefill(shared, kv, torch.cat([other, own, other]), [(20, 21), (129, 1), (5, 3)], attending)
    assert torch.equal(answers[21], whole[129]), "among others"


def test_what_lies_beyond_a_row_is_not_read() -> None:
    draw = Draw(DEVICE)
    kv, q = random_pages(draw, SPEC, "bfloat16"), draw.normal(3, HEADS.query * HEADS.dim)
    tables = torch.cat([table([3, 4, 5]), table([6, 7, 8]), table([9, 10, 11])])
    clean = decode(q, kv, tables, [20, 0, 33], 48), prefill(q, kv, tables, [(17, 3), (0, 0), (0, 0)])
    for pages in (kv.keys, kv.values):
        kept = pages.clone()
        pages.fill_(torch.nan)
        for page, used in ((3, 16), (4, 4), (9, 16), (10, 16), (11, 1)):
            pages[:, page, :, :used] = kept[:, page, :, :used]
    stale = decode(q, kv, tables, [20, 0, 33], 48), prefill(q, kv, tables, [(17, 3), (0, 0), (0, 0)])
    assert torch.equal(stale[0], clean[0])
    assert torch.equal(stale[1], clean[1])
    assert not clean[0][1].any(), "a row of no tokens is zeros"


def test_the_bucket_of_a_step_changes_no_bit_of_its_answers() -> None:
    draw = Draw(DEVICE)
    kv, q = random_pages(draw, SPEC, "bfloat16"), draw.normal(1, HEADS.query * HEADS.dim)
    tables = table(list(range(20)))
    assert torch.equal(decode(q, kv, tables, [300], 300), decode(q, kv, tables, [300], 4096))


def test_a_workspace_that_is_too_small_is_refused() -> None:
    draw = Draw(DEVICE)
    kv, q = random_pages(draw, SPEC, "bfloat16"), draw.normal(1, HEADS.query * HEADS.dim)
    lengths = torch.tensor([300], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="workspace"):
        decode_attention(q, kv, 0, table([0] * 20), lengths, HEADS, PLAIN, q.clone(), None, 300)


def test_float8_pages_are_refused_on_devices_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_capability", 86)
    kv = allocate(SPEC, "int8", DEVICE)
    qkv = torch.zeros(1, (HEADS.query + 2 * HEADS.kv) * HEADS.dim, device=DEVICE)
    place = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    angle = torch.zeros(1, 8, device=DEVICE)
    rope_and_write(qkv, HEADS, place.int(), place, angle, angle, kv, 0, None)
    with pytest.raises(Unsupported, match="capability"):
        allocate(SPEC, "float8", DEVICE)


@pytest.mark.parametrize("kv_dtype", KV_TYPES)
def test_pages_are_as_large_as_the_plan_says(kv_dtype: str) -> None:
    kv = allocate(KvSpec(3, 5, 16, 2, 24), kv_dtype, "cpu")
    size = sum(pages.nbytes for pages in kv[:4] if pages is not None)
    assert size == 3 * 5 * layout.kv_page_bytes(kv_dtype, 16, 2, 24)


def test_scrubbed_pages_are_zero_in_every_layer_and_others_are_not() -> None:
    kv = random_pages(Draw(DEVICE), KvSpec(2, 6, 4, 2, 8), "int8")
    before = [pages.clone() for pages in kv[:4] if pages is not None]
    scrub(kv, [4, 1])
    for old, new in zip(before, kv[:4], strict=True):
        assert new is not None
        assert not new[:, [1, 4]].any()
        assert torch.equal(new[:, [0, 2, 3, 5]], old[:, [0, 2, 3, 5]])


def test_keys_are_the_same_whatever_their_place_in_the_step() -> None:
    draw = Draw(DEVICE)
    made = draw.normal(5, (HEADS.query + 2 * HEADS.kv) * HEADS.dim)
    weight = draw.normal(HEADS.dim, dtype=torch.float32)
    cos, sin = draw.uniform(-1, 1, 9, 8), draw.uniform(-1, 1, 10, 8)[:9].contiguous()
    kept = []
    for order in ([0, 1, 2, 3, 4], [4, 2]):
        kv, slots = allocate(SPEC, "int8", DEVICE), torch.tensor(order, device=DEVICE)
        qkv = made[order].contiguous()
        rope_and_write(qkv, HEADS, slots.int(), slots, cos, sin, kv, 0, QkNorm(weight, weight, 1e-6))
        kept.append((kv.keys[0, 0, :, 4], kv.values[0, 0, :, 4], qkv[order.index(4)]))
    assert all(torch.equal(first, second) for first, second in zip(*kept, strict=True))


@pytest.mark.parametrize("kv_dtype", ["int8", "float8"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_key_or_value_that_is_no_number_stays_none_in_pages_of_codes(kv_dtype: str, wrong: float) -> None:
    kv, slots = allocate(SPEC, kv_dtype, DEVICE), torch.arange(3, device=DEVICE)
    qkv = Draw(DEVICE).normal(3, 4, HEADS.dim)
    qkv[1, 2, 5], qkv[2, 3, 15] = wrong, wrong  # a key's first half, and a value's rest
    angles = torch.ones(3, 6, device=DEVICE)
    rope_and_write(qkv.flatten(1), HEADS, slots.int(), slots, angles, angles, kv, 0, None)
    assert kv.key_scales is not None
    assert kv.value_scales is not None
    assert kv.key_scales[0, 0, 0, :3].isfinite().tolist() == [True, False, True]
    assert kv.value_scales[0, 0, 0, :3].isfinite().tolist() == [True, True, False]
