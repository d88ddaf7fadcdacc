"""The tensors of a decoder: what a family calls them, and the shape each has; needs no tensor library."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.models.spec import Dense, LayerSpec, Mixture, ModelConfig
from kernels.ops import Matrix

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""The tensors a model needs, by name, with their shapes: no more and no fewer."""


class Weights(Protocol):
    """Tensors by name; each is there with the shape the model declared, and is handed over once."""

    def pop(self, name: str, /) -> Any:
        """The tensor `name`, which is not kept."""

    def matrix(self, prefix: str, /) -> Matrix:
        """The matrix [out, in] `{prefix}.weight`, plain or quantised, which is not kept."""

    def experts(self, name: str, /) -> Sequence[Matrix]:
        """The matrix [out, in] of each expert of `name`, plain as [experts, in, out] or quantised; not kept."""


@dataclass(frozen=True, slots=True)
class Names:
    """What a family calls its tensors; those of a layer come after its prefix, and "" is none.

    Attributes:
        embedding: the table of embeddings.
        head: the matrix of the logits.
        final_norm: after the last layer.
        layer: prefix of layer {}.
        qkv: queries, keys and values; one name where they are stacked.
        out: of attention.
        query_norm: of queries.
        key_norm: of keys.
        sinks: of attention.
        before_attention: norm of what attention reads.
        after_attention: norm of what attention adds.
        before_mlp: norm of what the MLP reads.
        after_mlp: norm of what the MLP adds.
        gate_up: of a dense MLP; one name where they are stacked.
        down: of a dense MLP.
        router: of a mixture.
        expert_gate_up: of expert {}; one name without {} where all experts are stacked as [experts, in, out] with
            gate and up in turns, and biases beside them.
        expert_down: the same.
    """

    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head"
    final_norm: str = "model.norm.weight"
    layer: str = "model.layers.{}."
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm.weight"
    key_norm: str = "self_attn.k_norm.weight"
    sinks: str = "self_attn.sinks"
    before_attention: str = "input_layernorm.weight"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm.weight"
    after_mlp: str = ""
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_gate_up: tuple[str, ...] = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")
    expert_down: str = "mlp.experts.{}.down_proj"

    @property
    def stacks_experts(self) -> bool:
        """All experts of a layer are in one tensor."""
        return len(self.expert_gate_up) == 1

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of the residual stream in a layer."""
        named = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in named if name)


def tensor_shapes(config: ModelConfig, names: Names) -> Shapes:
    """The tensors of a model with this configuration, unquantised."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, Shape] = {names.embedding: table, names.final_norm: (config.hidden_size,)}
    if not config.tie_word_embeddings:
        shapes[f"{names.head}.weight"] = table
    for i, layer in enumerate(config.layers):
        prefix = names.layer.format(i)
        parts = _matrices(config, names, layer) | _vectors(config, names, layer)
        shapes.update({prefix + name: shape for name, shape in parts.items()})
    return shapes


def matrices(config: ModelConfig, names: Names) -> frozenset[str]:
    """The tensors that may be quantised as layers are: all matrices but routers and the table of embeddings."""
    head = [] if config.tie_word_embeddings else [f"{names.head}.weight"]
    found = [
        names.layer.format(i) + name
        for i, layer in enumerate(config.layers)
        for name in _matrices(config, names, layer)
    ]
    return frozenset(found + head)


def tables(config: ModelConfig, names: Names) -> frozenset[str]:
    """The tensors with a row for each token: the table of embeddings, and the matrix of the logits."""
    head = [] if config.tie_word_embeddings else [f"{names.head}.weight"]
    return frozenset([names.embedding, *head])


def spare(config: ModelConfig, names: Names) -> frozenset[str]:
    """Tensors that older files hold beside, and that nothing reads: frequencies, which follow from config.json."""
    return frozenset(f"{names.layer.format(i)}self_attn.rotary_emb.inv_freq" for i in range(config.num_layers))


def _matrices(config: ModelConfig, names: Names, layer: LayerSpec) -> dict[str, Shape]:
    """Projections and MLPs, without biases and routers."""
    hidden, query, kv = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    outs = (query + 2 * kv,) if len(names.qkv) == 1 else (query, kv, kv)
    found: dict[str, Shape] = {f"{n}.weight": (out, hidden) for n, out in zip(names.qkv, outs, strict=True)}
    found[f"{names.out}.weight"] = (hidden, query)
    if isinstance(layer.mlp, Dense):
        return found | _gated(layer.mlp.intermediate, hidden, names.gate_up, names.down)
    if names.stacks_experts:
        return found | _stacked_experts(layer.mlp, hidden, names)
    for i in range(layer.mlp.experts):
        gate_up = tuple(name.format(i) for name in names.expert_gate_up)
        found |= _gated(layer.mlp.intermediate, hidden, gate_up, names.expert_down.format(i))
    return found


def _gated(inner: int, hidden: int, gate_up: tuple[str, ...], down: str) -> dict[str, Shape]:
    out = 2 * inner // len(gate_up)
    found: dict[str, Shape] = {f"{name}.weight": (out, hidden) for name in gate_up}
    return found | {f"{down}.weight": (hidden, inner)}


def _stacked_experts(mlp: Mixture, hidden: int, names: Names) -> dict[str, Shape]:
    return {
        names.expert_gate_up[0]: (mlp.experts, hidden, 2 * mlp.intermediate),
        names.expert_down: (mlp.experts, mlp.intermediate, hidden),
    }


def _vectors(config: ModelConfig, names: Names, layer: LayerSpec) -> dict[str, Shape]:
    """Norms, biases, sinks and routers."""
    found: dict[str, Shape] = dict.fromkeys(names.norms, (config.hidden_size,))
    if config.qk_norm:
        whole = config.qk_norm == "all"
        found[names.query_norm] = ((config.num_heads if whole else 1) * config.head_dim,)
        found[names.key_norm] = ((config.num_kv_heads if whole else 1) * config.head_dim,)
    if layer.has_sinks:
        found[names.sinks] = (config.num_heads,)
    biased = (names.qkv if config.attention_bias else ()) + ((names.out,) if config.out_bias else ())
    if isinstance(layer.mlp, Mixture):
        found |= _router(config, names, layer.mlp)
    elif config.mlp_bias:
        biased += (*names.gate_up, names.down)
    shapes = _matrices(config, names, layer)
    return found | {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in biased}


def _router(config: ModelConfig, names: Names, mlp: Mixture) -> dict[str, Shape]:
    found: dict[str, Shape] = {f"{names.router}.weight": (mlp.experts, config.hidden_size)}
    if mlp.has_bias:
        found[f"{names.router}.bias"] = (mlp.experts,)
        found[f"{names.expert_gate_up[0]}_bias"] = (mlp.experts, 2 * mlp.intermediate)
        found[f"{names.expert_down}_bias"] = (mlp.experts, config.hidden_size)
    return found
