"""The gpt-oss family: mixtures of clamped experts with biases, attention sinks, and a window in every other layer.

Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025; tensor names as Hugging Face publishes them.
"""

from dataclasses import replace

from engine.models.fields import Fields
from engine.models.shared import (
    read_decoder,
    read_top_k,
    sliding_layers,
    whole_rope,
    window_size,
    with_biases,
    with_windows,
)
from engine.models.spec import LayerSpec, Mixture, ModelConfig
from engine.models.tensors import Names

NAMES = Names(
    router="mlp.router", expert_gate_up=("mlp.experts.gate_up_proj",), expert_down="mlp.experts.down_proj"
)
_HEAD_DIM, _WINDOW, _THETA = 64, 128, 150_000.0  # what transformers assumes where a configuration does not say
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def parse(fields: Fields) -> ModelConfig:
    """The decoder that a gpt-oss configuration means."""
    fields.ignore("output_router_logits", "router_aux_loss_coef")
    fields.only("swiglu_alpha", 1.702, default=1.702)
    fields.only("swiglu_limit", 7, default=7)
    config = read_decoder(fields, head_dim=_HEAD_DIM, has_rope=False)
    rope = whole_rope(fields, config.head_dim, config.max_context_tokens, _THETA, _ROPE)
    fields.only("initial_context_length", rope.original_context, default=rope.original_context)
    experts = fields.size("num_local_experts")
    top_k = read_top_k(fields, experts)
    fields.only("experts_per_token", top_k, default=top_k)
    mixture = Mixture(experts, top_k, fields.size("intermediate_size"), normalise=True, has_bias=True)
    layers = (LayerSpec(mixture, has_sinks=True),) * config.num_layers
    config = replace(config, layers=layers, ropes=(rope,), activation="clamped_swiglu")
    sliding = sliding_layers(fields, [i % 2 == 0 for i in range(config.num_layers)])
    bias = fields.flag("attention_bias", default=True)
    return with_biases(with_windows(config, sliding, window_size(fields, _WINDOW)), attention=bias, out=bias)
