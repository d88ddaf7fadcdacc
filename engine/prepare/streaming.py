"""One step of a model over many texts at once, whose matrices are in memory only while they are multiplied with.

So a model that is larger than memory is measured, and quantised in the order in which its layers compute: each
matrix meets the inputs that the quantised ones before it make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom

from engine.errors import EngineError
from engine.prepare.calibration import Sample
from engine.prepare.folder import ModelFolder, Named, StreamedWeights
from kernels.cpu import CpuBackend
from kernels.ops import Attending, Heads, KvSpec, Matrix, QkNorm, Rows
from kernels.packed import Packed, dequantise

if TYPE_CHECKING:
    from torch import Tensor

_PAGE = 64
_MOST_NATS = 700.0  # that are lost on a token; more has no exponential
_SLICE_BYTES = 256 << 20  # of a plain copy of the table, or of logits

Multiply = Callable[[tuple[Named, ...], "Tensor"], "Tensor"]
"""x · wᵀ of matrices that are stacked."""


class _Streamed(NamedTuple):
    matrices: tuple[Named, ...]
    bias: Tensor | None


class StreamingBackend(CpuBackend):
    """The CPU backend in float32 for one step, its keys and values kept for one layer, its matrices not at all.

    Args:
        multiply: computes with a matrix that `StreamedWeights` named.
    """

    def __init__(self, multiply: Multiply) -> None:
        super().__init__(torch.float32)
        self._multiply = multiply

    def prepare_linear(self, weights: Sequence[Any], biases: Sequence[Tensor] = ()) -> Any:
        """See `kernels.ops.Backend`; what is only named stays so."""
        if not isinstance(weights[0], Named):
            return super().prepare_linear(weights, biases)
        return _Streamed(tuple(weights), torch.cat([bias.float() for bias in biases]) if biases else None)

    def prepare_table(self, weight: Matrix) -> Any:
        """See `kernels.ops.Backend`; a plain one in its own number type."""
        return super().prepare_table(weight) if isinstance(weight, Packed) else weight

    def tied_head(self, table: Any) -> Any:
        """See `kernels.ops.Backend`."""
        return table if isinstance(table, torch.Tensor) else super().tied_head(table)

    def embed(self, batch: Any, table: Any, scale: float = 1.0) -> Tensor:
        """See `kernels.ops.Backend`."""
        if not isinstance(table, torch.Tensor):
            return super().embed(batch, table, scale)
        return table.index_select(0, batch.token_ids).float() * scale

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        """See `kernels.ops.Backend`."""
        if isinstance(weight, _Streamed):
            made = self._multiply(weight.matrices, x)
            return made if weight.bias is None else made.add_(weight.bias)
        if isinstance(weight, torch.Tensor):  # the table, a few rows at a time
            rows = max(1, _SLICE_BYTES // (4 * weight.shape[1]))
            return torch.cat([F.linear(x, some.float()) for some in torch.split(weight, rows)], -1)
        return super().linear(x, weight)

    def rope_and_write_kv(
        self, qkv: Tensor, heads: Heads, rope: Any, kv: Any, layer: int, batch: Any, norms: QkNorm | None = None
    ) -> Tensor:
        """See `kernels.ops.Backend`; one layer's keys and values take the place of those before."""
        return super().rope_and_write_kv(qkv, heads, rope, kv, 0, batch, norms)

    def paged_attention(
        self, q: Tensor, heads: Heads, attending: Attending, kv: Any, layer: int, batch: Any
    ) -> Tensor:
        """See `kernels.ops.Backend`."""
        return super().paged_attention(q, heads, attending, kv, 0, batch)


class Step(NamedTuple):
    """What a step over texts came to.

    Attributes:
        model: that was built.
        ops: the backend.
        hidden: [T, hidden], before the head.
    """

    model: Any
    ops: StreamingBackend
    hidden: Tensor


def compute(
    folder: ModelFolder, texts: Sequence[Sample], multiply: Multiply, tables: Mapping[str, Packed] | None = None
) -> Step:
    """Compute all layers over texts, each from its beginning, with `tables` for the folder's embeddings."""
    ops, (config, family) = StreamingBackend(multiply), folder.decoder
    longest = max(len(text.ids) for text in texts)
    with torch.inference_mode():
        model = family.build(
            config, StreamedWeights(folder, tables or {}), ops, longest, config.max_context_tokens
        )
        blocks: list[range] = []
        pages = 0
        for text in texts:
            needed = -(-len(text.ids) // _PAGE)
            blocks.append(range(pages, pages + needed))
            pages += needed
        kv = ops.allocate_kv(KvSpec(1, pages, _PAGE, config.num_kv_heads, config.head_dim))
        ids = [token for text in texts for token in text.ids]
        batch = ops.begin(Rows(ids, [0] * len(texts), [len(text.ids) for text in texts], blocks), kv)
        return Step(model, ops, model(ops, kv, batch))


def plain_product(folder: ModelFolder) -> Multiply:
    """Multiplies with the matrices as the folder has them; quantised ones as the numbers they stand for."""

    def multiply(matrices: tuple[Named, ...], x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, read_plain(folder, matrix.name)) for matrix in matrices], -1)

    return multiply


def read_plain(folder: ModelFolder, name: str) -> Tensor:
    """A matrix of the folder in float32."""
    matrix = folder.matrix(name)
    return dequantise(matrix) if isinstance(matrix, Packed) else matrix.float()


def perplexity(folder: ModelFolder, texts: Sequence[Sample]) -> float:
    """How many tokens the model is torn between on average, over those of `texts` that it is to foresee.

    Raises:
        EngineError: CALIBRATION_INVALID, that is no number, or none that a float holds.
    """
    step = compute(folder, texts, plain_product(folder))
    places: list[int] = []
    nexts: list[int] = []
    position = 0
    for text in texts:
        places += range(position + text.first - 1, position + len(text.ids) - 1)
        nexts += text.ids[text.first :]
        position += len(text.ids)
    at_once = max(1, _SLICE_BYTES // (4 * folder.served.config.vocab_size))
    total = 0.0
    with torch.inference_mode():
        for begin in range(0, len(places), at_once):
            logits = step.model.logits(step.ops, step.hidden, places[begin : begin + at_once])
            wanted = torch.tensor(nexts[begin : begin + at_once])
            total += float(F.cross_entropy(logits.double(), wanted, reduction="sum"))
    if not total / len(places) < _MOST_NATS:
        raise EngineError("CALIBRATION_INVALID", "what the model makes of the calibration text is no number")
    return math.exp(total / len(places))


def peak_bytes(folder: ModelFolder, tokens: int, largest: tuple[int, int], feedback: bool) -> int:
    """Bytes that quantising takes at its highest, the process itself left out.

    Args:
        folder: the model.
        tokens: of all texts together; 0: nothing is computed but the matrices themselves.
        largest: most rows and most columns of a matrix.
        feedback: errors are fed back, which needs four square matrices of the inputs.
    """
    matrix = 4 * (8 if feedback else 4) * largest[0] * largest[1]
    if not tokens:
        return matrix
    config, family = folder.decoder
    inner = max(layer.mlp.intermediate for layer in config.layers)
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    table = folder.entries[family.names.embedding]
    activations = 4 * tokens * (4 * config.hidden_size + max(3 * inner, 4 * heads))
    return table.end - table.begin + activations + matrix + (16 * largest[1] ** 2 if feedback else 0)
