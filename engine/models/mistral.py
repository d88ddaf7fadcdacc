"""The Mistral family: Llama's decoder, with a sliding window where the configuration names one.

Source: Jiang et al., "Mistral 7B", 2023; tensor names as Hugging Face publishes them.
"""

from engine.models.fields import Fields
from engine.models.shared import read_decoder, window_size, with_window
from engine.models.spec import ModelConfig
from engine.models.tensors import Names

NAMES = Names()
_WINDOW = 4096  # what transformers assumes where a configuration does not say


def parse(fields: Fields) -> ModelConfig:
    """The decoder that a Mistral configuration means."""
    return with_window(read_decoder(fields), window_size(fields, _WINDOW))
