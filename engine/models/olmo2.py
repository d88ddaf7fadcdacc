"""The OLMo 2 family: norms of what each half adds, not of what it reads, and of all queries and keys of a token.

Source: OLMo Team, "2 OLMo 2 Furious", 2024; tensor names as Hugging Face publishes them.
"""

from dataclasses import replace

from engine.models.fields import Fields
from engine.models.shared import read_decoder, with_biases
from engine.models.spec import ModelConfig
from engine.models.tensors import Names

NAMES = Names(
    before_attention="",
    after_attention="post_attention_layernorm.weight",
    before_mlp="",
    after_mlp="post_feedforward_layernorm.weight",
)


def parse(fields: Fields) -> ModelConfig:
    """The decoder that an OLMo 2 configuration means."""
    bias = fields.flag("attention_bias")
    return with_biases(replace(read_decoder(fields), qk_norm="all"), attention=bias, out=bias)
