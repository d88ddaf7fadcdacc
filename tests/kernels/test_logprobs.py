"""Log probabilities are those of the softmax, ranks agree with the order, and a row's numbers are its own."""

import math

import pytest
import torch

from kernels.cpu import CpuBackend
from kernels.logprobs import logprobs
from kernels.ops import Backend
from kernels.reference import ReferenceBackend


def some(rows: int, vocabulary: int) -> torch.Tensor:
    """Logits of a bfloat16 model: many are equal."""
    generator = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, vocabulary, generator=generator) * 3).bfloat16().float()


@pytest.mark.parametrize("ops", [CpuBackend(), CpuBackend(deterministic=True), ReferenceBackend()])
def test_they_are_the_logarithms_of_the_softmax_with_ranks_in_order(ops: Backend) -> None:
    logits = some(30, 500)
    tokens = [(i * 37) % 500 for i in range(29)] + [int(logits[29].argmax())]
    found = ops.logprobs(logits, tokens, 20)
    logs = torch.log_softmax(logits.double(), -1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    for i, token in enumerate(tokens):
        assert found.logprob[i] == pytest.approx(float(logs[i, token]), abs=1e-12)
        assert int(order[i, found.rank[i] - 1]) == token
        assert found.top_ids[i] == order[i, :20].tolist()
        assert found.top_logprobs[i] == pytest.approx(logs[i, order[i, :20]].tolist(), abs=1e-12)
    assert found.rank[-1] == 1
    assert all(found.finite)


def test_none_of_the_likeliest_may_be_asked_for() -> None:
    found = logprobs(some(3, 50), [1, 2, 3], 0)
    assert found.top_ids == found.top_logprobs == [[], [], []]
    assert len(found.logprob) == 3


def test_more_than_there_are_gives_all() -> None:
    found = logprobs(some(1, 5), [0], 20)
    assert sorted(found.top_ids[0]) == [0, 1, 2, 3, 4]
    assert math.fsum(map(math.exp, found.top_logprobs[0])) == pytest.approx(1)


def test_a_row_has_the_same_bits_alone_and_in_slices_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, tokens = some(40, 3000), list(range(0, 120, 3))
    together = logprobs(logits, tokens, 5)
    for i in range(40):
        single = logprobs(logits[i : i + 1], tokens[i : i + 1], 5)
        assert [field[0] for field in single] == [field[i] for field in together]
    monkeypatch.setattr("kernels.logprobs._AT_ONCE", 7 * 3000)
    assert logprobs(logits, tokens, 5) == together


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_reported_and_harms_no_other(bad: float) -> None:
    logits = some(3, 50)
    clean = logprobs(logits, [1, 2, 3], 2)
    logits[1, 7] = bad
    found = logprobs(logits, [1, 2, 3], 2)
    assert found.finite == [True, False, True]
    assert [field[::2] for field in found] == [field[::2] for field in clean]
