"""The Phi 3 and 4 family: Llama's decoder with stacked projections, heads rotated in part, and LongRoPE.

Source: Abdin et al., "Phi-3 Technical Report", 2024; "Phi-4-Mini Technical Report", 2025; tensor names as Hugging
Face publishes them.
"""

from dataclasses import replace
from typing import Any

from engine.models.fields import Fields, as_one_of
from engine.models.rope import given_rope, rope_of
from engine.models.shared import read_decoder, window_size, with_window
from engine.models.spec import DEFAULT_THETA, ModelConfig, RopeConfig
from engine.models.tensors import Names

NAMES = Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
_ORIGINAL = "original_max_position_embeddings"
_ORIGINAL_CONTEXT = 4096  # what transformers assumes where a configuration does not say
_KINDS = ("default", "longrope")
_LONGROPE_TOO = ("su", "yarn")  # what its first configurations called it


def parse(fields: Fields) -> ModelConfig:
    """The decoder that a Phi 3 configuration means."""
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.only(name, False, default=False)
    for name in ("full_attn_mod", "interpolate_factor"):
        fields.only(name, 1, default=1)
    fields.ignore("embd_pdrop", "resid_pdrop")
    config = read_decoder(fields, has_rope=False)
    as_one_of("head_dim", config.head_dim, (config.hidden_size // config.num_heads,))
    config = with_window(config, window_size(fields))
    return replace(config, ropes=(_rope(fields, config),))


def _rope(fields: Fields, config: ModelConfig) -> RopeConfig:
    """Its original context is a field of the model's, which goes before that of the embedding."""
    values: dict[str, Any] = given_rope(fields)
    original = fields.size(_ORIGINAL, _ORIGINAL_CONTEXT)
    for name in ("rope_type", "type"):
        if values.get(name) in _LONGROPE_TOO:
            values[name] = "longrope"
    partial = fields.take("partial_rotary_factor")
    if partial is not None:
        as_one_of("rope partial_rotary_factor", values.setdefault("partial_rotary_factor", partial), (partial,))
    if "longrope" in (values.get("rope_type"), values.get("type")):
        as_one_of(f"rope {_ORIGINAL}", values.setdefault(_ORIGINAL, original), (original,))
    return rope_of(values, config.head_dim, config.max_context_tokens, DEFAULT_THETA, _KINDS)
