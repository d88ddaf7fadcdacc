"""The Qwen 3 mixtures: Qwen 3's decoder with a mixture of experts in all layers but those named dense.

Source: Yang et al., "Qwen3 Technical Report", 2025; tensor names as Hugging Face publishes them.
"""

from dataclasses import replace

from engine.models.fields import Fields, as_one_of, invalid
from engine.models.shared import read_decoder, read_top_k, window_size, with_biases, with_window
from engine.models.spec import LayerSpec, Mixture, ModelConfig
from engine.models.tensors import Names

NAMES = Names()
_WINDOW = 4096  # what transformers assumes where a configuration does not say


def parse(fields: Fields) -> ModelConfig:
    """The decoder that a configuration of a Qwen 3 mixture means."""
    fields.ignore("output_router_logits", "router_aux_loss_coef", "max_window_layers")
    for name, value in (("qkv_bias", False), ("use_qk_norm", True), ("shared_expert_intermediate_size", 0)):
        fields.only(name, value, default=value)  # Qwen3-Coder says what is so in all of them
    config = replace(read_decoder(fields), qk_norm="head")
    config = replace(config, layers=_layers(fields, config))
    window = window_size(fields, _WINDOW)
    bias = fields.flag("attention_bias")
    config = with_window(config, window if fields.flag("use_sliding_window") else 0)
    return with_biases(config, attention=bias, out=bias)


def _layers(fields: Fields, config: ModelConfig) -> tuple[LayerSpec, ...]:
    """Which layers are mixtures."""
    experts = _experts(fields)
    mixture = Mixture(
        experts, read_top_k(fields, experts), fields.size("moe_intermediate_size"), fields.flag("norm_topk_prob")
    )
    step, dense = fields.size("decoder_sparse_step", 1), fields.take("mlp_only_layers", [])
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        raise invalid("mlp_only_layers", "a list of numbers of layers", dense)
    return tuple(
        layer if i in dense or (i + 1) % step else replace(layer, mlp=mixture)
        for i, layer in enumerate(config.layers)
    )


def _experts(fields: Fields) -> int:
    """Which transformers 4 and 5 call differently."""
    if "num_experts" not in fields.raw:
        return fields.size("num_local_experts")
    experts = fields.size("num_experts")
    as_one_of("num_local_experts", fields.take("num_local_experts", experts), (experts,))
    return experts
