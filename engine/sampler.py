"""The sampling state of every slot, and the random number that decides each draw.

The number depends on (seed, position) alone: not on the slot, the step, or the rows beside it. So a repeated
request with the same seed draws the same tokens.

Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014 (the mixing function
and the golden-ratio increment).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.plan import SamplerSetup
from kernels.ops import Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1), 53 bits each, for pairs of seed and position."""
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds + _GOLDEN) + (positions + np.uint64(1)) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


class SamplerState:
    """Sampling parameters by slot.

    Args:
        num_slots: requests that can run at once.
    """

    def __init__(self, num_slots: int) -> None:
        self._temperature = np.zeros(num_slots, np.float64)
        self._top_k = np.zeros(num_slots, np.int64)
        self._top_p = np.ones(num_slots, np.float64)
        self._seed = np.zeros(num_slots, np.uint64)

    def set_up(self, setups: Sequence[SamplerSetup]) -> None:
        """Give slots new owners."""
        for slot, params, *_ in setups:
            self._temperature[slot] = params.temperature
            self._top_k[slot] = params.top_k
            self._top_p[slot] = params.top_p
            self._seed[slot] = params.seed

    def gather(self, slots: Sequence[int], positions: Sequence[int]) -> Sampling:
        """Parameters and random numbers of `slots` for tokens at `positions`."""
        index = np.asarray(slots, np.int64)
        draws = uniform(self._seed[index], np.asarray(positions, np.uint64))
        return Sampling(
            temperature=torch.from_numpy(self._temperature[index]),
            top_k=torch.from_numpy(self._top_k[index]),
            top_p=torch.from_numpy(self._top_p[index]),
            uniform=torch.from_numpy(draws),
        )
