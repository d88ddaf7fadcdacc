"""The decoder skeleton that the families share: pre-norm attention and gated MLP over the op protocol.

Nothing here knows a tensor library or a device. Weights come by name from whoever read them.

Source: Vaswani et al., NeurIPS 2017; Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019;
Shazeer, "GLU Variants Improve Transformer", 2020; Ainslie et al., "GQA", EMNLP 2023.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kernels.ops import Backend, Batch, Heads, Hidden, KvCache, Linear, Rope, Table, Vector

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""The tensors a model needs, by name, with their shapes: no more and no fewer."""


class Weights(Protocol):
    """Tensors by name; each is there with the shape the model declared, and is handed over once."""

    def pop(self, name: str, /) -> Any:
        """The tensor `name`, which is not kept."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention with rotary positions over paged keys and values."""

    qkv: Linear
    out: Linear
    heads: Heads

    def __call__(self, ops: Backend, x: Hidden, rope: Rope, kv: KvCache, layer: int, batch: Batch) -> Hidden:
        """x [T, hidden] -> [T, hidden]."""
        q = ops.rope_and_write_kv(ops.linear(x, self.qkv), self.heads, rope, kv, layer, batch)
        return ops.linear(ops.paged_attention(q, self.heads, kv, layer, batch), self.out)


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """down(silu(gate(x)) · up(x))."""

    gate_up: Linear
    down: Linear

    def __call__(self, ops: Backend, x: Hidden) -> Hidden:
        """x [T, hidden] -> [T, hidden]."""
        return ops.linear(ops.gated_silu(ops.linear(x, self.gate_up)), self.down)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer: each half reads the normalised residual stream and adds to it."""

    attention_norm: Vector
    attention: Attention
    mlp_norm: Vector
    mlp: GatedMlp


@dataclass(frozen=True, slots=True)
class Decoder:
    """A whole model."""

    table: Table
    layers: tuple[DecoderLayer, ...]
    final_norm: Vector
    head: Linear
    rope: Rope
    eps: float

    def __call__(self, ops: Backend, kv: KvCache, batch: Batch) -> Hidden:
        """What one step's T tokens come to before the head, [T, hidden]; keys and values are written."""
        residual = ops.embed(batch, self.table)
        x = ops.rms_norm(residual, self.layers[0].attention_norm, self.eps)
        following = [layer.attention_norm for layer in self.layers[1:]] + [self.final_norm]
        for i, (layer, norm) in enumerate(zip(self.layers, following, strict=True)):
            x = layer.attention(ops, x, self.rope, kv, i, batch)
            x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, self.eps)
            x, residual = ops.add_rms_norm(layer.mlp(ops, x), residual, norm, self.eps)
        return x
