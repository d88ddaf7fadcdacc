"""Random numbers depend on seed and position alone, are spread evenly, and look alike for no two seeds."""

from collections import Counter

import numpy as np
import pytest
import torch

from engine.plan import SamplerSetup
from engine.request import MAX_SEED, SamplingParams
from engine.sampler import SamplerState, uniform
from kernels.sampling import sample

POSITIONS = np.arange(20000, dtype=np.uint64)


def numbers(seed: int) -> np.ndarray:
    return uniform(np.full(POSITIONS.shape, seed, np.uint64), POSITIONS)


@pytest.mark.parametrize("seed", [0, 1, 2, 0x9E3779B97F4A7C15, MAX_SEED])
def test_the_numbers_of_a_seed_are_spread_evenly(seed: int) -> None:
    drawn = numbers(seed)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    observed = np.histogram(drawn, bins=20, range=(0, 1))[0]
    chi_square = ((observed - 1000) ** 2 / 1000).sum()
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001


def test_neighbouring_seeds_and_positions_are_unrelated() -> None:
    base = numbers(7)
    for other in (numbers(8), numbers(7 + 0x9E3779B97F4A7C15), np.roll(base, 1)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.03
    for seed in (8, 7 + 0x9E3779B97F4A7C15):  # such seeds must not give the same numbers shifted
        assert np.intersect1d(base, numbers(seed)).size < 5


def test_draws_over_many_positions_follow_the_softmax() -> None:
    logits = torch.tensor([[0.3, 1.2, -0.7, 0.0, 2.0]])
    state = SamplerState(2)
    state.set_up([SamplerSetup(1, SamplingParams(temperature=0.8, seed=42), 1)])
    count = 20000
    tokens = sample(logits.expand(count, -1), state.gather([1] * count, range(count), 5)).token_ids
    expected = torch.softmax(logits[0].double() / 0.8, -1) * count
    observed = Counter(tokens)
    chi_square = sum((observed[i] - float(expected[i])) ** 2 / float(expected[i]) for i in range(5))
    assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001


def test_a_draw_does_not_depend_on_slot_or_neighbours() -> None:
    params = SamplingParams(temperature=1.0, top_k=3, top_p=0.9, seed=5)
    state = SamplerState(4)
    state.set_up(
        [SamplerSetup(0, SamplingParams(seed=9), 1), SamplerSetup(1, params, 1), SamplerSetup(3, params, 1)]
    )
    alone = state.gather([1], [17], 300)
    among = state.gather([0, 3], [4, 17], 300)
    for one, two in zip(alone[:5], among[:5], strict=True):
        assert one[0] == two[1]


def test_a_slot_takes_the_parameters_of_its_new_owner() -> None:
    state = SamplerState(1)
    state.set_up([SamplerSetup(0, SamplingParams(temperature=1.0, top_k=3, top_p=0.5, seed=5), 1)])
    state.set_up([SamplerSetup(0, SamplingParams(), 1)])
    sampling = state.gather([0], [1], 300)
    assert (float(sampling.temperature[0]), int(sampling.top_k[0]), float(sampling.top_p[0])) == (0.0, 0, 1.0)
