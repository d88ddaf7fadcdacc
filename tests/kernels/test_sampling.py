"""Draws follow the probabilities they should, and each row draws as if it were alone."""

import math

import pytest
import torch
from torch import Tensor

from kernels.ops import Draw, Sampling
from kernels.sampling import sample

LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.5, 0.0, 2.0, -1.0, 0.5])


def sampling(uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    return Sampling(
        temperature=torch.full_like(uniform, temperature),
        top_k=torch.full(uniform.shape, top_k),
        top_p=torch.full_like(uniform, top_p),
        uniform=uniform,
        min_p=torch.zeros_like(uniform),
    )


def draw(rows: int, **params: float) -> Tensor:
    """Tokens of `rows` draws from LOGITS with evenly spread numbers in [0, 1)."""
    uniform = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    return torch.tensor(sample(LOGITS.expand(rows, -1), sampling(uniform, **params)).token_ids)  # type: ignore[arg-type]  # top_k is whole where given


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_frequencies_are_the_softmax_of_the_scaled_logits(temperature: float) -> None:
    rows = 20000
    frequencies = torch.bincount(draw(rows, temperature=temperature), minlength=8) / rows
    torch.testing.assert_close(frequencies, torch.softmax(LOGITS / temperature, -1), rtol=0, atol=2 / rows + 1e-7)


def test_top_k_keeps_the_k_likeliest_and_their_proportions() -> None:
    rows = 20000
    expected = torch.zeros(8)
    expected[[1, 3, 5]] = torch.softmax(LOGITS[[1, 3, 5]], -1)
    frequencies = torch.bincount(draw(rows, top_k=3), minlength=8) / rows
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=2 / rows + 1e-7)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    ordered = torch.softmax(LOGITS.double(), -1).sort(descending=True).values.cumsum(-1)
    for kept in range(1, 8):
        between = float(ordered[kept - 1] + ordered[kept - 2]) / 2 if kept > 1 else float(ordered[0]) / 2
        assert len(set(draw(5000, top_p=between).tolist())) == kept


def test_top_p_counts_within_what_top_k_left() -> None:
    third = torch.softmax(LOGITS.sort(descending=True).values[:3], -1)
    just_two = float(third[:2].sum()) - 1e-3
    assert set(draw(2000, top_k=3, top_p=just_two).tolist()) == {1, 3}


def test_equal_logits_are_kept_in_order_of_token_id() -> None:
    uniform = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    drawn = sample(torch.zeros(50, 6), sampling(uniform, top_k=2)).token_ids
    assert set(drawn) == {0, 1}


def test_temperature_zero_takes_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0], [7.0, 5.0, 7.0]])
    assert sample(logits, sampling(torch.rand(2).double(), temperature=0)).token_ids == [1, 0]


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    drawn = draw(1000, temperature=temperature)
    assert set(drawn.tolist()) == ({1} if temperature < 1 else set(range(8)))


@pytest.mark.parametrize("params", [{}, {"top_k": 4}, {"top_p": 0.9}])
def test_the_largest_random_number_never_leaves_the_kept_tokens(params: dict[str, float]) -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf, -800.0]])
    uniform = torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float64)
    logits[0, 2] = -900.0
    assert sample(logits, sampling(uniform, **params)).token_ids[0] in (0, 1)  # type: ignore[arg-type]  # as above


def test_a_row_draws_the_same_token_whatever_rows_are_beside_it() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 40
    logits = torch.randn(rows, 500, generator=generator) * 3
    together = Sampling(
        temperature=torch.rand(rows, generator=generator).double() * (torch.arange(rows) % 3 > 0),
        top_k=torch.arange(rows) % 7,
        top_p=torch.where(torch.arange(rows) % 2 == 0, 1.0, 0.8).double(),
        uniform=torch.rand(rows, generator=generator).double(),
        min_p=torch.zeros(rows).double(),
    )
    alone = [sample(logits[i : i + 1], row_of(together, i)).token_ids for i in range(rows)]
    assert sample(logits, together).token_ids == [token for tokens in alone for token in tokens]


def row_of(all_rows: Sampling, i: int) -> Sampling:
    """The parameters of one row, as if it were the only one."""
    temperature, top_k, top_p, uniform, min_p = (field[i : i + 1] for field in all_rows[:5])
    return Sampling(temperature, top_k, top_p, uniform, min_p)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_reported_and_harms_no_other(bad: float, temperature: float) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 4] = bad
    uniform = torch.full((3,), 0.5, dtype=torch.float64)
    result: Draw = sample(logits, sampling(uniform, temperature))
    healthy = sample(LOGITS[None], sampling(uniform[:1], temperature)).token_ids[0]
    assert result.finite == [True, False, True]
    assert (result.token_ids[0], result.token_ids[2]) == (healthy, healthy)
