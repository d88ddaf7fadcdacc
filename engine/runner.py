"""Carries out a step plan on the device: the only code of the engine that touches device tensors."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from engine.models.decoder import Decoder
from engine.models.pooling import Pooling
from engine.plan import FULL, PlanRow, ResultRow, StepPlan, StepResult, TokenLogprob
from engine.sampler import SamplerState
from engine.vectors import to_rows
from kernels.encoder_ops import EncoderBackend, Span
from kernels.ops import Draw, KvSpec, Logprobs, Rows, Sampling
from kernels.steps import SCORED_AT_ONCE, DrawingStep, StepLimits, make_step


class ModelRunner:
    """A model with its KV pages and its sampling state.

    Args:
        model: the decoder, in the layouts of `ops`.
        ops: the backend.
        kv: size of the KV cache.
        limits: the largest step.
        pooling: what becomes of the last token's hidden state where a vector is wanted.
    """

    def __init__(
        self,
        model: Decoder,
        ops: EncoderBackend,
        kv: KvSpec,
        limits: StepLimits,
        pooling: Pooling | None = None,
    ) -> None:
        self._model = model
        self._ops = ops
        self._normalise = pooling is not None and pooling.normalise
        self._kv = ops.allocate_kv(kv)
        self._step = make_step(model, ops, self._kv, limits)
        self._drawing = self._step if isinstance(self._step, DrawingStep) else None
        self._samplers = SamplerState(limits.rows)

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows, and draw a token or read a vector for each that asks for one.

        A row with logits or a vector not all finite comes back with fault NUMERIC_FAULT and nothing else.
        """
        with torch.inference_mode():
            self._prepare(plan)
            sampled = _sampled(plan)
            if sampled and self._drawing is not None:
                hidden, logits, read = self._begin(self._drawing, plan)
                draw = read()
            else:
                hidden, logits = self.compute(plan)
                draw = self._ops.sample(logits, self._sampling(sampled)) if sampled else Draw([], [])
            results = _tell(sampled, draw) | self._judge(sampled, draw, logits)
            if any(row.pooled for row in plan.rows):
                results |= self._pool(plan, hidden)
            for row, first in zip(plan.rows, _firsts(plan), strict=True):
                if row.targets:
                    result = results.get(row.handle, ResultRow(row.handle, ()))
                    results[row.handle] = self._score_prompt(row, first, hidden, result)
        return StepResult(
            plan.step, tuple(results.get(row.handle, ResultRow(row.handle, ())) for row in plan.rows)
        )

    @property
    def overlaps(self) -> bool:
        """Whether the device computes while the host does something else."""
        return self._drawing is not None

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Begin to compute the plan's rows, of which none asks for more than a token; what waits for the result.

        Raises:
            TypeError: the device does not overlap.
        """
        if self._drawing is None:
            raise TypeError("this device computes nothing by itself")
        with torch.inference_mode():
            self._prepare(plan)
            if _sampled(plan):
                _, _, read = self._begin(self._drawing, plan)
                return partial(_collect, plan, read)
            self.compute(plan)
            return partial(_collect, plan, lambda: Draw([], []))

    def _prepare(self, plan: StepPlan) -> None:
        """Scrub pages, and bring sampling slots up to date."""
        if plan.scrub:
            self._ops.scrub(self._kv, plan.scrub)
        self._samplers.set_up(plan.samplers)
        self._samplers.observe(plan.rows)

    def _begin(self, step: DrawingStep, plan: StepPlan) -> tuple[Any, Any, Callable[[], Draw]]:
        """As `compute`, and what waits for the tokens."""
        return step.sampled(*_rows(plan), self._sampling(_sampled(plan)), whole=_is_whole(plan))

    def compute(self, plan: StepPlan) -> tuple[Any, Any]:
        """Write keys and values; what the plan's tokens come to before the head, and the logits of its samples.

        The first may be None where no row is pooled or scored. Logits [rows that sample, vocabulary] are those of
        each row's last token. Both hold until the next step.
        """
        return self._step(*_rows(plan), whole=_is_whole(plan))

    def _pool(self, plan: StepPlan, hidden: Any) -> dict[int, ResultRow]:
        """The vectors of rows that are pooled: what their last tokens came to."""
        ends = [first + len(row.token_ids) for row, first in zip(plan.rows, _firsts(plan), strict=True)]
        wanted = {row.handle: Span(end - 1, 1) for row, end in zip(plan.rows, ends, strict=True) if row.pooled}
        pooled = self._ops.pool(hidden, list(wanted.values()), "last")
        rows = to_rows(list(wanted), self._ops.vectors(pooled, len(wanted), self._normalise))
        return {row.handle: row for row in rows}

    def _sampling(self, rows: list[PlanRow]) -> Sampling:
        """How to draw for rows that sample."""
        slots = [row.sampling_slot for row in rows if row.sampling_slot is not None]
        return self._samplers.gather(slots, [row.end for row in rows], self._model.config.vocab_size)

    def _judge(self, rows: list[PlanRow], draw: Draw, logits: Any) -> dict[int, ResultRow]:
        """What was drawn for rows of which it is asked what the model thought, with that."""
        tops = {i: self._samplers.logprobs(row.slot) for i, row in enumerate(rows) if draw.finite[i]}
        wanted = {i: top for i, top in tops.items() if top is not None}
        if not wanted:
            return {}
        tokens = [draw.token_ids[i] for i in wanted]
        found = self._ops.logprobs(logits[list(wanted)], tokens, max(wanted.values()))
        reports = _reports(tokens, found, list(wanted.values()))
        judged = [
            ResultRow(rows[i].handle, (report.token_id,), logprobs=(report,))
            for i, report in zip(wanted, reports, strict=True)
        ]
        return {row.handle: row for row in judged}

    def _score_prompt(self, row: PlanRow, first: int, hidden: Any, result: ResultRow) -> ResultRow:
        """`result` with what the model thought of the row's targets; its tokens begin at `first` in `hidden`."""
        top, reports = row.prompt_logprobs, []
        wanted = row.targets[: len(row.token_ids)]
        for begin in range(0, len(wanted), SCORED_AT_ONCE):
            targets = wanted[begin : begin + SCORED_AT_ONCE]
            places = range(first + begin, first + begin + len(targets))
            found = self._ops.logprobs(self._model.logits(self._ops, hidden, places), targets, top)
            if not all(found.finite):
                return ResultRow(row.handle, (), "NUMERIC_FAULT")
            reports.extend(_reports(targets, found, [top] * len(targets)))
        return result._replace(prompt_logprobs=tuple(reports))


def _collect(plan: StepPlan, read: Callable[[], Draw]) -> StepResult:
    """Wait for the tokens of a step."""
    results = _tell(_sampled(plan), read())
    return StepResult(plan.step, tuple(results.get(row.handle, ResultRow(row.handle, ())) for row in plan.rows))


def _tell(rows: list[PlanRow], draw: Draw) -> dict[int, ResultRow]:
    """What was drawn for rows that sample."""
    return {
        row.handle: ResultRow(row.handle, (token,)) if finite else ResultRow(row.handle, (), "NUMERIC_FAULT")
        for row, token, finite in zip(rows, draw.token_ids, draw.finite, strict=True)
    }


def _rows(plan: StepPlan) -> tuple[Rows, list[int]]:
    """The plan's rows for a step, and the last token of each that samples."""
    ends = accumulate(len(row.token_ids) for row in plan.rows)
    sampled = [end - 1 for row, end in zip(plan.rows, ends, strict=True) if row.sampling_slot is not None]
    rows = Rows(
        token_ids=[token for row in plan.rows for token in row.token_ids],
        starts=[row.start for row in plan.rows],
        counts=[len(row.token_ids) for row in plan.rows],
        block_tables=[_table(row) for row in plan.rows],
    )
    return rows, sampled


def _sampled(plan: StepPlan) -> list[PlanRow]:
    return [row for row in plan.rows if row.sampling_slot is not None]


def _is_whole(plan: StepPlan) -> bool:
    """Whether what tokens come to before the head is wanted."""
    return any(row.pooled or row.targets for row in plan.rows)


def _firsts(plan: StepPlan) -> list[int]:
    """Where each row's tokens begin among the step's."""
    return [0, *accumulate(len(row.token_ids) for row in plan.rows)][:-1]


def _reports(tokens: Sequence[int], found: Logprobs, tops: Sequence[int]) -> list[TokenLogprob]:
    """What was found of each token, with as many of the likeliest as are asked for it."""
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(ids, logprobs, strict=True))[:top])
        for token, logprob, rank, ids, logprobs, top in zip(tokens, *found[:4], tops, strict=True)
    ]


def _table(row: PlanRow) -> tuple[int, ...]:
    """The pages of the group that holds every token."""
    return next(table.blocks for table in row.block_tables if table.group == FULL)
