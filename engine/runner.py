"""Carries out a step plan on the device: the only code of the engine that touches device tensors."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from engine.models.decoder import Decoder
from engine.models.pooling import Pooling
from engine.plan import FULL, PlanRow, ResultRow, StepPlan, StepResult, TokenLogprob
from engine.sampler import SamplerState
from engine.vectors import to_rows
from kernels.encoder_ops import EncoderBackend, Span
from kernels.ops import KvSpec, Logprobs, Rows
from kernels.steps import StepLimits, make_step

_SCORED_AT_ONCE = 64  # prompt tokens whose logits are computed at once, so that memory does not grow with prompts


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
        self._samplers = SamplerState(limits.rows)

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows, and draw a token or read a vector for each that asks for one.

        A row with logits or a vector not all finite comes back with fault NUMERIC_FAULT and nothing else.
        """
        with torch.inference_mode():
            if plan.scrub:
                self._ops.scrub(self._kv, plan.scrub)
            self._samplers.set_up(plan.samplers)
            self._samplers.observe(plan.rows)
            hidden, logits = self.compute(plan)
            sampled = [row for row in plan.rows if row.sampling_slot is not None]
            results = self._draw(sampled, logits) if sampled else {}
            if any(row.pooled for row in plan.rows):
                results |= self._pool(plan, hidden)
            for row, first in zip(plan.rows, _firsts(plan), strict=True):
                if row.targets:
                    result = results.get(row.handle, ResultRow(row.handle, ()))
                    results[row.handle] = self._score_prompt(row, first, hidden, result)
        return StepResult(
            plan.step, tuple(results.get(row.handle, ResultRow(row.handle, ())) for row in plan.rows)
        )

    def compute(self, plan: StepPlan) -> tuple[Any, Any]:
        """Write keys and values; what the plan's tokens come to before the head, and the logits of its samples.

        The first may be None where no row is pooled or scored. Logits [rows that sample, vocabulary] are those of
        each row's last token. Both hold until the next step.
        """
        ends = accumulate(len(row.token_ids) for row in plan.rows)
        sampled = [end - 1 for row, end in zip(plan.rows, ends, strict=True) if row.sampling_slot is not None]
        rows = Rows(
            token_ids=[token for row in plan.rows for token in row.token_ids],
            starts=[row.start for row in plan.rows],
            counts=[len(row.token_ids) for row in plan.rows],
            block_tables=[_table(row) for row in plan.rows],
        )
        return self._step(rows, sampled, whole=any(row.pooled or row.targets for row in plan.rows))

    def _pool(self, plan: StepPlan, hidden: Any) -> dict[int, ResultRow]:
        """The vectors of rows that are pooled: what their last tokens came to."""
        ends = [first + len(row.token_ids) for row, first in zip(plan.rows, _firsts(plan), strict=True)]
        wanted = {row.handle: Span(end - 1, 1) for row, end in zip(plan.rows, ends, strict=True) if row.pooled}
        pooled = self._ops.pool(hidden, list(wanted.values()), "last")
        rows = to_rows(list(wanted), self._ops.vectors(pooled, len(wanted), self._normalise))
        return {row.handle: row for row in rows}

    def _draw(self, rows: list[PlanRow], logits: Any) -> dict[int, ResultRow]:
        slots = [row.sampling_slot for row in rows if row.sampling_slot is not None]
        sampling = self._samplers.gather(slots, [row.end for row in rows], logits.shape[-1])
        draw = self._ops.sample(logits, sampling)
        results = {
            row.handle: ResultRow(row.handle, (token,)) if finite else ResultRow(row.handle, (), "NUMERIC_FAULT")
            for row, token, finite in zip(rows, draw.token_ids, draw.finite, strict=True)
        }
        wanted = {
            i: top
            for i, slot in enumerate(slots)
            if (top := self._samplers.logprobs(slot)) is not None and draw.finite[i]
        }
        if wanted:
            tokens = [draw.token_ids[i] for i in wanted]
            found = self._ops.logprobs(logits[list(wanted)], tokens, max(wanted.values()))
            reports = _reports(tokens, found, list(wanted.values()))
            for i, report in zip(wanted, reports, strict=True):
                handle = rows[i].handle
                results[handle] = results[handle]._replace(logprobs=(report,))
        return results

    def _score_prompt(self, row: PlanRow, first: int, hidden: Any, result: ResultRow) -> ResultRow:
        """`result` with what the model thought of the row's targets; its tokens begin at `first` in `hidden`."""
        top, reports = row.prompt_logprobs, []
        wanted = row.targets[: len(row.token_ids)]
        for begin in range(0, len(wanted), _SCORED_AT_ONCE):
            targets = wanted[begin : begin + _SCORED_AT_ONCE]
            places = range(first + begin, first + begin + len(targets))
            found = self._ops.logprobs(self._model.logits(self._ops, hidden, places), targets, top)
            if not all(found.finite):
                return ResultRow(row.handle, (), "NUMERIC_FAULT")
            reports.extend(_reports(targets, found, [top] * len(targets)))
        return result._replace(prompt_logprobs=tuple(reports))


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
