"""A device that computes late: what is started waits in order until its result is read, as a GPU's stream may."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.loop import EngineLoop
from engine.models.decoder import Decoder
from engine.overlapped import OverlappedLoop
from engine.runner import ModelRunner
from kernels.ops import Draw, KvSpec, Rows, Sampling
from kernels.steps import StepLimits, make_step


class Stream:
    """Work in order."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def start(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    def finish(self, job: Callable[[], None] | None = None) -> None:
        """Do all work up to `job`, or all."""
        while self.jobs and (job is None or job in self.jobs):
            self.jobs.pop(0)()


class LateOps:
    """A CPU backend whose steps and scrubbing wait in a stream; all else is that backend's."""

    def __init__(self, ops: Any) -> None:
        self.ops, self.stream = ops, Stream()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def scrub(self, kv: Any, blocks: Sequence[int]) -> None:
        self.stream.start(lambda: self.ops.scrub(kv, blocks))

    def compile(self, model: Any, kv: Any, limits: StepLimits) -> "LateStep":
        return LateStep(make_step(model, self.ops, kv, limits), self.ops, self.stream)


class Later:
    """Logits that are computed when rows of them are taken."""

    def __init__(self, logits: Callable[[], torch.Tensor]) -> None:
        self.logits = logits

    def __getitem__(self, rows: list[int]) -> torch.Tensor:
        return self.logits()[rows]


class LateStep:
    """A step that draws, late."""

    def __init__(self, step: Any, ops: Any, stream: Stream) -> None:
        self.step, self.ops, self.stream = step, ops, stream
        self.drawn: list[int] = []
        self.named = 0  # rows whose token was not read when they were started

    def __call__(self, rows: Rows, picked: Sequence[int], *, whole: bool = True) -> Any:
        self.stream.finish()
        return self.step(rows, picked, whole=whole)

    def sampled(self, rows: Rows, picked: Sequence[int], sampling: Sampling, *, whole: bool = True) -> Any:
        answer: list[Any] = []
        self.named += sum(token < 0 for token in rows.token_ids)

        def job() -> None:
            known = [self.drawn[-1 - token] if token < 0 else token for token in rows.token_ids]
            with torch.inference_mode():
                hidden, logits = self.step(rows._replace(token_ids=known), picked, whole=whole)
                draw = self.ops.sample(logits, sampling)
            self.drawn = draw.token_ids
            answer.extend([hidden, logits, draw])

        def read() -> Draw:
            self.stream.finish(job)
            draw: Draw = answer[2]
            return draw

        self.stream.start(job)
        if whole:  # somebody asks for more than the token
            read()
        return answer[0] if whole else None, Later(lambda: (read(), answer[1])[1]), read


def late_runner(model: Decoder, ops: Any, spec: KvSpec, limits: StepLimits) -> ModelRunner:
    """A runner over such a device."""
    return ModelRunner(model, LateOps(ops), spec, limits)  # type: ignore[arg-type]  # all that is asked for is passed on


def overlapped(loop: EngineLoop) -> OverlappedLoop:
    """The same deployment on such a device, with nothing in it."""
    runner: Any = loop._runner
    limits = StepLimits(
        loop.options.max_step_tokens, loop.options.max_running, loop.scheduler.limits.max_context_tokens
    )
    late = late_runner(runner._model, runner._ops, runner._kv.spec, limits)
    return OverlappedLoop(late, loop.scheduler, loop._vocabulary, loop._eos_ids, loop.options, loop._clock)
