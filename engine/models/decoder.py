"""The one decoder that all families declare: attention and gated MLPs over the op protocol, and how it is built.

Nothing here knows a tensor library or a device. Weights come by name from whoever read them.

Source: Vaswani et al., NeurIPS 2017; Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019;
Shazeer, "GLU Variants Improve Transformer", 2020; Ainslie et al., "GQA", EMNLP 2023; Shazeer et al., "Outrageously
Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", ICLR 2017.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from engine.models.spec import Dense, LayerSpec, Mixture, ModelConfig
from engine.models.tensors import Names, Weights
from kernels.ops import (
    Attending,
    Backend,
    Batch,
    Experts,
    Heads,
    Hidden,
    KvCache,
    Linear,
    Matrix,
    QkNorm,
    Rope,
    Routing,
    Table,
    Vector,
)


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention with rotary positions over paged keys and values."""

    qkv: Linear
    out: Linear
    heads: Heads
    rope: Rope
    attending: Attending
    norms: QkNorm | None

    def __call__(self, ops: Backend, x: Hidden, kv: KvCache, layer: int, batch: Batch) -> Hidden:
        """x [T, hidden] -> [T, hidden]."""
        qkv = ops.linear(x, self.qkv)
        q = ops.rope_and_write_kv(qkv, self.heads, self.rope, kv, layer, batch, self.norms)
        return ops.linear(ops.paged_attention(q, self.heads, self.attending, kv, layer, batch), self.out)


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """down(act(gate(x)) · up(x))."""

    gate_up: Linear
    down: Linear
    activation: str

    def __call__(self, ops: Backend, x: Hidden) -> Hidden:
        """x [T, hidden] -> [T, hidden]."""
        return ops.linear(ops.gated(ops.linear(x, self.gate_up), self.activation), self.down)


@dataclass(frozen=True, slots=True)
class MixtureMlp:
    """A few gated MLPs of many for each token, as its router scores them."""

    router: Linear
    experts: Experts
    routing: Routing
    activation: str

    def __call__(self, ops: Backend, x: Hidden) -> Hidden:
        """x [T, hidden] -> [T, hidden]."""
        return ops.mixture(x, self.router, self.experts, self.routing, self.activation)


Mlp: TypeAlias = GatedMlp | MixtureMlp


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer: each half reads the residual stream and adds to it; a norm that is None is left out.

    Attributes:
        before_attention: of what attention reads.
        attention: the first half.
        after_attention: of what it adds.
        before_mlp: of what the MLP reads.
        mlp: the second half.
        after_mlp: of what it adds.
    """

    before_attention: Vector | None
    attention: Attention
    after_attention: Vector | None
    before_mlp: Vector | None
    mlp: Mlp
    after_mlp: Vector | None


@dataclass(frozen=True, slots=True)
class Decoder:
    """A whole model; `config` says how its parts are scaled."""

    config: ModelConfig
    table: Table
    layers: tuple[DecoderLayer, ...]
    final_norm: Vector
    head: Linear

    def __call__(self, ops: Backend, kv: KvCache, batch: Batch) -> Hidden:
        """What one step's T tokens come to before the head, [T, hidden]; keys and values are written."""
        x = residual = ops.embed(batch, self.table, self.config.embedding_scale)
        first = self.layers[0].before_attention
        if first is not None:
            x = ops.rms_norm(residual, first, self.config.norm_eps)
        following = [layer.before_attention for layer in self.layers[1:]] + [self.final_norm]
        for i, (layer, norm) in enumerate(zip(self.layers, following, strict=True)):
            x = layer.attention(ops, x, kv, i, batch)
            x, residual = self._add(ops, x, residual, layer.after_attention, layer.before_mlp)
            x, residual = self._add(ops, layer.mlp(ops, x), residual, layer.after_mlp, norm)
        return x

    def logits(self, ops: Backend, hidden: Hidden, tokens: Sequence[int]) -> Any:
        """Logits [len(tokens), vocabulary] of some of the step's tokens, out of what the step came to."""
        return ops.logits(hidden, self.head, tokens, self.config.logits_scale, self.config.logits_softcap)

    def _add(
        self, ops: Backend, x: Hidden, residual: Hidden, after: Vector | None, before: Vector | None
    ) -> tuple[Hidden, Hidden]:
        """What the next half reads, and the residual stream, after one half came to x."""
        eps, scale = self.config.norm_eps, self.config.residual_scale
        if after is not None:
            x = ops.rms_norm(x, after, eps)
        if before is None:
            total = ops.add(x, residual, scale)
            return total, total
        return ops.add_rms_norm(x, residual, before, eps, scale)


def build(
    config: ModelConfig, names: Names, weights: Weights, ops: Backend, max_positions: int, context: int
) -> Decoder:
    """The model in the layouts of `ops`; `weights` is emptied.

    Args:
        config: of the model.
        names: what its family calls its tensors.
        weights: its tensors.
        ops: the backend.
        max_positions: positions that a request can reach.
        context: the longest context that the deployment serves, by which LongRoPE chooses its factors.
    """
    parts = _Parts(config, names, weights, ops)
    table = ops.prepare_table(weights.matrix(names.embedding.removesuffix(".weight")))
    ropes = [
        ops.prepare_rope(rope.inv_freq(config.head_dim, context), max_positions, rope.scale)
        for rope in config.ropes
    ]
    layers = tuple(
        parts.layer(names.layer.format(i), layer, ropes[layer.rope]) for i, layer in enumerate(config.layers)
    )
    final_norm = parts.norm(names.final_norm)
    head = ops.tied_head(table) if config.tie_word_embeddings else ops.prepare_linear([weights.matrix(names.head)])
    return Decoder(config, table, layers, final_norm, head)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Takes tensors by name and prepares them."""

    config: ModelConfig
    names: Names
    weights: Weights
    ops: Backend

    def layer(self, prefix: str, spec: LayerSpec, rope: Rope) -> DecoderLayer:
        names = self.names
        before_attention, after_attention, before_mlp, after_mlp = (
            self.norm(prefix + name) if name else None
            for name in (names.before_attention, names.after_attention, names.before_mlp, names.after_mlp)
        )
        attention = self._attention(prefix, spec, rope)
        mlp = self._gated(prefix) if isinstance(spec.mlp, Dense) else self._mixture(prefix, spec.mlp)
        return DecoderLayer(before_attention, attention, after_attention, before_mlp, mlp, after_mlp)

    def norm(self, name: str) -> Vector:
        return self.ops.prepare_vector(self.weights.pop(name), self.config.norm_offset)

    def _linear(self, prefix: str, names: Sequence[str], has_bias: bool) -> Linear:
        matrices = [self.weights.matrix(prefix + name) for name in names]
        biases = [self.weights.pop(f"{prefix}{name}.bias") for name in names] if has_bias else []
        return self.ops.prepare_linear(matrices, biases)

    def _attention(self, prefix: str, spec: LayerSpec, rope: Rope) -> Attention:
        config, names = self.config, self.names
        sinks = self.ops.prepare_vector(self.weights.pop(prefix + names.sinks)) if spec.has_sinks else None
        norms = None
        if config.qk_norm:
            query, key = self.norm(prefix + names.query_norm), self.norm(prefix + names.key_norm)
            norms = QkNorm(query, key, config.norm_eps, config.qk_norm == "all")
        return Attention(
            qkv=self._linear(prefix, names.qkv, config.attention_bias),
            out=self._linear(prefix, [names.out], config.out_bias),
            heads=Heads(config.num_heads, config.num_kv_heads, config.head_dim),
            rope=rope,
            attending=Attending(config.attention_scale, spec.window, config.attention_softcap, sinks),
            norms=norms,
        )

    def _gated(self, prefix: str) -> GatedMlp:
        gate_up = self._linear(prefix, self.names.gate_up, self.config.mlp_bias)
        down = self._linear(prefix, [self.names.down], self.config.mlp_bias)
        return GatedMlp(gate_up, down, self.config.activation)

    def _mixture(self, prefix: str, spec: Mixture) -> MixtureMlp:
        names, pop = self.names, self.weights.pop
        biases = [pop(f"{prefix}{names.router}.bias")] if spec.has_bias else []
        router = self.ops.prepare_linear([pop(f"{prefix}{names.router}.weight")], biases)
        experts = self._stacked_experts(prefix, spec) if names.stacks_experts else self._experts(prefix, spec)
        return MixtureMlp(router, experts, Routing(spec.top_k, spec.normalise), self.config.activation)

    def _experts(self, prefix: str, spec: Mixture) -> Experts:
        gate_up, down = self.names.expert_gate_up, self.names.expert_down
        return self.ops.prepare_experts(
            [[self.weights.matrix(prefix + name.format(i)) for name in gate_up] for i in range(spec.experts)],
            [self.weights.matrix(prefix + down.format(i)) for i in range(spec.experts)],
        )

    def _stacked_experts(self, prefix: str, spec: Mixture) -> Experts:
        """Experts whose gate and up come in turns, row by row."""
        gate_up, down = prefix + self.names.expert_gate_up[0], prefix + self.names.expert_down
        biases = [self.weights.pop(f"{name}_bias") for name in (gate_up, down)] if spec.has_bias else [(), ()]
        return self.ops.prepare_experts(
            [[_rows(matrix, 0, 2), _rows(matrix, 1, 2)] for matrix in self.weights.experts(gate_up)],
            self.weights.experts(down),
            [[bias[0::2], bias[1::2]] for bias in biases[0]],
            list(biases[1]),
        )


def _rows(matrix: Matrix, first: int, step: int) -> Matrix:
    """Every `step`-th row of a matrix, plain or packed with a scale of its own for each row."""
    if not hasattr(matrix, "codes"):
        return matrix[first::step]
    zeros = None if matrix.zeros is None else matrix.zeros[first::step]
    return matrix._replace(codes=matrix.codes[first::step], scales=matrix.scales[first::step], zeros=zeros)
