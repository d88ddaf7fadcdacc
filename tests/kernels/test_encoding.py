"""Encoder ops: what they compute, and in deterministic mode the same bits wherever a row lies."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.cpu import CpuBackend
from kernels.encoder_ops import POINTWISE, POOLINGS, EncoderBackend, Looking, Passages, Span
from kernels.ops import Heads
from kernels.reference import ReferenceBackend

HEADS = Heads(3, 3, 16)
WIDTH = HEADS.query * HEADS.dim
INV_FREQ = [1.0, 0.3, 0.05, 0.004, 0.7, 0.2, 0.01, 0.001]
COUNTS = (37, 1, 300, 16, 129)


@pytest.fixture(params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def deterministic() -> list[ReferenceBackend | CpuBackend]:
    return [ReferenceBackend(), CpuBackend(deterministic=True), CpuBackend(torch.bfloat16, deterministic=True)]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def passages(counts: tuple[int, ...]) -> Passages:
    positions = [place for count in counts for place in range(count)]
    return Passages([0] * sum(counts), [0] * sum(counts), positions, counts)


def attended(ops: EncoderBackend, rows: list[Tensor], looking: Looking) -> list[Tensor]:
    """What rows of queries, keys and values come to that share a step."""
    batch = ops.begin_passages(passages(tuple(map(len, rows))))
    joined = torch.cat(rows)
    padded = torch.nn.functional.pad(joined, (0, 0, 0, len(batch.positions) - len(joined)))
    out = ops.attend(padded, looking, ops.prepare_turns(INV_FREQ, 512), batch)[: len(joined)]
    return list(torch.split(out, [len(row) for row in rows]))


def textbook(qkv: Tensor, looking: Looking) -> Tensor:
    """Attention of one row in float64, token by token."""
    q, k, v = qkv.double().view(len(qkv), 3, HEADS.query, HEADS.dim).unbind(1)
    angles = torch.outer(torch.arange(len(qkv)).float(), torch.tensor(INV_FREQ))[:, None].double()
    q, k = (turned(part, angles.cos(), angles.sin()) for part in (q, k))
    out = torch.empty(len(qkv), HEADS.query, HEADS.dim, dtype=torch.float64)
    for i in range(len(qkv)):
        reach = looking.reach or len(qkv)
        seen = slice(max(0, i - reach), i + reach + 1)
        weights = torch.softmax(torch.einsum("hd,khd->hk", q[i], k[seen]) * looking.scale, -1)
        out[i] = torch.einsum("hk,khd->hd", weights, v[seen])
    return out.flatten(1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@pytest.mark.parametrize("reach", [0, 1, 5, 64, 130, 400])
def test_each_row_attends_to_its_own_tokens_within_reach(reach: int) -> None:
    looking = Looking(HEADS, 0.3, reach)
    rows = [noise(count, 3 * WIDTH, seed=count) for count in COUNTS]
    for ops in (ReferenceBackend(torch.float64), ReferenceBackend(), CpuBackend(), CpuBackend(deterministic=True)):
        found = attended(ops, [row.to(ops.dtype) for row in rows], looking)
        for row, answers in zip(rows, found, strict=True):
            tolerance = 1e-6 if ops.dtype == torch.float64 else 1e-4
            torch.testing.assert_close(answers.double(), textbook(row, looking), rtol=0, atol=tolerance)


def test_a_row_that_is_no_number_leaves_the_others_alone() -> None:
    rows = [noise(20, 3 * WIDTH, seed=1), noise(9, 3 * WIDTH, seed=2)]
    for ops in (ReferenceBackend(), CpuBackend(), CpuBackend(deterministic=True)):
        clean = attended(ops, rows, Looking(HEADS, 0.3))[0]
        broken = attended(ops, [rows[0], rows[1] * math.nan], Looking(HEADS, 0.3))
        assert torch.equal(broken[0], clean)
        assert broken[1].isnan().all()


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("reach", [0, 20])
def test_a_row_attends_with_the_same_bits_whatever_shares_the_step(reach: int) -> None:
    for ops in deterministic():
        rows = [noise(count, 3 * WIDTH, seed=count).to(ops.dtype) for count in COUNTS]
        looking = Looking(HEADS, 0.3, reach)
        alone = [attended(ops, [row], looking)[0] for row in rows]
        for found in (attended(ops, rows, looking), attended(ops, rows[::-1], looking)[::-1]):
            assert all(map(torch.equal, found, alone))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("function", POINTWISE)
def test_functions_give_a_number_the_same_bits_wherever_it_lies(function: str) -> None:
    for ops in deterministic():
        row = noise(1, 1100, seed=1).to(ops.dtype) * 3
        expected = ops.pointwise(row, function)[0]
        for count, place in ((16, 0), (16, 15), (77, 40), (300, 299)):
            x = noise(count, 1100, seed=2).to(ops.dtype)
            x[place] = row
            assert torch.equal(ops.pointwise(x, function)[place], expected)


@pytest.mark.usefixtures("_threads")
def test_norms_and_vectors_give_a_row_the_same_bits_wherever_it_lies() -> None:
    for ops in deterministic():
        weight, bias = ops.prepare_vector(noise(770, seed=3)), ops.prepare_vector(noise(770, seed=4))
        row = noise(1, 770, seed=1).to(ops.dtype)
        normed, vector = ops.layer_norm(row, weight, bias, 1e-5)[0], ops.vectors(row, 1, normalise=True)[0]
        for count, place in ((16, 0), (16, 15), (300, 299)):
            x = noise(count, 770, seed=2).to(ops.dtype)
            x[place] = row
            assert torch.equal(ops.layer_norm(x, weight, bias, 1e-5)[place], normed)
            assert torch.equal(ops.vectors(x, count, normalise=True)[place], vector)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_span_is_pooled_with_the_same_bits_wherever_it_lies(pooling: str) -> None:
    for ops in deterministic():
        tokens = noise(37, 770, seed=1).to(ops.dtype)
        expected = ops.pool(tokens, [Span(0, 37)], pooling)[0]
        x = noise(200, 770, seed=2).to(ops.dtype)
        x[101:138] = tokens
        found = ops.pool(x, [Span(0, 101), Span(101, 37), Span(138, 62)], pooling)
        assert torch.equal(found[1], expected)
        assert ops.vectors(found, 3, normalise=False).shape == (3, 770)


def test_functions_are_those_of_torch() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    own = torch.nn.functional
    expected = {
        "gelu": own.gelu(x),
        "gelu_tanh": own.gelu(x, approximate="tanh"),
        "relu": own.relu(x),
        "sigmoid": x.sigmoid(),
        "silu": own.silu(x),
        "tanh": x.tanh(),
    }
    for name in POINTWISE:
        torch.testing.assert_close(ReferenceBackend(torch.float64).pointwise(x, name), expected[name])
        found = CpuBackend().pointwise(x.float(), name)
        torch.testing.assert_close(found.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_vector_of_zeros_stays_one() -> None:
    assert CpuBackend().vectors(torch.zeros(2, 5), 2, normalise=True).tolist() == [[0.0] * 5] * 2
