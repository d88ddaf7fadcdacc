"""The Mixtral family: Mistral's decoder with a mixture of experts in every layer.

Source: Jiang et al., "Mixtral of Experts", 2024; tensor names as Hugging Face publishes them.
"""

from dataclasses import replace

from engine.models.fields import Fields
from engine.models.shared import read_decoder, read_top_k, window_size, with_window
from engine.models.spec import LayerSpec, Mixture, ModelConfig
from engine.models.tensors import Names

NAMES = Names(
    router="block_sparse_moe.gate",
    expert_gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
    expert_down="block_sparse_moe.experts.{}.w2",
)
_THETA = 1_000_000.0  # what transformers assumes where a configuration does not say


def parse(fields: Fields) -> ModelConfig:
    """The decoder that a Mixtral configuration means."""
    fields.ignore("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
    config = read_decoder(fields, theta=_THETA)
    experts = fields.size("num_local_experts")
    mixture = Mixture(experts, read_top_k(fields, experts), fields.size("intermediate_size"), normalise=True)
    config = replace(config, layers=(LayerSpec(mixture),) * config.num_layers)
    return with_window(config, window_size(fields))
