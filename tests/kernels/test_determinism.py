"""Deterministic mode: a row has the same bits wherever it lies and whatever is beside it, on one thread or two."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.cpu import CpuBackend
from kernels.ops import Attending, Backend, Heads, KvSpec, Rows
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


def check_product(inside: int, out: int) -> None:
    for ops in backends():
        dtype = getattr(ops, "dtype", torch.float32)
        weight = ops.prepare_linear([noise(out, inside, seed=1)])
        row = noise(1, inside, seed=2).to(dtype)
        expected = ops.linear(torch.nn.functional.pad(row, (0, 0, 0, 15)), weight)[0]
        for position in (0, 7, 15, 16, 29, 47):
            x = noise(48, inside, seed=position + 3).to(dtype)
            x[position] = row
            assert torch.equal(ops.linear(x, weight)[position], expected)


@pytest.mark.usefixtures("_threads")
def test_norm_and_gate_give_a_row_the_same_bits_wherever_it_lies() -> None:
    for ops in backends():
        dtype = getattr(ops, "dtype", torch.float32)
        row, weight = noise(1, 3000, seed=1).to(dtype), ops.prepare_vector(noise(3000, seed=2))
        norm, gate = ops.rms_norm(row.repeat(16, 1), weight, 1e-5)[0], ops.gated(row.repeat(16, 1), "silu")[0]
        for position in (0, 13, 41, 79):  # enough rows that torch would share them out among its threads
            x = noise(80, 3000, seed=position).to(dtype)
            x[position] = row
            assert torch.equal(ops.rms_norm(x, weight, 1e-5)[position], norm)
            assert torch.equal(ops.gated(x, "silu")[position], gate)


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


@pytest.mark.usefixtures("_threads")
def test_attention_of_one_token_has_the_same_bits_among_many() -> None:
    heads, ops = Heads(8, 2, 16), CpuBackend(deterministic=True)
    qkv = noise(70, (heads.query + 2 * heads.kv) * heads.dim, seed=1)
    alone = attend(ops, heads, qkv, 16, cuts=[69, 70], beside=[])
    among = attend(ops, heads, qkv, 16, cuts=[69, 70], beside=[1, 40, 1, 70, 1, 300, 1, 33])
    assert torch.equal(alone, among)


def attend(ops: Backend, heads: Heads, qkv: Tensor, block_size: int, cuts: list[int], beside: list[int]) -> Tensor:
    """Attention of one sequence computed up to each of `cuts` in turn, with other rows before and after it.

    `beside` gives the others' context lengths: each brings one token, or all if it is in an odd place.
    """
    length = len(qkv)
    own = -(-length // block_size)
    others = [-(-n // block_size) for n in beside]
    pages = torch.randperm(own + sum(others), generator=torch.Generator().manual_seed(1)).tolist()
    kv = ops.allocate_kv(KvSpec(1, len(pages), block_size, heads.kv, heads.dim))
    rope = ops.prepare_rope(INV_FREQ, 512)
    tables = [tuple(pages.pop() for _ in range(n)) for n in (own, *others)]
    dtype = getattr(ops, "dtype", torch.float32)
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
        q = ops.rope_and_write_kv(fit.to(dtype), heads, rope, kv, 0, batch)
        parts.append(
            ops.paged_attention(q, heads, Attending(heads.dim**-0.5), kv, 0, batch)[first : first + end - start]
        )
    return torch.cat(parts)
