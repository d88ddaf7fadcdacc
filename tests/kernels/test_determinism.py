"""Deterministic mode: a row has the same bits wherever it lies and whatever is beside it, on one thread or two."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.cpu import CpuBackend
from kernels.native.backend import NativeBackend
from kernels.native.location import find_library
from kernels.ops import ACTIVATIONS, Attending, Backend, Heads, KvSpec, QkNorm, Routing, Rows
from kernels.packed import Packed
from kernels.reference import ReferenceBackend

SHAPES = [(48, 80), (192, 320), (192, 1280), (512, 192), (100, 60), (256, 688), (2048, 2048), (2048, 5632)]
INV_FREQ = [1.0, 0.3, 0.05, 0.004, 0.7, 0.2, 0.01, 0.001]


@pytest.fixture(params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def backends() -> list[Backend]:
    return [
        ReferenceBackend(),
        CpuBackend(deterministic=True),
        CpuBackend(torch.bfloat16, deterministic=True),
        *([NativeBackend(), NativeBackend(torch.bfloat16, "int8")] if find_library() else []),
    ]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_of_a_product_has_the_same_bits_wherever_it_lies(shape: tuple[int, int]) -> None:
    check_product(*shape)


@pytest.mark.usefixtures("_threads")
def test_products_large_enough_to_be_shared_among_threads_have_the_same_bits_too() -> None:
    check_product(1024, 1024)


@pytest.mark.usefixtures("_threads")
def test_logits_of_a_token_have_the_same_bits_whichever_others_are_asked_for() -> None:
    for ops in backends():
        dtype = getattr(ops, "dtype", torch.float32)
        head, x = ops.prepare_linear([noise(1000, 192, seed=1)]), noise(64, 192, seed=2).to(dtype)
        expected = ops.logits(x, head, [37])[0]
        for tokens in ([37, 1, 2], [5] * 20 + [37], list(range(64)), [63, 37]):
            assert torch.equal(ops.logits(x, head, tokens)[tokens.index(37)], expected)


QUANTISED = {
    "int4 groups": lambda codes, noise: Packed(codes & 15, noise(-1, 4), 1, 64, 4, zeros=noise(-1, 4)),
    "int8 rows": lambda codes, noise: Packed(codes.char(), noise(-1, 1), 1, 256, 8),
    "blocks of both": lambda codes, noise: Packed(codes, noise(-1, 2), 1, 128, 8, zeros=noise(-1, 2)),
    "a table": lambda codes, noise: Packed(codes & 15, noise(-1, 8), 1, 32, 4, table=noise(16)),
}


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_row_of_a_product_with_a_quantised_matrix_has_the_same_bits_wherever_it_lies(kind: str) -> None:
    codes = torch.randint(0, 256, (320, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    packed = QUANTISED[kind](codes, lambda *shape: noise(*(320 if n < 0 else n for n in shape), seed=2))
    check_product(256, 320, packed)


def check_product(inside: int, out: int, matrix: Packed | None = None) -> None:
    for ops in backends():
        dtype = getattr(ops, "dtype", torch.float32)
        weight = ops.prepare_linear([noise(out, inside, seed=1) if matrix is None else matrix])
        row = noise(1, inside, seed=2).to(dtype)
        expected = ops.linear(torch.nn.functional.pad(row, (0, 0, 0, 15)), weight)[0]
        for position in (0, 7, 15, 16, 29, 47):
            x = noise(48, inside, seed=position + 3).to(dtype)
            x[position] = row
            assert torch.equal(ops.linear(x, weight)[position], expected)


@pytest.mark.parametrize("threads", [1, 3])  # of two, each takes whole rows, and there is no odd end
def test_norms_and_gates_give_a_row_the_same_bits_wherever_it_lies(threads: int) -> None:
    torch.set_num_threads(threads)
    for ops in backends():
        dtype = getattr(ops, "dtype", torch.float32)
        row, raw = noise(1, 3002, seed=1).to(dtype), noise(3002, seed=2)
        alone, weights = row.repeat(16, 1), [ops.prepare_vector(raw), ops.prepare_vector(raw, 1.0)]
        norms = [ops.rms_norm(alone, weight, 1e-5)[0] for weight in weights]
        total = ops.add(alone, alone, 0.22)[0]
        gates = {activation: ops.gated(alone, activation)[0] for activation in ACTIVATIONS}
        for position in (0, 26, 53, 79):  # enough rows that torch would share them out among its threads
            x = noise(80, 3002, seed=position).to(dtype)
            x[position] = row
            for weight, norm in zip(weights, norms, strict=True):
                assert torch.equal(ops.rms_norm(x, weight, 1e-5)[position], norm)
            assert torch.equal(ops.add(x, x, 0.22)[position], total)
            for activation, gate in gates.items():
                assert torch.equal(ops.gated(x, activation)[position], gate)


@pytest.mark.usefixtures("_threads")
def test_bounded_logits_of_a_token_have_the_same_bits_whichever_others_are_asked_for() -> None:
    for ops in backends():
        dtype = getattr(ops, "dtype", torch.float32)
        head, x = ops.prepare_linear([noise(1003, 192, seed=1)]), noise(64, 192, seed=2).to(dtype)
        expected = ops.logits(x, head, [37], 0.3, 5.0)[0]
        for tokens in ([37, 1, 2], [5] * 20 + [37], [63, 37]):
            assert torch.equal(ops.logits(x, head, tokens, 0.3, 5.0)[tokens.index(37)], expected)


@pytest.mark.parametrize("normalise", [True, False])
def test_experts_answer_a_token_with_the_same_bits_whoever_else_asks_them(normalise: bool) -> None:
    check_experts(backends(), normalise)


@pytest.mark.usefixtures("_threads")
def test_experts_answer_with_the_same_bits_on_any_number_of_threads() -> None:
    check_experts(backends()[1:], normalise=True)


def check_experts(many: list[Backend], normalise: bool) -> None:
    for ops in many:
        dtype = getattr(ops, "dtype", torch.float32)
        router = ops.prepare_linear([noise(5, 100, seed=1)], [noise(5, seed=2)])
        experts = ops.prepare_experts(
            [[noise(60, 100, seed=10 + i), noise(60, 100, seed=20 + i)] for i in range(5)],
            [noise(100, 60, seed=30 + i) for i in range(5)],
        )
        row = noise(1, 100, seed=3).to(dtype)
        routing, padding = Routing(3, normalise), torch.zeros(15, 100, dtype=dtype)
        expected = ops.mixture(torch.cat([row, padding]), router, experts, routing, "silu")[0]
        for position, like in ((0, 0), (7, 15), (15, 3), (16, 0), (45, 47)):  # beside rows that choose as it does
            x = noise(48, 100, seed=position).to(dtype)
            x[:like] = row + noise(1, 100, seed=position + 50).to(dtype) / 64
            x[position] = row
            assert torch.equal(ops.mixture(x, router, experts, routing, "silu")[position], expected)


@pytest.mark.parametrize("block_size", [4, 16, 24, 80])
@pytest.mark.parametrize("heads", [Heads(8, 2, 16), Heads(6, 2, 16), Heads(3, 3, 16), Heads(8, 1, 16)], ids=str)
def test_attention_gives_a_sequence_the_same_bits_in_any_chunks_beside_any_rows(
    monkeypatch: pytest.MonkeyPatch, heads: Heads, block_size: int
) -> None:
    length = 2 * block_size + 21
    qkv = noise(length, (heads.query + 2 * heads.kv) * heads.dim, seed=1)
    for ops in backends():
        whole = attend(ops, heads, qkv, block_size, cuts=[length], beside=[])
        cuts = [block_size, 2 * block_size, length - 3, length - 2, length - 1, length]
        with monkeypatch.context() as patch:
            patch.setattr("kernels.cpu_attention._MAX_COPY", 1)  # tile by tile
            pieces = attend(ops, heads, qkv, block_size, cuts, beside=[1, 1, 30, 90])
        assert torch.equal(whole, pieces)


VARIANTS: dict[str, tuple[Attending, int, str]] = {
    "window": (Attending(0.25, window=37), 8, ""),
    "window of one": (Attending(0.25, window=1), 8, ""),
    "softcap": (Attending(0.25, softcap=3.0), 8, ""),
    "sinks": (Attending(0.25, sinks=noise(6, seed=9)), 8, ""),
    "window, softcap and sinks": (Attending(0.1, 50, 3.0, noise(6, seed=9)), 8, ""),
    "a norm for each head": (Attending(0.25), 8, "head"),
    "a norm for all heads": (Attending(0.25), 8, "whole"),
    "partial rotation": (Attending(0.25), 3, ""),
    "all of it": (Attending(0.1, 50, 3.0, noise(6, seed=9)), 3, "head"),
}


@pytest.mark.parametrize("variant", VARIANTS.keys())
@pytest.mark.parametrize("block_size", [16, 24])
def test_every_kind_of_attention_gives_a_sequence_the_same_bits_in_any_chunks_beside_any_rows(
    monkeypatch: pytest.MonkeyPatch, variant: str, block_size: int
) -> None:
    check_variant(monkeypatch, backends()[1:], variant, block_size)


@pytest.mark.usefixtures("_threads")
def test_all_kinds_together_have_the_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    check_variant(monkeypatch, [CpuBackend(deterministic=True)], "all of it", 16)


def check_variant(monkeypatch: pytest.MonkeyPatch, many: list[Backend], variant: str, block_size: int) -> None:
    heads, (attending, rotated, norms) = Heads(6, 2, 16), VARIANTS[variant]
    qkv = noise(170, (heads.query + 2 * heads.kv) * heads.dim, seed=1)
    for ops in many:
        prepared = None
        if norms:
            sizes = (heads.query * heads.dim, heads.kv * heads.dim) if norms == "whole" else (heads.dim, heads.dim)
            query, key = (ops.prepare_vector(noise(size, seed=size)) for size in sizes)
            prepared = QkNorm(query, key, 1e-6, whole=norms == "whole")
        how = How(attending, INV_FREQ[:rotated], prepared)
        whole = attend(ops, heads, qkv, block_size, cuts=[170], beside=[], how=how)
        cuts = [block_size, 3 * block_size, 6 * block_size, 168, 169, 170]
        beside = [1, 1, 30, 200, 169, 90]
        assert torch.equal(whole, attend(ops, heads, qkv, block_size, cuts, beside, how))
        with monkeypatch.context() as patch:
            patch.setattr("kernels.cpu_attention._MAX_COPY", 1)  # tile by tile
            assert torch.equal(whole, attend(ops, heads, qkv, block_size, cuts, beside[2:], how))


@pytest.mark.usefixtures("_threads")
def test_attention_of_one_token_has_the_same_bits_among_many() -> None:
    heads, ops = Heads(8, 2, 16), CpuBackend(deterministic=True)
    qkv = noise(70, (heads.query + 2 * heads.kv) * heads.dim, seed=1)
    alone = attend(ops, heads, qkv, 16, cuts=[69, 70], beside=[])
    among = attend(ops, heads, qkv, 16, cuts=[69, 70], beside=[1, 40, 1, 70, 1, 300, 1, 33])
    assert torch.equal(alone, among)


class How(NamedTuple):
    """How a layer attends, how much of a head it rotates, and its norms."""

    attending: Attending
    inv_freq: list[float]
    norms: QkNorm | None


def attend(
    ops: Backend,
    heads: Heads,
    qkv: Tensor,
    block_size: int,
    cuts: list[int],
    beside: list[int],
    how: How = How(Attending(0.25), INV_FREQ, None),  # noqa: B008  # a tuple of constants
) -> Tensor:
    """Attention of one sequence computed up to each of `cuts` in turn, with other rows before and after it.

    `beside` gives the others' context lengths: each brings one token, or all if it is in an odd place.
    """
    length = len(qkv)
    own = -(-length // block_size)
    others = [-(-n // block_size) for n in beside]
    pages = torch.randperm(own + sum(others), generator=torch.Generator().manual_seed(1)).tolist()
    kv = ops.allocate_kv(KvSpec(1, len(pages), block_size, heads.kv, heads.dim))
    rope = ops.prepare_rope(how.inv_freq, 512)
    tables = [tuple(pages.pop() for _ in range(n)) for n in (own, *others)]
    dtype = getattr(ops, "dtype", torch.float32)
    sinks = how.attending.sinks
    attending = how.attending if sinks is None else how.attending._replace(sinks=ops.prepare_vector(sinks))
    parts: list[Tensor] = []
    for start, end in zip([0, *cuts], cuts, strict=False):
        rows = [
            (n - 1, 1, table) if i % 2 else (0, n, table)
            for i, (n, table) in enumerate(zip(beside, tables[1:], strict=True))
        ]
        rows.insert(1, (start, end - start, tables[0]))
        first = rows[0][1] if len(rows) > 1 else 0
        total = sum(count for _, count, _ in rows)
        x = noise(-(-total // 16) * 16, qkv.shape[1], seed=end)
        x[first : first + end - start] = qkv[start:end]
        starts, counts, blocks = zip(*rows, strict=True)
        batch = ops.begin(Rows([0] * total, starts, counts, blocks), kv)
        fit = x if isinstance(ops, CpuBackend) else x[:total]
        q = ops.rope_and_write_kv(fit.to(dtype), heads, rope, kv, 0, batch, how.norms)
        parts.append(ops.paged_attention(q, heads, attending, kv, 0, batch)[first : first + end - start])
    return torch.cat(parts)
