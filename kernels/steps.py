"""A model's whole step: its ops one by one, or all at once where a backend makes a program of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from kernels.ops import Backend, Batch, Draw, Hidden, KvCache, Rows, Sampling

if TYPE_CHECKING:
    from torch import Tensor


SCORED_AT_ONCE = 64
"""Tokens of a prompt whose logits are computed at once, so that memory does not grow with prompts."""


class StepLimits(NamedTuple):
    """The largest step that must do.

    Attributes:
        tokens: of all rows.
        rows: at once.
        context: tokens of a row, those before the step included.
    """

    tokens: int
    rows: int
    context: int


class StepModel(Protocol):
    """A model as ops."""

    def __call__(self, ops: Backend, kv: KvCache, batch: Batch, /) -> Hidden:
        """What a step's tokens come to before the head."""

    def logits(self, ops: Backend, hidden: Hidden, tokens: Sequence[int], /) -> Tensor:
        """Logits of some of the step's tokens."""


class Step(Protocol):
    """A whole step of one model over one KV cache."""

    def __call__(
        self, rows: Rows, picked: Sequence[int], *, whole: bool = True
    ) -> tuple[Hidden | None, Tensor | None]:
        """Write keys and values, and compute what is wanted.

        Args:
            rows: of the step.
            picked: tokens, at most one of each row.
            whole: what all tokens come to is wanted, not the logits of `picked` alone.

        Returns:
            What the tokens come to before the head, as the ops have it, or perhaps None where that is not wanted;
            and the logits of `picked`, which may be None where none are; both until the next step.

        Raises:
            ValueError: the step is larger than the limits.
        """


@runtime_checkable
class DrawingStep(Step, Protocol):
    """A step on a device that computes while the host does something else, and draws there, too."""

    def sampled(
        self, rows: Rows, picked: Sequence[int], sampling: Sampling, *, whole: bool = True
    ) -> tuple[Hidden | None, Tensor, Callable[[], Draw]]:
        """Begin a step that draws a token for each of `picked`.

        A token id -1 - i of the rows is what the last such step draws for its `picked[i]`, read or not.

        Args:
            rows: of the step.
            picked: tokens, at most one of each row, and at least one.
            sampling: how to draw for each of them; on the host.
            whole: as in a call.

        Returns:
            As a call, and what waits for the tokens and reads them, before the step after the next is begun.

        Raises:
            ValueError: the step is larger than the limits.
        """


@runtime_checkable
class Compiler(Protocol):
    """A backend that offers it."""

    def compile(self, model: StepModel, kv: KvCache, limits: StepLimits) -> Step:
        """The step of `model` over `kv`."""


def make_step(model: StepModel, ops: Backend, kv: KvCache, limits: StepLimits) -> Step:
    """The step of `model` over `kv`: a program where the backend has them, with the bits of its ops one by one."""
    return ops.compile(model, kv, limits) if isinstance(ops, Compiler) else _OpByOp(model, ops, kv)


class _OpByOp(NamedTuple):
    """The ops, run as the model calls them."""

    model: StepModel
    ops: Backend
    kv: KvCache

    def __call__(
        self, rows: Rows, picked: Sequence[int], *, whole: bool = True
    ) -> tuple[Hidden | None, Tensor | None]:
        hidden = self.model(self.ops, self.kv, self.ops.begin(rows, self.kv))
        return hidden, self.model.logits(self.ops, hidden, picked) if picked else None
