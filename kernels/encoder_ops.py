"""The ops of encoders, beside those of `kernels.ops`: whole prompts, no KV pages, attention to both sides.

The promise of a deterministic backend holds here too: what a row comes to has the same bits whatever other rows
share the step, and wherever it lies among them.

Source: Devlin et al., "BERT", NAACL 2019; Warner et al., "Smarter, Better, Faster, Longer: A Modern Bidirectional
Encoder", 2024 (ModernBERT: windows to both sides, rotary positions).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kernels.ops import Backend, Batch, Heads, Hidden, Rope, Table, Vector

if TYPE_CHECKING:
    from torch import Tensor

POINTWISE = ("gelu", "gelu_tanh", "relu", "sigmoid", "silu", "tanh")
"""Functions of single numbers: as in `kernels.ops.ACTIVATIONS`, and relu(x) = max(x, 0)."""

POOLINGS = ("cls", "mean", "max", "last")
"""How the hidden states of a row become one: that of its first token, their mean, the largest number in each
place, or that of its last token."""


class Passages(NamedTuple):
    """One step's rows, each a whole prompt.

    Attributes:
        token_ids: all rows' tokens, one after another; T in all.
        type_ids: the segment of each.
        positions: the place of each in the model's table or rotation of positions.
        counts: tokens of each row; positive.
    """

    token_ids: Sequence[int]
    type_ids: Sequence[int]
    positions: Sequence[int]
    counts: Sequence[int]


class Looking(NamedTuple):
    """How the tokens of one layer attend to their row.

    Attributes:
        heads: of the fused projection; as many for keys and values as for queries.
        scale: factor of q·k.
        reach: a token sees this many on each side, beside itself; 0: all.
    """

    heads: Heads
    scale: float
    reach: int = 0


class Span(NamedTuple):
    """A row's tokens among the step's."""

    first: int
    length: int


class EncoderBackend(Backend, Protocol):
    """What an encoder needs of a device, and an embedder of any kind."""

    def prepare_turns(self, inv_freq: Sequence[float], max_positions: int) -> Rope:
        """Rotations as in `prepare_rope`, for `attend`."""

    def begin_passages(self, passages: Passages) -> Batch:
        """Prepare a step over `passages`."""

    def embed_passages(self, batch: Batch, words: Table, places: Table | None, types: Table | None) -> Hidden:
        """Sum of the embeddings of each token, its position and its segment; [T, hidden]."""

    def layer_norm(self, x: Hidden, weight: Vector, bias: Vector | None, eps: float) -> Hidden:
        """(x - mean) / sqrt(variance + eps) · weight + bias, over the last dimension."""

    def pointwise(self, x: Hidden, function: str) -> Hidden:
        """One of POINTWISE, of each number."""

    def attend(self, qkv: Hidden, looking: Looking, rope: Rope | None, batch: Batch) -> Hidden:
        """softmax(q·kᵀ · scale) · v of each token over its row, queries and keys rotated; [T, query·dim]."""

    def pool(self, x: Hidden, spans: Sequence[Span], pooling: str) -> Hidden:
        """One row [hidden] for each span of the step's tokens; one of POOLINGS."""

    def vectors(self, x: Hidden, count: int, normalise: bool) -> Tensor:
        """The first `count` rows, float32 or wider, divided by their Euclidean norms if so wanted."""
