"""Draws follow the probabilities they should, and each row draws as if it were alone."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels.ops import Adjustments, Draw, Sampling
from kernels.ordering import likeliest
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


def adjustments(
    banned: Sequence[tuple[int, int]] = (),
    bias: Sequence[tuple[int, int, float]] = (),
    penalties: Sequence[tuple[int, int, float, float]] = (),
) -> Adjustments:
    """Entries of (row, token, numbers)."""

    def columns(entries: Sequence[Sequence[float]], width: int) -> list[Tensor]:
        table = list(zip(*entries, strict=True)) or [()] * width
        return [
            torch.tensor(column, dtype=torch.int64 if i < 2 else torch.float64) for i, column in enumerate(table)
        ]

    rows, tokens = columns(banned, 2)
    places, biased, added = columns(bias, 3)
    where, known, repetition, taken = columns(penalties, 4)
    return Adjustments((rows, tokens), (places, biased, added), (where, known, repetition, taken))


def greedy(changes: Adjustments, rows: int = 1) -> list[int]:
    given = sampling(torch.zeros(rows).double(), temperature=0)
    return sample(LOGITS.repeat(rows, 1), given._replace(adjustments=changes)).token_ids


def test_greedy_rows_obey_bans_bias_and_penalties() -> None:
    assert greedy(adjustments()) == [1]
    assert greedy(adjustments(banned=[(0, 1), (0, 3)])) == [5]
    assert greedy(adjustments(bias=[(0, 2, 5.5), (0, 1, 0.4)])) == [2]
    assert greedy(adjustments(penalties=[(0, 1, 1.3, 0.0)])) == [3]
    assert greedy(adjustments(penalties=[(0, 1, 1.0, 0.6)])) == [3]


def test_penalties_follow_the_bias_and_a_penalty_moves_negative_logits_down_too() -> None:
    # 3.0 - 3.1 < 0: multiplied by 30, not divided.
    assert greedy(adjustments(bias=[(0, 1, -3.1)], penalties=[(0, 1, 30.0, 0.0), (0, 3, 2.6, 0.0)])) == [5]
    everything_else = [(0, token) for token in range(8) if token not in (4, 6)]
    assert greedy(adjustments(everything_else, penalties=[(0, 6, 0.5, -0.6)])) == [6]  # -1.0 / 2 + 0.6 beats 0.0


def test_an_adjusted_row_leaves_the_others_as_they_are() -> None:
    assert greedy(adjustments(banned=[(1, 1)], bias=[(3, 0, 9.0)]), rows=4) == [1, 3, 1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_every_token_is_banned_takes_the_likeliest(temperature: float) -> None:
    given = sampling(torch.full((2,), 0.9).double(), temperature)
    drawn = sample(
        LOGITS.repeat(2, 1), given._replace(adjustments=adjustments([(0, token) for token in range(8)]))
    )
    assert drawn.token_ids[0] == 1
    assert drawn.token_ids[1] == sample(LOGITS[None], sampling(given.uniform[:1], temperature)).token_ids[0]
    assert drawn.finite == [True, True]


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}], ids=str)
def test_the_most_extreme_numbers_leave_a_token_to_take(params: dict[str, float]) -> None:
    huge = adjustments(
        bias=[(0, 4, 1.7e308), (1, 4, -1.7e308)],
        penalties=[(0, 4, 1e-300, -1e300), (0, 1, 1e300, 0.0), (1, 2, 1e300, 1e308), (1, 4, 1e308, 1e308)],
    )
    given = sampling(torch.full((2,), 0.3).double(), **params)  # type: ignore[arg-type]  # top_k is whole where given
    drawn = sample(LOGITS.repeat(2, 1), given._replace(adjustments=huge))
    assert drawn.token_ids[0] == 4
    assert drawn.token_ids[1] not in (2, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_so_whatever_is_banned_in_it(bad: float) -> None:
    logits = LOGITS.repeat(2, 1)
    logits[0, 3] = bad
    given = sampling(torch.full((2,), 0.5).double())._replace(adjustments=adjustments([(0, 3), (1, 1)]))
    assert sample(logits, given).finite == [False, True]


def test_min_p_keeps_what_has_its_share_of_the_likeliest() -> None:
    shares = torch.softmax(LOGITS.double(), -1) / torch.softmax(LOGITS.double(), -1).max()
    for kept in range(1, 8):
        between = float(shares.sort(descending=True).values[kept - 1 : kept + 1].mean())
        uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        given = sampling(uniform)._replace(min_p=torch.full_like(uniform, between))
        assert len(set(sample(LOGITS.expand(4000, -1), given).token_ids)) == kept


def mixed(rows: int, vocabulary: int, coarse: bool) -> tuple[Tensor, Sampling]:
    """Rows of every kind beside each other; `coarse` logits tie often, as those of a bfloat16 model do."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    kind = torch.arange(rows)
    every_third = [(row, token) for row in range(0, rows, 3) for token in range(row % 5, 60, 2)]
    given = Sampling(
        temperature=torch.rand(rows, generator=generator).double() * 2 * (kind % 5 > 0),
        top_k=torch.tensor([0, 1, 7, 40, 255, 256, 257, 900])[kind % 8],
        top_p=torch.tensor([1.0, 0.3, 0.8, 0.99]).double()[kind % 4],
        uniform=torch.rand(rows, generator=generator).double(),
        min_p=torch.tensor([0.0, 0.05, 0.5]).double()[kind % 3],
        adjustments=adjustments(
            banned=every_third[::5],
            bias=[(row, token, (row + token) % 7 - 3.0) for row, token in every_third[1::4]],
            penalties=[(row, token, 1.0 + token % 3 / 2, token % 4 / 3) for row, token in every_third[2::3]],
        ),
    )
    return (logits.bfloat16().float() if coarse else logits), given


def alone(given: Sampling, row: int) -> Sampling:
    """The parameters of one row with its adjustments, as if it were the only one."""
    assert given.adjustments is not None
    kept = []
    for entries in given.adjustments:
        mine = entries[0] == row
        kept.append((entries[0][mine] * 0, *(entry[mine] for entry in entries[1:])))
    return row_of(given, row)._replace(adjustments=Adjustments(*kept))  # type: ignore[arg-type]  # as many as there are


@pytest.mark.parametrize("coarse", [False, True])
def test_rows_of_every_kind_draw_alone_what_they_draw_together(coarse: bool) -> None:
    logits, given = mixed(48, 1000, coarse)
    together = sample(logits, given).token_ids
    assert together == [sample(logits[i : i + 1], alone(given, i)).token_ids[0] for i in range(48)]
    assert len(set(together)) > 20


@pytest.mark.parametrize("coarse", [False, True])
def test_sorting_only_the_likeliest_changes_no_draw(monkeypatch: pytest.MonkeyPatch, coarse: bool) -> None:
    logits, given = mixed(240, 1000, coarse)
    few = sample(logits, given).token_ids
    monkeypatch.setattr("kernels.sampling._NARROW", ())
    assert sample(logits, given).token_ids == few


@pytest.mark.parametrize("count", [0, 1, 5, 255, 999, 1000, 2000])
def test_the_likeliest_come_in_the_order_of_a_stable_sort(count: int) -> None:
    logits = torch.randn(20, 1000, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    logits[7] = 1.5
    values, ids = likeliest(logits, count)
    all_values, all_ids = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, all_values[:, :count])
    assert torch.equal(ids, all_ids[:, :count])
