"""Vectors and scores as the rows of a step's result."""

from collections.abc import Sequence
from itertools import accumulate

import torch

from engine.plan import ResultRow
from kernels.encoder_ops import Span


def spans_of(counts: Sequence[int]) -> list[Span]:
    """Where each row's tokens are among the step's."""
    return [Span(first, count) for first, count in zip(accumulate(counts, initial=0), counts, strict=False)]


def to_rows(handles: Sequence[int], values: torch.Tensor) -> list[ResultRow]:
    """A result for each row of `values`; one with a number that is not finite has the fault NUMERIC_FAULT."""
    finite = torch.isfinite(values).all(dim=-1).tolist()
    return [
        ResultRow(handle, (), values=tuple(row)) if sound else ResultRow(handle, (), "NUMERIC_FAULT")
        for handle, row, sound in zip(handles, values.tolist(), finite, strict=True)
    ]
