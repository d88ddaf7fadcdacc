"""Draws in Triton are those of `kernels.sampling`, row by row, whatever a row asks for."""

import math

import pytest
import torch
from torch import Tensor

from kernels.ops import Adjustments, Sampling
from kernels.sampling import sample as sample_exactly
from kernels.triton import sampling as module
from kernels.triton.sampling import LISTED, make_drawn, make_workspace, sample
from kernels.triton.sampling_adjust import sample_adjusted
from tests.kernels.proofs import DEVICE


@pytest.fixture(autouse=True)
def many_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a program costs as much as its tensor operations, whatever their sizes."""

    def chosen(kernel: str, vocabulary: int) -> dict[str, int]:
        block = 16 if vocabulary <= 16 else 128 if vocabulary <= 128 else 2048 if vocabulary < 10000 else 16384
        rows = 256 if vocabulary <= 16 else 128 if vocabulary <= 128 else 8
        return {"ROWS": rows, "CHUNK": block, "BLOCK": min(block, 2048), "num_warps": 8}

    if DEVICE == "cpu":
        monkeypatch.setattr(module, "config", chosen)


def drawn(logits: Tensor, given: Sampling) -> tuple[list[int], list[bool]]:
    """What the kernels draw."""
    rows, vocabulary = logits.shape
    workspace, out = make_workspace(rows, vocabulary, DEVICE), make_drawn(rows, DEVICE)
    moved = given._replace(**{name: getattr(given, name).to(DEVICE) for name in given._fields[:5]})
    if given.adjustments is None:
        sample(logits.to(DEVICE), moved, workspace, out)
    else:
        entries = Adjustments(*(tuple(part.to(DEVICE) for part in parts) for parts in given.adjustments))  # type: ignore[arg-type]  # as many as there are
        wide = torch.empty(rows, vocabulary, dtype=torch.float64, device=DEVICE)
        sample_adjusted(logits.to(DEVICE), moved._replace(adjustments=entries), workspace, wide, out)
    return out.tokens.tolist(), [bool(one) for one in out.finite.tolist()]


def some(rows: int, vocabulary: int, seed: int, coarse: bool) -> tuple[Tensor, Sampling]:
    """Rows of every kind; `coarse` logits tie often, as those of a bfloat16 model do."""
    made = torch.Generator().manual_seed(seed)
    spread = 0.1 + 5 * torch.rand(rows, 1, generator=made)
    logits = torch.randn(rows, vocabulary, generator=made) * spread

    def pick(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (rows,), generator=made)]

    given = Sampling(
        temperature=pick([0.0, 0.3, 1.0, 1.0, 2.5, 1e-300, 1e300]),
        top_k=pick([0, 0, 1, 2, 7, 40, vocabulary - 1, vocabulary, 10**6], torch.int64),
        top_p=pick([1.0, 1.0, 0.3, 0.9, 0.999, 1e-9]),
        uniform=torch.rand(rows, generator=made, dtype=torch.float64),
        min_p=pick([0.0, 0.0, 0.05, 1.0]),
    )
    given.uniform[::17], given.uniform[1::17] = 0.0, 1 - 1e-8
    return ((logits * 4).round() / 4 if coarse else logits), given


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(("rows", "vocabulary"), [(500, 7), (256, 100)])
def test_rows_of_every_kind_draw_what_they_draw_in_float64(rows: int, vocabulary: int, coarse: bool) -> None:
    logits, given = some(rows, vocabulary, vocabulary, coarse)
    expected = sample_exactly(logits, given)
    assert drawn(logits, given)[0] == expected.token_ids
    assert len(set(expected.token_ids)) > 5


def test_adjusted_rows_draw_what_they_draw_in_float64() -> None:
    logits, given = some(128, 60, 1, coarse=True)
    made = torch.Generator().manual_seed(2)
    row = torch.arange(120).repeat_interleave(6)
    token = torch.stack([torch.randperm(60, generator=made)[:6] for _ in range(120)]).flatten()
    numbers = [torch.randn(len(row), generator=made).double() for _ in range(3)]
    all_of_one = torch.full((60,), 124), torch.arange(60)
    banned = torch.cat([all_of_one[0], row[::4]]), torch.cat([all_of_one[1], token[::4]])
    numbers[0][:3], numbers[2][3:5] = 1.7e308, 1e308
    entries = Adjustments(banned, (row, token, numbers[0]), (row, token, numbers[1].exp(), numbers[2]))
    given = given._replace(adjustments=entries)
    tokens, finite = drawn(logits, given)
    assert tokens == sample_exactly(logits, given).token_ids
    assert all(finite)


def test_entries_of_no_row_change_nothing() -> None:
    logits, given = some(8, 60, 3, coarse=False)
    nothing = torch.full((300,), -1), torch.zeros(300, dtype=torch.int64)
    number = torch.ones(300, dtype=torch.float64)
    entries = Adjustments(nothing, (*nothing, number), (*nothing, number, number))
    assert drawn(logits, given._replace(adjustments=entries))[0] == sample_exactly(logits, given).token_ids


def test_long_rows_draw_from_their_list_or_without_it() -> None:
    logits, given = some(8, LISTED + 3000, 5, coarse=False)
    logits[2:4, :1500] += 30  # more than a chunk may list
    logits[4:6] = (logits[4:6] / 4).round()  # ties longer than a list
    logits[6:] /= 1000  # flat: no list holds what is kept
    given = given._replace(
        temperature=torch.tensor([1.0, 0.7] * 4, dtype=torch.float64),
        top_k=torch.tensor([0, 2500, 0, 50, 0, 2500, 0, 50]),
        top_p=torch.tensor([0.9, 0.99] * 4, dtype=torch.float64),
        min_p=torch.zeros(8, dtype=torch.float64),
    )
    assert drawn(logits, given)[0] == sample_exactly(logits, given).token_ids


def test_the_vocabulary_of_a_large_model_is_drawn_from_alike() -> None:
    logits, given = some(3, 128256, 11, coarse=True)
    given = given._replace(
        temperature=torch.tensor([0.8, 1.0, 0.0], dtype=torch.float64),
        top_k=torch.tensor([40, 0, 0]),
        top_p=torch.tensor([0.9, 1.0, 1.0], dtype=torch.float64),
    )
    assert drawn(logits, given)[0] == sample_exactly(logits, given).token_ids


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("top_p", [1.0, 0.99])
def test_the_largest_random_number_never_leaves_the_kept_tokens(top_k: int, top_p: float) -> None:
    logits = torch.tensor([[0.0, 1.0, -900.0, -800.0]])
    largest = torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float64)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    given = Sampling(one, torch.tensor([top_k]), top_p * one, largest, zero)
    assert drawn(logits, given)[0][0] in (0, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_told_and_harms_no_other(bad: float) -> None:
    logits, given = some(24, 60, 13, coarse=False)
    clean, _ = drawn(logits, given)
    logits[5, 7] = bad
    logits[6] = bad
    tokens, finite = drawn(logits, given)
    assert [i for i, sound in enumerate(finite) if not sound] == [5, 6]
    assert tokens[:5] + tokens[7:] == clean[:5] + clean[7:]
    assert all(0 <= token < 60 for token in tokens)


def test_a_row_draws_the_same_token_whatever_rows_are_beside_it() -> None:
    logits, given = some(40, 100, 17, coarse=True)
    together, _ = drawn(logits, given)
    for i in (0, 13, 39):
        alone = Sampling(*(part[i : i + 1] for part in given[:5]))
        assert drawn(logits[i : i + 1], alone)[0] == together[i : i + 1]
