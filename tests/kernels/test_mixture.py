"""A mixture of experts is the textbook's: who is chosen, with what weight, and what they answer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.ops import ACTIVATIONS, Backend, Routing
from kernels.packed import Packed, dequantise
from tests.kernels.test_backends import GATES
from tests.kernels.textbook import BACKENDS, close, noise, padded

backends = pytest.mark.parametrize("ops", BACKENDS.values(), ids=BACKENDS.keys())
HIDDEN, INNER = 12, 10


class Mlps:
    """Experts with or without biases, as plain matrices and as a backend has them."""

    def __init__(self, count: int, biased: bool) -> None:
        self.gates = [noise(INNER, HIDDEN, seed=i) for i in range(count)]
        self.ups = [noise(INNER, HIDDEN, seed=100 + i) for i in range(count)]
        self.downs = [noise(HIDDEN, INNER, seed=200 + i) * 0.3 for i in range(count)]
        sizes = (INNER, INNER, HIDDEN)
        self.biases = [
            [noise(n, seed=300 + 3 * i + j) * biased for j, n in enumerate(sizes)] for i in range(count)
        ]
        self.biased = biased

    def prepare(self, ops: Backend) -> object:
        pairs = [[gate, up] for gate, up in zip(self.gates, self.ups, strict=True)]
        if not self.biased:
            return ops.prepare_experts(pairs, self.downs)
        return ops.prepare_experts(pairs, self.downs, [b[:2] for b in self.biases], [b[2] for b in self.biases])

    def answer(self, expert: int, x: Tensor, activation: str) -> Tensor:
        b = [bias.double() for bias in self.biases[expert]]
        gate, up = self.gates[expert].double() @ x + b[0], self.ups[expert].double() @ x + b[1]
        return self.downs[expert].double() @ GATES[activation](gate, up) + b[2]


def mix(x: Tensor, scores: Tensor, mlps: Mlps, routing: Routing, activation: str) -> Tensor:
    """In float64, a token and an expert at a time; scores [T, experts]."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, row in enumerate(scores.double().tolist()):
        chosen = sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[: routing.top_k]
        masses = torch.exp(torch.tensor(row, dtype=torch.float64) - max(row))
        total = masses[chosen].sum() if routing.normalise else masses.sum()
        for expert in chosen:
            out[t] += masses[expert] / total * mlps.answer(expert, x[t].double(), activation)
    return out


@backends
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.sampled_from(ACTIVATIONS),
)
def test_each_token_gets_its_experts_answers_by_their_weights(
    ops: Backend, experts: int, top_k: int, tokens: int, normalise: bool, biased: bool, activation: str
) -> None:
    routing, mlps = Routing(min(top_k, experts), normalise), Mlps(experts, biased)
    x, router, bias = (
        noise(tokens, HIDDEN, seed=1),
        noise(experts, HIDDEN, seed=2),
        noise(experts, seed=3) * biased,
    )
    prepared = ops.prepare_linear([router], [bias] if biased else [])
    answer = ops.mixture(padded(ops, x), prepared, mlps.prepare(ops), routing, activation)
    scores = x.double() @ router.double().T + bias
    close(answer[:tokens], mix(x, scores, mlps, routing, activation), atol=1e-4)


@backends
@pytest.mark.parametrize("normalise", [True, False])
def test_of_equal_scores_the_lower_experts_are_chosen(ops: Backend, normalise: bool) -> None:
    bias = torch.tensor([0.0, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0])
    mlps, x, routing = Mlps(7, biased=False), noise(5, HIDDEN), Routing(4, normalise)
    router = ops.prepare_linear([torch.zeros(7, HIDDEN)], [bias])
    answer = ops.mixture(padded(ops, x), router, mlps.prepare(ops), routing, "silu")
    masses = torch.softmax(bias.double(), 0)
    total = masses[[1, 2, 3, 5]].sum() if normalise else 1
    for t in range(5):
        expected = [masses[i] / total * mlps.answer(i, x[t].double(), "silu") for i in (1, 2, 3, 5)]
        close(answer[t], torch.stack(expected).sum(0), atol=1e-4)


@backends
def test_experts_may_be_quantised(ops: Backend) -> None:
    mlps, x = Mlps(3, biased=True), noise(9, HIDDEN)
    for matrices in (mlps.gates, mlps.ups, mlps.downs):
        for i, matrix in enumerate(matrices):
            scales = matrix.abs().amax(1, keepdim=True) / 127
            codes = (matrix / scales).round().to(torch.int8)
            matrices[i] = Packed(codes, scales, rows=1, columns=matrix.shape[1], bits=8)  # type: ignore[call-overload]  # as a file may have it
    prepared = mlps.prepare(ops)
    for matrices in (mlps.gates, mlps.ups, mlps.downs):
        matrices[:] = [dequantise(matrix) for matrix in matrices]  # type: ignore[arg-type]  # they are packed now
    router, routing = noise(3, HIDDEN, seed=2), Routing(2, normalise=True)
    answer = ops.mixture(padded(ops, x), ops.prepare_linear([router]), prepared, routing, "silu")
    close(answer[:9], mix(x, x.double() @ router.double().T, mlps, routing, "silu"), atol=1e-4)
