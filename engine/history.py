"""Which tokens one answer and its prompt hold, and how often: what the penalties of a draw are made of.

Source: Keskar et al., "CTRL", 2019, section 4.1 (repetition penalty; here on tokens of the prompt too, as in
transformers and vLLM); OpenAI's API reference (presence and frequency penalties, on the answer alone).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.request import SamplingParams


class TokenHistory:
    """The tokens of one request, learned as they pass.

    Args:
        prompt_length: positions before this one hold the prompt.
        whole: tokens of the prompt count too; they do for the repetition penalty alone.
    """

    def __init__(self, prompt_length: int, whole: bool) -> None:
        self._prompt_length = prompt_length
        self._first = 0 if whole else prompt_length
        self._next = 0  # the first position not seen yet
        self._place: dict[int, int] = {}  # token -> where it stands in the arrays
        self._tokens = np.empty(64, np.int64)
        self._times = np.empty(64, np.int64)  # in the answer

    def extend(self, start: int, token_ids: Sequence[int]) -> None:
        """Note the tokens from position `start` on; positions seen before are passed over.

        Raises:
            ValueError: positions between the last one seen and `start` are missing.
        """
        if start > max(self._next, self._first):
            raise ValueError(f"positions {self._next} to {start - 1} of a request's history are missing")
        for position, token in enumerate(token_ids, start):
            if position >= max(self._next, self._first):
                self._note(token, position >= self._prompt_length)
        self._next = max(self._next, start + len(token_ids))

    def penalties(
        self, params: SamplingParams
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Tokens, what divides or multiplies each one's logit, and what is taken off it then."""
        used = len(self._place)
        times = self._times[:used]
        taken = np.where(times > 0, params.presence_penalty, 0.0) + params.frequency_penalty * times
        return self._tokens[:used], np.full(used, params.repetition_penalty), taken

    def _note(self, token: int, answered: bool) -> None:
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = len(self._place)
            if place == len(self._tokens):
                self._tokens, self._times = (np.resize(array, 2 * place) for array in (self._tokens, self._times))
            self._tokens[place], self._times[place] = token, 0
        self._times[place] += answered
