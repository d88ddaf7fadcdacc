"""Decode steps recorded once and started with one call: a graph for each number of rows that is worth one.

Where every row has one token, a step of few rows is over in less time than Python needs to start its kernels. So
such steps are recorded, for 1, 2, 4 and then every eighth number of rows, over tensors that stay where they are; a
step fills up the next larger number with rows that read nothing and write nowhere. Grids follow from that number
and from the longest context alone, of which there are two: short contexts do not start the programs of long ones.
All other steps run op by op.

The largest graph is recorded first, and all take their memory from one pool: they never run at the same time.

Source: NVIDIA, "CUDA C++ Programming Guide", CUDA Graphs; PyTorch, torch.cuda.graph (pools).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.ops import Adjustments, Draw, Hidden, Rows, Sampling
from kernels.steps import SCORED_AT_ONCE, StepLimits, StepModel
from kernels.triton.drawing import Drawing, take
from kernels.triton.kv_cache import KvPages
from kernels.triton.step import StepBatch, StepBuffers, StepShape, idle_step

if TYPE_CHECKING:
    from kernels.triton.backend import TritonBackend

_SHORT_CONTEXT = 4096
_FEW = (1, 2, 4)
_EVERY = 8
_NOBODY = Rows([], [], [], [])


class Graph(Protocol):
    """A recorded step."""

    def replay(self) -> None:
        """Compute it again, over the numbers that now lie where its inputs are."""


class Recorder(Protocol):
    """Records steps, of which no two are replayed at the same time."""

    def record(self, body: Callable[[], None]) -> Graph:
        """Record what `body` starts; it reads and writes tensors that stay where they are."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, body: Callable[[], None]) -> Graph:
        """See `Recorder`; the body runs once before, so that its kernels and libraries are loaded."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            body()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            body()
        return graph


class RepeatingRecorder:
    """Where there is no device: a replay runs the body again."""

    def record(self, body: Callable[[], None]) -> Graph:
        """See `Recorder`."""
        body()
        return _Repeated(body)


class _Repeated(NamedTuple):
    body: Callable[[], None]

    def replay(self) -> None:
        self.body()


def buckets(most: int) -> tuple[int, ...]:
    """The numbers of rows that have a graph, rising: 1, 2, 4, 8, 16, 24, ... and `most`."""
    found = {*_FEW, *range(_EVERY, most, _EVERY), most}
    return tuple(sorted(count for count in found if 0 < count <= most))


def context_tiers(most: int) -> tuple[int, ...]:
    """The contexts that have a graph: a short one, and all."""
    return tuple(sorted({min(_SHORT_CONTEXT, most), most}))


class GraphedStep:
    """The step of one model over one KV cache; a `kernels.steps.Step`.

    Args:
        model: the model.
        ops: its backend.
        kv: its pages.
        limits: the largest step.
        recorder: of decode steps.
        is_lazy: a graph is recorded when it is first wanted; else all are, and every kernel that a step may start
            is started once, so that no request waits for one to be loaded.
    """

    def __init__(
        self,
        model: StepModel,
        ops: TritonBackend,
        kv: KvPages,
        limits: StepLimits,
        recorder: Recorder,
        is_lazy: bool = False,
    ) -> None:
        self._model, self._ops, self._kv, self._limits = model, ops, kv, limits
        self._recorder = recorder
        self._buckets = buckets(limits.rows)
        self._tiers = context_tiers(limits.context)
        pages = -(-limits.context // kv.spec.block_size)
        self._buffers = StepBuffers(StepShape(limits.rows, limits.rows, pages), ops.device)
        self._graphs: dict[tuple[int, int], Graph] = {}
        with torch.inference_mode():
            self._hidden, self._logits = (
                one.new_zeros(limits.rows, one.shape[1])
                for one in self._warm_up((1,) if is_lazy else sizes(limits.tokens))
            )
            self._drawing = Drawing(limits.rows, self._logits.shape[1], ops.device)
            self._places: Sequence[int] = ()  # of what was drawn last
            if not is_lazy:
                self._drawing.warm_up(self._logits)
                self._ops.pick(self._logits, [limits.rows - 1])
                self._ops.scrub(kv, [0])
                for tier in reversed(self._tiers):
                    for bucket in reversed(self._buckets):
                        self._record(bucket, tier)

    def __call__(
        self, rows: Rows, picked: Sequence[int], *, whole: bool = True
    ) -> tuple[Hidden | None, Tensor | None]:
        """See `kernels.steps.Step`; what all tokens come to is there in any case."""
        rows = self._checked(rows)
        if is_decode(rows):
            drawn = self._drawing.tokens.clone()
            hidden, logits = self._replay(rows)
            self._drawing.tokens.copy_(drawn)
            return hidden, self._ops.pick(logits, picked) if picked else None
        hidden = self._run(rows)
        return hidden, self._model.logits(self._ops, hidden, picked) if picked else None

    def sampled(
        self, rows: Rows, picked: Sequence[int], sampling: Sampling, *, whole: bool = True
    ) -> tuple[Hidden | None, Tensor, Callable[[], Draw]]:
        """A step, and a token drawn for each of `picked`.

        A token id -1 - i of the rows is what the step before drew for its picked[i], whether it was read or not.

        Args:
            rows: of the step.
            picked: tokens, at most one of each row, and at least one.
            sampling: how to draw for each of them; on the host.
            whole: as in a call.

        Returns:
            As a call, and what waits for the draw and reads it; the draw after the next must not begin before.
        """
        rows = self._checked(rows)
        if is_decode(rows):
            self._places, of_picked = list(picked), torch.tensor(picked)
            self._drawing.send(sampling, picked)
            hidden, drawn = self._replay(rows)
            logits = self._ops.pick(drawn, picked)
        else:
            self._places, of_picked = range(len(picked)), torch.arange(len(picked))
            self._drawing.send(sampling, self._places)
            hidden = self._run(rows)
            logits = drawn = self._model.logits(self._ops, hidden, picked)
        if sampling.adjustments is not None:
            self._drawing.draw_adjusted(drawn, _moved(sampling.adjustments, of_picked))
        elif not is_decode(rows):
            self._drawing.draw(drawn)
        return hidden, logits, self._drawing.read(self._places)

    def _checked(self, rows: Rows) -> Rows:
        """The rows, with the places of what was drawn for picked tokens named there."""
        tokens, count = len(rows.token_ids), len(rows.starts)
        if tokens > self._limits.tokens or count > self._limits.rows or _context(rows) > self._limits.context:
            raise ValueError(f"a step of {tokens} tokens in {count} rows is beyond {self._limits}")
        if min(rows.token_ids, default=0) >= 0:
            return rows
        return rows._replace(token_ids=[-1 - self._places[-1 - i] if i < 0 else i for i in rows.token_ids])

    def _run(self, rows: Rows) -> Tensor:
        """Op by op."""
        batch = self._ops.begin(rows, self._kv)
        if min(rows.token_ids) < 0:
            take(batch.at.token_ids, self._drawing.tokens)
        hidden: Tensor = self._model(self._ops, self._kv, batch)
        return hidden

    def _replay(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Hidden states and logits of rows of one token each, and tokens drawn with what was sent last."""
        count = len(rows.starts)
        bucket = self._buckets[bisect_left(self._buckets, count)]
        tier = self._tiers[bisect_left(self._tiers, _context(rows))]
        if (bucket, tier) not in self._graphs:
            self._record(bucket, tier)
        self._buffers.send(rows, self._kv.spec.block_size, bucket)
        self._graphs[bucket, tier].replay()
        return self._hidden[:count], self._logits[:count]

    def _record(self, bucket: int, tier: int) -> None:
        """The graph of so many rows of up to so long a context; while it is recorded rows read nothing.

        What the step before drew stays, should a step name it.
        """
        drawn = self._drawing.tokens.clone()
        self._buffers.send(_NOBODY, self._kv.spec.block_size, bucket)
        batch = StepBatch(self._buffers.first(bucket), is_decode=True, most_tokens=1, context=tier)
        self._graphs[bucket, tier] = self._recorder.record(partial(self._compute, batch))
        self._drawing.tokens.copy_(drawn)

    def _compute(self, batch: StepBatch) -> None:
        """A decode step from its buffers to hidden states, logits and tokens of all its rows."""
        count = batch.rows
        take(batch.at.token_ids, self._drawing.tokens)
        hidden = self._model(self._ops, self._kv, batch)
        self._hidden[:count].copy_(hidden)
        with self._ops.logits_in(self._logits[:count]):
            self._model.logits(self._ops, hidden, range(count))
        self._drawing.draw(self._logits[:count])

    def _warm_up(self, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Steps of so many tokens that no row has, the most last; what that came to."""
        answer: tuple[Tensor, Tensor] | None = None
        most = max(self._limits.rows, SCORED_AT_ONCE)  # logits are of rows, or of some tokens of a prompt
        for tokens in sorted(counts):
            answer = None
            batch = idle_step(tokens, self._ops.device, self._limits.context)
            hidden = self._model(self._ops, self._kv, batch)
            answer = hidden, self._model.logits(self._ops, hidden, range(min(tokens, most)))
            self._ops.pick(hidden, [tokens - 1])
        if answer is None:
            raise ValueError("no steps to warm up with")
        return answer


def sizes(most: int) -> tuple[int, ...]:
    """Powers of two below `most`, and it: kernels are chosen by the next larger one."""
    return (*(2**i for i in range(most.bit_length()) if 2**i < most), most)


def is_decode(rows: Rows) -> bool:
    """Each of them has one token."""
    return len(rows.token_ids) == len(rows.starts)


def _moved(adjustments: Adjustments, places: Tensor) -> Adjustments:
    """Those of some picked tokens as those of the rows of logits in their places."""
    banned, bias, penalties = ((places[entries[0]], *entries[1:]) for entries in adjustments)
    return Adjustments(banned, bias, penalties)


def _context(rows: Rows) -> int:
    return max((start + count for start, count in zip(rows.starts, rows.counts, strict=True)), default=0)
