"""What a backend may offer beside its ops: a model's whole step at once, recorded from these ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from kernels.ops import Backend, Batch, Hidden, KvCache, Rows

if TYPE_CHECKING:
    from torch import Tensor


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

    def __call__(self, rows: Rows, picked: Sequence[int]) -> tuple[Hidden, Tensor]:
        """What `begin`, the model, and its logits of the tokens `picked` come to, bit for bit.

        Args:
            rows: of the step.
            picked: at most one token for each row.

        Returns:
            Hidden, as the ops have it, and logits; both until the next step.

        Raises:
            ValueError: the step is larger than the limits.
        """


@runtime_checkable
class Compiler(Protocol):
    """A backend that offers it."""

    def compile(self, model: StepModel, kv: KvCache, limits: StepLimits) -> Step:
        """The step of `model` over `kv`."""
