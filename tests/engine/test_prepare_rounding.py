"""Matrices rounded to few bits: plainly, and with what that loses fed back."""

import pytest
import torch
from torch import Tensor

from engine.errors import EngineError
from engine.prepare.error_feedback import Grid, relative_error, round_plainly, round_with_feedback

GRIDS = [Grid(4, 32, False), Grid(4, 32, True), Grid(4, 0, False), Grid(8, 0, True), Grid(4, 48, False)]


def matrix(rows: int = 24, columns: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(columns: int = 96, rank: int = 12, count: int = 600) -> Tensor:
    """Inputs that hang together: mixtures of a few, and a little of their own."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return mixed + 0.1 * torch.randn(count, columns, generator=generator)


@pytest.mark.parametrize("grid", GRIDS)
def test_codes_stay_in_their_grid_and_scales_in_their_number_type(grid: Grid) -> None:
    weight, x = matrix(), inputs()
    for found in (round_plainly(weight, grid), round_with_feedback(weight, x.T @ x, grid)):
        assert int(found.codes.min()) >= grid.lowest
        assert int(found.codes.max()) <= grid.highest
        groups = -(-96 // (grid.group or 96))
        assert found.scales.shape == (24, groups)
        kept = found.scales.half().float() if grid.bits == 4 else found.scales
        assert torch.equal(kept, found.scales)
        assert (found.zeros is None) == grid.symmetric


def test_int8_is_each_number_over_its_row_s_largest_to_the_nearest_of_127() -> None:
    weight = matrix()
    found = round_plainly(weight, Grid(8, 0, True))
    scale = weight.abs().amax(1, keepdim=True) / 127
    assert torch.equal(found.scales, scale)
    assert torch.equal(found.codes, (weight / scale).round().to(torch.int8))
    assert bool(((found.plain() - weight).abs() <= scale / 2 + 1e-7).all())


@pytest.mark.parametrize("grid", GRIDS)
def test_fed_back_errors_change_the_outputs_for_inputs_that_hang_together_far_less_than_plain_rounding(
    grid: Grid,
) -> None:
    weight, x = matrix(), inputs()
    gram = x.T @ x
    plainly = relative_error(weight, round_plainly(weight, grid).plain(), gram)
    fed_back = relative_error(weight, round_with_feedback(weight, gram, grid).plain(), gram)
    assert fed_back < 0.6 * plainly


def test_inputs_that_have_nothing_in_common_leave_nothing_to_feed_back() -> None:
    weight, grid = matrix(), Grid(8, 0, True)
    found = round_with_feedback(weight, torch.eye(96), Grid(8, 0, True))
    assert relative_error(weight, found.plain(), None) <= relative_error(
        weight, round_plainly(weight, grid).plain(), None
    )


def test_the_error_is_that_of_the_outputs_over_the_inputs_it_was_measured_with() -> None:
    weight, x = matrix(), inputs()
    rounded = round_plainly(weight, Grid(4, 32, False)).plain()
    wanted = float((x @ (weight - rounded).T).norm() / (x @ weight.T).norm())
    assert relative_error(weight, rounded, x.T @ x) == pytest.approx(wanted, rel=1e-3)
    assert relative_error(weight, weight, x.T @ x) == 0
    assert relative_error(torch.zeros(4, 96), torch.zeros(4, 96), x.T @ x) == 0


@pytest.mark.parametrize("grid", GRIDS)
def test_rows_of_zeros_and_inputs_that_are_always_zero_are_rounded_like_any_others(grid: Grid) -> None:
    weight, x = matrix(), inputs()
    weight[3], weight[:, 5] = 0, 0
    x[:, 7] = 0
    for gram in (x.T @ x, torch.zeros(96, 96)):
        found = round_with_feedback(weight, gram, grid).plain()
        assert bool(found.isfinite().all())
        assert float((found[3]).abs().max()) == 0
        assert relative_error(weight, found, None) < 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_numbers_that_are_none_or_too_large_for_a_scale_are_refused(value: float) -> None:
    weight = matrix()
    weight[2, 2] = value
    with pytest.raises(EngineError, match="WEIGHTS_INVALID"):
        round_plainly(weight, Grid(4, 32, False))
    with pytest.raises(EngineError, match="WEIGHTS_INVALID"):
        round_with_feedback(weight, torch.eye(96), Grid(4, 32, False))
