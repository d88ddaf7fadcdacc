"""The Qwen 3 family: Llama's decoder with queries and keys normed head by head.

Source: Yang et al., "Qwen3 Technical Report", 2025; tensor names as Hugging Face publishes them.
"""

from dataclasses import replace

from engine.models.fields import Fields
from engine.models.qwen2 import read_windows
from engine.models.shared import read_decoder, with_biases
from engine.models.spec import ModelConfig
from engine.models.tensors import Names

NAMES = Names()
_HEAD_DIM = 128  # what transformers assumes where a configuration does not say


def parse(fields: Fields) -> ModelConfig:
    """The decoder that a Qwen 3 configuration means."""
    config = read_windows(fields, read_decoder(fields, head_dim=_HEAD_DIM))
    bias = fields.flag("attention_bias")
    return with_biases(replace(config, qk_norm="head"), attention=bias, out=bias)
