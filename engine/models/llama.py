"""The Llama family: names and shapes of its tensors, and how they make a decoder.

Source: Touvron et al., "LLaMA", 2023; Grattafiori et al., "The Llama 3 Herd of Models", 2024; tensor names as
Hugging Face publishes them.
"""

from engine.models.blocks import Attention, Decoder, DecoderLayer, GatedMlp, Shape, Shapes, Weights
from engine.models.config import ModelConfig
from kernels.ops import Backend, Heads, Linear

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def tensor_shapes(config: ModelConfig) -> Shapes:
    """The tensors of a Llama with this configuration."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, Shape] = {_EMBEDDING: table, "model.norm.weight": (config.hidden_size,)}
    if not config.tie_word_embeddings:
        shapes[_HEAD] = table
    for i in range(config.num_layers):
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in _layer_shapes(config).items()})
    return shapes


def _layer_shapes(config: ModelConfig) -> Shapes:
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = dict(zip(_ATTENTION, ((query, hidden), (kv, hidden), (kv, hidden), (hidden, query)), strict=True))
    matrices |= dict(zip(_MLP, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True))
    shapes: dict[str, Shape] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    for name, shape in matrices.items():
        part, bias = ("self_attn", config.attention_bias) if name in _ATTENTION else ("mlp", config.mlp_bias)
        shapes[f"{part}.{name}.weight"] = shape
        if bias:
            shapes[f"{part}.{name}.bias"] = shape[:1]
    return shapes


def build(config: ModelConfig, weights: Weights, ops: Backend, max_positions: int) -> Decoder:
    """The model in the layouts of `ops`, for contexts of up to `max_positions` tokens; `weights` is emptied."""
    heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim)

    def linear(prefix: str, *names: str, bias: bool) -> Linear:
        biases = [weights.pop(f"{prefix}.{name}.bias") for name in names] if bias else []
        return ops.prepare_linear([weights.pop(f"{prefix}.{name}.weight") for name in names], biases)

    def layer(prefix: str) -> DecoderLayer:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return DecoderLayer(
            attention_norm=ops.prepare_vector(weights.pop(f"{prefix}.input_layernorm.weight")),
            attention=Attention(
                qkv=linear(attention, "q_proj", "k_proj", "v_proj", bias=config.attention_bias),
                out=linear(attention, "o_proj", bias=config.attention_bias),
                heads=heads,
            ),
            mlp_norm=ops.prepare_vector(weights.pop(f"{prefix}.post_attention_layernorm.weight")),
            mlp=GatedMlp(
                gate_up=linear(mlp, "gate_proj", "up_proj", bias=config.mlp_bias),
                down=linear(mlp, "down_proj", bias=config.mlp_bias),
            ),
        )

    table = ops.prepare_table(weights.pop(_EMBEDDING))
    return Decoder(
        table=table,
        layers=tuple(layer(f"model.layers.{i}") for i in range(config.num_layers)),
        final_norm=ops.prepare_vector(weights.pop("model.norm.weight")),
        head=ops.tied_head(table) if config.tie_word_embeddings else ops.prepare_linear([weights.pop(_HEAD)]),
        rope=ops.prepare_rope(config.rope.inv_freq(config.head_dim), max_positions),
        eps=config.rms_norm_eps,
    )
