"""Mixtures in Triton: who is asked, that padding asks nobody, and bits that do not depend on who shares a step."""

from itertools import product

import pytest
import torch
from torch import Tensor

from kernels.ops import Routing
from kernels.packed import Packed
from kernels.triton import mixture, routing
from kernels.triton.case import Draw
from kernels.triton.launch import recording
from tests.kernels.proofs import DEVICE

DRAW = Draw(DEVICE)
HIDDEN, INNER, COUNT = 64, 32, 6
HOW = Routing(2, True)


def experts(kind: str) -> mixture.Experts:
    def matrix(out: int, inner: int, seed: int) -> Tensor | Packed:
        draw = Draw(DEVICE, seed)
        if kind == "plain":
            return draw.normal(out, inner, scale=0.2)
        return Packed(draw.integers(-8, 8, out, inner), draw.uniform(0.01, 0.02, out, inner // 32), 1, 32, 4)

    pairs = [[matrix(INNER, HIDDEN, 7 * e), matrix(INNER, HIDDEN, 7 * e + 1)] for e in range(COUNT)]
    downs = [matrix(HIDDEN, INNER, 7 * e + 2) for e in range(COUNT)]
    return mixture.prepare(pairs, downs, (), (), torch.bfloat16, DEVICE)


def answer(x: Tensor, scores: Tensor, of: mixture.Experts, slots: Tensor | None = None) -> Tensor:
    out = torch.full_like(x, torch.nan)
    mixture.mixture(x, scores, of, HOW, "silu", out, slots=slots, deterministic=True)
    return out


@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_a_token_gets_the_same_bits_whatever_shares_the_step(kind: str) -> None:
    of = experts(kind)
    x, scores = DRAW.normal(5, HIDDEN), DRAW.normal(5, COUNT, dtype=torch.float32)
    together = answer(x, scores, of)
    assert torch.equal(answer(x[3:4].contiguous(), scores[3:4].contiguous(), of), together[3:4])
    assert torch.equal(answer(x.flip(0), scores.flip(0), of).flip(0), together)


def test_a_padded_token_asks_nobody_and_its_answer_is_zero() -> None:
    of = experts("plain")
    x, scores = DRAW.normal(3, HIDDEN), DRAW.normal(3, COUNT, dtype=torch.float32)
    alone = answer(x[:1].contiguous(), scores[:1].contiguous(), of)
    x[1:] = torch.nan
    padded = answer(x, scores, of, DRAW.given(torch.tensor([5, -1, -1])))
    assert torch.equal(padded[:1], alone)
    assert not padded[1:].any()


def test_a_step_without_tokens_asks_nobody() -> None:
    nothing = DRAW.normal(0, HIDDEN)
    assert answer(nothing, nothing.new_empty(0, COUNT, dtype=torch.float32), experts("plain")).shape == (0, HIDDEN)


def test_scores_that_are_no_numbers_show_in_the_answer() -> None:
    x, scores = DRAW.normal(2, HIDDEN), DRAW.normal(2, COUNT, dtype=torch.float32)
    scores[1, 4] = torch.nan
    finite = answer(x, scores, experts("plain")).isfinite().all(-1)
    assert finite.tolist() == [True, False]


def test_of_equal_scores_the_lower_experts_are_chosen() -> None:
    scores = DRAW.given(torch.tensor([[1.0, 2, 2, 2, 0, 2], [-torch.inf] * 6]))
    chosen = torch.empty(2, 3, dtype=torch.int32, device=DEVICE)
    routing.route(scores, Routing(3, False), None, chosen, torch.empty(2, 3, device=DEVICE))
    assert chosen.tolist() == [[1, 2, 3], [0, 1, 2]]


def test_starts_follow_from_the_number_of_tokens_alone() -> None:
    """So that a graph of them serves whatever is chosen, and all can be compiled before there is a device."""
    of = experts("plain")
    of = of._replace(
        **{name: part._replace(codes=part.codes.to("meta")) for name, part in of._asdict().items() if part}
    )
    found = []
    for scores in (torch.empty(40, COUNT, device="meta"), torch.empty(40, COUNT, device="meta")):
        x = torch.empty(40, HIDDEN, dtype=torch.bfloat16, device="meta")
        with recording() as started:
            mixture.mixture(x, scores, of, HOW, "silu", torch.empty_like(x))
        found.append([(start.grid, dict(start.options)) for start in started])
    assert found[0] == found[1]
    assert len(found[0]) == 5


def test_tiles_are_enough_however_entries_choose() -> None:
    for entries, count, rows in product(range(1, 8), (1, 2, 3), (1, 2, 4)):
        ways = (some for some in product(range(entries + 1), repeat=count) if sum(some) == entries)
        worst = max(sum(-(-each // rows) for each in some) for some in ways)
        assert routing.most_tiles(entries, count, rows) >= worst
