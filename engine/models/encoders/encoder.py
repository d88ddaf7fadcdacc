"""The one builder of encoders: from tensors by name to a model on the op protocol.

Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017; Devlin et al., "BERT", NAACL 2019; Xiong et al.,
"On Layer Normalization in the Transformer Architecture", ICML 2020 (norms before or behind each half of a layer).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.models.encoders.names import EncoderNames, LayerNames, has_first_norm
from engine.models.encoders.spec import EncoderConfig
from engine.models.spec import RopeConfig
from engine.models.tensors import Weights
from kernels.encoder_ops import EncoderBackend, Looking, Passages, Span
from kernels.ops import Batch, Heads, Hidden, Linear, Rope, Table, Vector


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm with mean and variance."""

    weight: Vector
    bias: Vector | None
    eps: float

    def __call__(self, ops: EncoderBackend, x: Hidden) -> Hidden:
        """x [T, hidden] -> [T, hidden]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """One layer: attention to both sides, and an MLP."""

    looking: Looking
    rope: Rope | None
    qkv: Linear
    attention_out: Linear
    attention_norm: Norm | None
    up: Linear
    down: Linear
    mlp_norm: Norm
    activation: str
    is_gated: bool

    def attention(self, ops: EncoderBackend, x: Hidden, batch: Batch) -> Hidden:
        """x [T, hidden] -> [T, hidden]."""
        seen = ops.attend(ops.linear(x, self.qkv), self.looking, self.rope, batch)
        return ops.linear(seen, self.attention_out)

    def mlp(self, ops: EncoderBackend, x: Hidden) -> Hidden:
        """x [T, hidden] -> [T, hidden]."""
        inner = ops.linear(x, self.up)
        apply = ops.gated if self.is_gated else ops.pointwise
        return ops.linear(apply(inner, self.activation), self.down)


@dataclass(frozen=True, slots=True)
class Head:
    """What makes a score of the hidden states."""

    pooling: str
    dense: Linear
    activation: str
    norm: Norm | None
    classifier: Linear
    score: str

    def __call__(self, ops: EncoderBackend, x: Hidden, spans: Sequence[Span]) -> Hidden:
        """One number [rows, 1] for each span of x [T, hidden]."""
        y = ops.pointwise(ops.linear(ops.pool(x, spans, self.pooling), self.dense), self.activation)
        logits = ops.linear(y if self.norm is None else self.norm(ops, y), self.classifier)
        return logits if self.score == "identity" else ops.pointwise(logits, self.score)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A whole model.

    Attributes:
        padding_id: as in `EncoderConfig`.
        pre_norm: as in `EncoderConfig`.
    """

    words: Table
    places: Table | None
    types: Table | None
    first_norm: Norm
    layers: tuple[EncoderLayer, ...]
    last_norm: Norm | None
    head: Head | None
    padding_id: int | None
    pre_norm: bool

    def passages(self, prompts: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]]) -> Passages:
        """Whole prompts as a step; without type ids all its tokens are of the first segment."""
        types = [given or [0] * len(prompt) for prompt, given in zip(prompts, type_ids, strict=True)]
        return Passages(
            token_ids=[token for prompt in prompts for token in prompt],
            type_ids=[number for given in types for number in given],
            positions=[place for prompt in prompts for place in self._positions(prompt)],
            counts=[len(prompt) for prompt in prompts],
        )

    def __call__(self, ops: EncoderBackend, batch: Batch) -> Hidden:
        """What the tokens of whole prompts come to, [T, hidden]."""
        x = self.first_norm(ops, ops.embed_passages(batch, self.words, self.places, self.types))
        for layer in self.layers:
            x = self._before(ops, layer, x, batch) if self.pre_norm else self._behind(ops, layer, x, batch)
        return x if self.last_norm is None else self.last_norm(ops, x)

    def _before(self, ops: EncoderBackend, layer: EncoderLayer, x: Hidden, batch: Batch) -> Hidden:
        normed = x if layer.attention_norm is None else layer.attention_norm(ops, x)
        x = ops.add(layer.attention(ops, normed, batch), x)
        return ops.add(layer.mlp(ops, layer.mlp_norm(ops, x)), x)

    def _behind(self, ops: EncoderBackend, layer: EncoderLayer, x: Hidden, batch: Batch) -> Hidden:
        total = ops.add(layer.attention(ops, x, batch), x)
        x = total if layer.attention_norm is None else layer.attention_norm(ops, total)
        return layer.mlp_norm(ops, ops.add(layer.mlp(ops, x), x))

    def _positions(self, prompt: Sequence[int]) -> Sequence[int]:
        """The place of each token; where padding tokens have one of their own, they are not counted."""
        if self.padding_id is None:
            return range(len(prompt))
        counted = accumulate(int(token != self.padding_id) for token in prompt)
        return [
            self.padding_id + (number if token != self.padding_id else 0)
            for token, number in zip(prompt, counted, strict=True)
        ]


def build(
    config: EncoderConfig, names: EncoderNames, weights: Weights, ops: EncoderBackend, max_positions: int
) -> Encoder:
    """The model in the layouts of `ops`, for prompts of up to `max_positions` tokens; `weights` is emptied."""
    return _Builder(config, names, weights, ops, max_positions).encoder()


class _Builder:
    """Takes the tensors of one encoder, one by one."""

    def __init__(
        self, config: EncoderConfig, names: EncoderNames, weights: Weights, ops: EncoderBackend, max_positions: int
    ) -> None:
        self._config = config
        self._names = names
        self._weights = weights
        self._ops = ops
        dim = config.head_dim
        self._ropes = {
            theta: ops.prepare_turns(RopeConfig(theta=theta).inv_freq(dim, max_positions), max_positions)
            for theta in config.thetas
        }

    def encoder(self) -> Encoder:
        """The model."""
        config, names = self._config, self._names
        prefix = names.of(config)
        return Encoder(
            words=self._table(f"{prefix}{names.words}"),
            places=self._table(f"{prefix}{names.places}") if names.places else None,
            types=self._table(f"{prefix}{names.types}") if names.types else None,
            first_norm=self._norm(f"{prefix}{names.first_norm}"),
            layers=tuple(self._layer(names.layer, prefix, i) for i in range(config.num_layers)),
            last_norm=self._norm(f"{prefix}{names.last_norm}") if names.last_norm else None,
            head=self._head(),
            padding_id=config.padding_id,
            pre_norm=config.pre_norm,
        )

    def _layer(self, names: LayerNames, prefix: str, index: int) -> EncoderLayer:
        config, spec = self._config, self._config.layers[index]
        prefix = f"{prefix}{self._names.layers}.{index}."
        heads = Heads(config.num_heads, config.num_heads, config.head_dim)
        first = has_first_norm(config, index)
        return EncoderLayer(
            looking=Looking(heads, config.head_dim**-0.5, spec.reach),
            rope=self._ropes.get(spec.theta),
            qkv=self._linear([f"{prefix}{name}" for name in names.query_key_value], config.attention_bias),
            attention_out=self._linear([f"{prefix}{names.attention_out}"], config.attention_bias),
            attention_norm=self._norm(f"{prefix}{names.attention_norm}") if first else None,
            up=self._linear([f"{prefix}{name}" for name in names.up], config.mlp_bias),
            down=self._linear([f"{prefix}{names.down}"], config.mlp_bias),
            mlp_norm=self._norm(f"{prefix}{names.mlp_norm}"),
            activation=config.activation,
            is_gated=config.is_gated,
        )

    def _head(self) -> Head | None:
        spec, names = self._config.head, self._names
        if spec is None:
            return None
        return Head(
            pooling=spec.pooling,
            dense=self._linear([names.dense], spec.has_bias),
            activation=spec.activation,
            norm=self._norm(names.norm) if spec.has_norm else None,
            classifier=self._linear([names.classifier], has_bias=True),
            score=spec.score,
        )

    def _linear(self, modules: Sequence[str], has_bias: bool) -> Linear:
        biases = [self._weights.pop(f"{module}.bias") for module in modules] if has_bias else []
        return self._ops.prepare_linear([self._weights.matrix(module) for module in modules], biases)

    def _table(self, module: str) -> Table:
        return self._ops.prepare_table(self._weights.pop(f"{module}.weight"))

    def _norm(self, module: str) -> Norm:
        bias = self._weights.pop(f"{module}.bias") if self._config.norm_bias else None
        return Norm(
            weight=self._ops.prepare_vector(self._weights.pop(f"{module}.weight")),
            bias=None if bias is None else self._ops.prepare_vector(bias),
            eps=self._config.norm_eps,
        )
