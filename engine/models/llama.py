"""The Llama family, 2 and 3.x.

Source: Touvron et al., "LLaMA", 2023; Grattafiori et al., "The Llama 3 Herd of Models", 2024; tensor names as
Hugging Face publishes them.
"""

from engine.models.fields import Fields
from engine.models.shared import read_decoder, with_biases
from engine.models.spec import ModelConfig
from engine.models.tensors import Names

NAMES = Names()


def parse(fields: Fields) -> ModelConfig:
    """The decoder that a Llama configuration means."""
    fields.only("pretraining_tp", 1, default=1)
    fields.only("is_llama_config", True, default=True)
    fields.only("rope_interleaved", False, default=False)
    fields.ignore("max_sequence_length")  # of older files; transformers reads max_position_embeddings
    attention, mlp = fields.flag("attention_bias"), fields.flag("mlp_bias")
    return with_biases(read_decoder(fields), attention, attention, mlp)
