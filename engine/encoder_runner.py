"""Carries out the step plans of an encoder: whole prompts, no pages, a vector or a score of each."""

import torch

from engine.models.encoders.encoder import Encoder
from engine.models.pooling import Pooling
from engine.plan import StepPlan, StepResult
from engine.vectors import spans_of, to_rows
from kernels.encoder_ops import EncoderBackend, Span


class EncoderRunner:
    """An encoder.

    Args:
        model: in the layouts of `ops`; with a head it makes scores.
        ops: the backend.
        pooling: what becomes of the hidden states of a model without a head.
    """

    def __init__(self, model: Encoder, ops: EncoderBackend, pooling: Pooling | None) -> None:
        self._model = model
        self._ops = ops
        self._pooling = pooling or Pooling("cls")

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows, each a whole prompt.

        A row whose numbers are not all finite comes back with fault NUMERIC_FAULT and no values.
        """
        passages = self._model.passages([row.token_ids for row in plan.rows], [row.type_ids for row in plan.rows])
        with torch.inference_mode():
            batch = self._ops.begin_passages(passages)
            values = self._values(self._model(self._ops, batch), spans_of(passages.counts))
            return StepResult(plan.step, tuple(to_rows([row.handle for row in plan.rows], values)))

    def warm_up(self, step_tokens: int, context: int) -> None:
        """Compute steps of every size that kernels are chosen by, so that no request waits for one to be loaded.

        Args:
            step_tokens: of the largest step.
            context: tokens of the longest prompt.
        """
        counts = {min(2**i, step_tokens) for i in range(step_tokens.bit_length() + 1)}
        for tokens in sorted(counts, reverse=True):
            lengths = [context] * (tokens // context) + [tokens % context] * (tokens % context > 0)
            passages = self._model.passages([(0,) * length for length in lengths], [()] * len(lengths))
            with torch.inference_mode():
                batch = self._ops.begin_passages(passages)
                self._values(self._model(self._ops, batch), spans_of(passages.counts))

    def _values(self, hidden: object, spans: list[Span]) -> torch.Tensor:
        """A row for each span of what the step came to."""
        if self._model.head is not None:
            return self._ops.vectors(self._model.head(self._ops, hidden, spans), len(spans), normalise=False)
        pooled = self._ops.pool(hidden, spans, self._pooling.kind)
        return self._ops.vectors(pooled, len(spans), self._pooling.normalise)
