"""The sampling state of every slot, and the random number that decides each draw.

The number depends on (seed, position) alone: not on the slot, the step, or the rows beside it. So a repeated
request with the same seed draws the same tokens.

Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014 (the mixing function
and the golden-ratio increment).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.history import TokenHistory
from engine.plan import PlanRow, SamplerSetup
from engine.request import SamplingParams
from kernels.ops import Adjustments, Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1), 53 bits each, for pairs of seed and position."""
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds + _GOLDEN) + (positions + np.uint64(1)) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


class _Special(NamedTuple):
    """What changes single logits of one slot."""

    params: SamplingParams
    biased: _Ints
    biases: _Floats
    banned: _Ints
    banned_until: int
    history: TokenHistory | None


class SamplerState:
    """Sampling parameters by slot; only slots whose logits are adjusted hold more than a few numbers.

    Args:
        num_slots: requests that can run at once.
    """

    def __init__(self, num_slots: int) -> None:
        self._temperature = np.zeros(num_slots, np.float64)
        self._top_k = np.zeros(num_slots, np.int64)
        self._top_p = np.ones(num_slots, np.float64)
        self._min_p = np.zeros(num_slots, np.float64)
        self._seed = np.zeros(num_slots, np.uint64)
        self._special: dict[int, _Special] = {}
        self._logprobs: dict[int, int] = {}

    def set_up(self, setups: Sequence[SamplerSetup]) -> None:
        """Give slots new owners; a setup that comes again starts its slot anew."""
        for setup in setups:
            slot, params = setup.slot, setup.params
            self._temperature[slot] = params.temperature
            self._top_k[slot] = params.top_k
            self._top_p[slot] = params.top_p
            self._min_p[slot] = params.min_p
            self._seed[slot] = params.seed
            self._logprobs.pop(slot, None)
            self._special.pop(slot, None)
            if setup.logprobs is not None:
                self._logprobs[slot] = setup.logprobs
            if params.logit_bias or setup.banned or params.uses_history:
                self._special[slot] = _special(setup)

    def observe(self, rows: Sequence[PlanRow]) -> None:
        """Note the tokens that rows bring, each position once however often it passes."""
        if not self._special:
            return
        for row in rows:
            special = self._special.get(row.slot)
            if special is not None and special.history is not None:
                special.history.extend(row.start, row.token_ids)

    def logprobs(self, slot: int) -> int | None:
        """How many likeliest tokens the owner of `slot` wants reported; None reports nothing."""
        return self._logprobs.get(slot)

    def gather(self, slots: Sequence[int], positions: Sequence[int], vocabulary: int) -> Sampling:
        """Parameters and random numbers of `slots` for tokens at `positions`, out of so large a vocabulary."""
        index = np.asarray(slots, np.int64)
        temperature = self._temperature[index]
        drawn = temperature.any()  # what takes the likeliest token needs no number
        draws = uniform(self._seed[index], np.asarray(positions, np.uint64)) if drawn else temperature
        return Sampling(
            temperature=torch.from_numpy(temperature),
            top_k=torch.from_numpy(self._top_k[index]),
            top_p=torch.from_numpy(self._top_p[index]),
            uniform=torch.from_numpy(draws),
            min_p=torch.from_numpy(self._min_p[index]),
            adjustments=self._adjustments(slots, positions, vocabulary),
        )

    def _adjustments(self, slots: Sequence[int], positions: Sequence[int], vocabulary: int) -> Adjustments | None:
        if self._special.keys().isdisjoint(slots):
            return None
        banned = _Entries(vocabulary)
        bias = _Entries(vocabulary, 1)
        penalties = _Entries(vocabulary, 2)
        for i, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            special = self._special.get(slot)
            if special is None:
                continue
            bias.add(i, special.biased, special.biases)
            if position < special.banned_until:
                banned.add(i, special.banned)
            if special.history is not None:
                penalties.add(i, *special.history.penalties(special.params))
        rows, tokens, (added,) = bias.tensors()
        places, held, (repetition, taken) = penalties.tensors()
        return Adjustments(banned.tensors()[:2], (rows, tokens, added), (places, held, repetition, taken))


def _special(setup: SamplerSetup) -> _Special:
    params = setup.params
    history = None
    if params.uses_history:
        history = TokenHistory(setup.prompt_length, whole=params.repetition_penalty != 1)
        history.extend(0, setup.history)
    return _Special(
        params=params,
        biased=np.array([token for token, _ in params.logit_bias], np.int64),
        biases=np.array([bias for _, bias in params.logit_bias], np.float64),
        banned=np.unique(np.array(setup.banned, np.int64)),
        banned_until=setup.banned_until,
        history=history,
    )


class _Entries:
    """Rows and tokens with some numbers each, gathered row by row; tokens beyond the vocabulary are left out."""

    def __init__(self, vocabulary: int, numbers: int = 0) -> None:
        self._vocabulary = vocabulary
        self._rows: list[_Ints] = [np.empty(0, np.int64)]
        self._tokens: list[_Ints] = [np.empty(0, np.int64)]
        self._numbers: list[list[_Floats]] = [[np.empty(0, np.float64)] for _ in range(numbers)]

    def add(self, row: int, tokens: _Ints, *numbers: _Floats) -> None:
        """Entries of one row."""
        known = tokens < self._vocabulary
        self._tokens.append(tokens[known])
        self._rows.append(np.full(len(self._tokens[-1]), row, np.int64))
        for column, values in zip(self._numbers, numbers, strict=True):
            column.append(values[known])

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Rows, tokens, and each of the numbers."""
        rows, tokens = (torch.from_numpy(np.concatenate(parts)) for parts in (self._rows, self._tokens))
        return rows, tokens, [torch.from_numpy(np.concatenate(column)) for column in self._numbers]
