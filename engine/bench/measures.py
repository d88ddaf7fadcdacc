"""Tokens per second of whole steps: a prompt, batches of answers, and the workload that engines are compared by.

Only the steps in question are timed: prompts are computed, and two steps of every batch pass, before the clock
starts. All requests are greedy and end at their length, and none shares a prefix with another.

Source: prompts and answers are measured apart as by llama.cpp's llama-bench; the workload is that of nano-vllm's
bench.py (256 requests, prompts and answers of 100 to 1,024 tokens each, drawn uniformly).
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.bench.subject import Load
from engine.loop import EngineLoop
from engine.request import Request, SamplingParams, StopCriteria
from kernels.bench.clock import Clock

_WARM_STEPS = 2
_SHORTEST, _LONGEST = 100, 1024
_SHORT_PROMPT = 32


@dataclass(frozen=True, slots=True)
class Timed:
    """What some steps brought.

    Attributes:
        tokens: of prompts or of answers, whichever are measured.
        steps: how many.
        seconds: they took together.
        inside: of these, in kernels; NaN where that cannot be told.
    """

    tokens: int
    steps: int
    seconds: float
    inside: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def outside(self) -> float:
        """Share of the time that passed outside kernels."""
        return 1 - self.inside / self.seconds


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt of so many tokens, up to its first answered token."""

    tokens: int

    @property
    def load(self) -> Load:
        """What the engine must have room for."""
        return Load(1, self.tokens + 1, self.tokens + 1)

    def run(self, bench: "Bench") -> Timed:
        """Measure."""
        bench.submit(1, self.tokens, 1)
        return bench.timed(bench.drain, self.tokens)


@dataclass(frozen=True, slots=True)
class Decode:
    """Answers to a batch of prompts at once, a token for each in every step.

    Attributes:
        batch: requests.
        steps: that are timed.
        context: tokens of each prompt.
    """

    batch: int
    steps: int
    context: int = _SHORT_PROMPT

    @property
    def load(self) -> Load:
        """What the engine must have room for."""
        longest = self.context + self.steps + _WARM_STEPS + 2
        return Load(self.batch, longest, longest * self.batch)

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values a step reads, on average."""
        return self.batch * (self.context + _WARM_STEPS + self.steps // 2)

    def run(self, bench: "Bench") -> Timed:
        """Measure; the requests are taken back afterwards."""
        handles = bench.submit(self.batch, self.context, self.steps + _WARM_STEPS + 2)
        while bench.tokens_of_step() < self.batch:
            if not bench.loop.has_work:
                raise RuntimeError(f"answers end before {self.batch} prompts are computed: take more --steps")
        bench.steps(_WARM_STEPS)
        timed = bench.timed(lambda: bench.steps(self.steps), self.batch * self.steps)
        for handle in handles:
            bench.loop.abort(handle)
        bench.drain()
        return timed


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of many lengths, all there from the beginning; measured are the tokens of the answers.

    Attributes:
        requests: how many.
        scale: factor of their lengths.
        batch: most at once.
    """

    requests: int = 256
    scale: float = 1.0
    batch: int = 128

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of each prompt and of its answer; always the same."""
        draw = random.Random(0)  # noqa: S311  # no secret
        return [(self._draw(draw), self._draw(draw)) for _ in range(self.requests)]

    def _draw(self, draw: random.Random) -> int:
        return max(1, round(self.scale * draw.randint(_SHORTEST, _LONGEST)))

    @property
    def load(self) -> Load:
        """What the engine must have room for: as many of mean length as run at once."""
        sums = [prompt + answer for prompt, answer in self.lengths]
        batch = min(self.batch, self.requests)
        return Load(batch, max(sums), max(*sums, sum(sums) * batch // self.requests))

    def run(self, bench: "Bench") -> Timed:
        """Measure."""
        for prompt, answer in self.lengths:
            bench.submit(1, prompt, answer)
        return bench.timed(bench.drain, sum(answer for _, answer in self.lengths))


Measure = Prefill | Decode | Workload


class Bench:
    """Requests for one loop, and the clock.

    Args:
        loop: the engine.
        vocabulary: its tokens.
        clock: of the time inside kernels; None where there is none.
    """

    def __init__(self, loop: EngineLoop, vocabulary: int, clock: Clock | None = None) -> None:
        self.loop = loop
        self._vocabulary = vocabulary
        self._clock = clock
        self._handles = 0

    def submit(self, count: int, prompt: int, answer: int) -> Sequence[int]:
        """So many requests of these lengths; their handles."""
        handles = range(self._handles, self._handles + count)
        self._handles += count
        for handle in handles:
            draw = random.Random(handle)  # noqa: S311  # no secret
            tokens = [draw.randrange(self._vocabulary) for _ in range(prompt)]
            self.loop.submit(Request(handle, tokens, SamplingParams(), StopCriteria(answer, ignore_eos=True)))
        return handles

    def tokens_of_step(self) -> int:
        """Carry out one step; the tokens of answers it brought."""
        rows = self.loop.step()
        failed = [row.end for row in rows if row.end is not None and row.end.error_code]
        if failed:
            raise RuntimeError(f"{failed[0].error_code}: {failed[0].error_message}")
        return sum(len(row.token_ids) for row in rows)

    def steps(self, count: int) -> None:
        """Carry out so many."""
        for _ in range(count):
            self.tokens_of_step()

    def drain(self) -> None:
        """Carry out steps until nothing is left to do."""
        while self.loop.has_work:
            self.tokens_of_step()

    def timed(self, work: Callable[[], None], tokens: int) -> Timed:
        """Carry out `work`, which brings so many tokens, and look at the clocks."""
        steps, inside = self.loop.status().steps, self._clock() if self._clock else 0
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        spent = (self._clock() - inside) / 1e9 if self._clock else float("nan")
        return Timed(tokens, self.loop.status().steps - steps, seconds, spent)
