"""The Granite 3 family: Llama's decoder with multipliers of embeddings, scores, what layers add, and logits.

Source: Granite Team, IBM, "Granite 3.0 Language Models", 2024; tensor names as Hugging Face publishes them.
"""

from dataclasses import replace

from engine.models.fields import Fields
from engine.models.shared import read_decoder, with_biases
from engine.models.spec import ModelConfig
from engine.models.tensors import Names

NAMES = Names()


def parse(fields: Fields) -> ModelConfig:
    """The decoder that a Granite configuration means."""
    attention, mlp = fields.flag("attention_bias"), fields.flag("mlp_bias")
    config = replace(
        read_decoder(fields),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        attention_scale=fields.number("attention_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logits_scale=1 / fields.number("logits_scaling", 1.0),
    )
    return with_biases(config, attention, attention, mlp)
