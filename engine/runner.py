"""Carries out a step plan on the device: the only code of the engine that touches device tensors."""

from typing import Any

import torch

from engine.models.blocks import Decoder
from engine.plan import FULL, PlanRow, ResultRow, StepPlan, StepResult
from engine.sampler import SamplerState
from kernels.ops import Backend, KvSpec, Rows


class ModelRunner:
    """A model with its KV pages and its sampling state.

    Args:
        model: the decoder, in the layouts of `ops`.
        ops: the backend.
        kv: size of the KV cache.
        num_slots: requests that can run at once.
    """

    def __init__(self, model: Decoder, ops: Backend, kv: KvSpec, num_slots: int) -> None:
        self._model = model
        self._ops = ops
        self._kv = ops.allocate_kv(kv)
        self._samplers = SamplerState(num_slots)

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows and draw a token for each that asks for one.

        A row whose logits are not all finite comes back with fault NUMERIC_FAULT and no token.
        """
        with torch.inference_mode():
            if plan.scrub:
                self._ops.scrub(self._kv, plan.scrub)
            self._samplers.set_up(plan.samplers)
            sampled = [row for row in plan.rows if row.sampling_slot is not None]
            logits = self.logits(plan)
            results = self._draw(sampled, logits) if sampled else {}
        return StepResult(
            plan.step, tuple(results.get(row.handle, ResultRow(row.handle, ())) for row in plan.rows)
        )

    def logits(self, plan: StepPlan) -> Any:
        """Logits [rows that sample, vocabulary] of the plan's last tokens; keys and values are written."""
        rows = Rows(
            token_ids=[token for row in plan.rows for token in row.token_ids],
            starts=[row.start for row in plan.rows],
            counts=[len(row.token_ids) for row in plan.rows],
            block_tables=[_table(row) for row in plan.rows],
            sampled=[i for i, row in enumerate(plan.rows) if row.sampling_slot is not None],
        )
        with torch.inference_mode():
            batch = self._ops.begin(rows, self._kv)
            return self._model(self._ops, self._kv, batch)

    def _draw(self, rows: list[PlanRow], logits: Any) -> dict[int, ResultRow]:
        slots = [row.sampling_slot for row in rows if row.sampling_slot is not None]
        draw = self._ops.sample(logits, self._samplers.gather(slots, [row.end for row in rows]))
        return {
            row.handle: ResultRow(row.handle, (token,)) if finite else ResultRow(row.handle, (), "NUMERIC_FAULT")
            for row, token, finite in zip(rows, draw.token_ids, draw.finite, strict=True)
        }


def _table(row: PlanRow) -> tuple[int, ...]:
    """The pages of the group that holds every token."""
    return next(table.blocks for table in row.block_tables if table.group == FULL)
