"""The Qwen 2 and 2.5 family: Llama's decoder with biases on queries, keys and values, and windows in upper layers.

Source: Yang et al., "Qwen2 Technical Report", 2024; tensor names as Hugging Face publishes them.
"""

from engine.models.fields import Fields
from engine.models.shared import read_decoder, sliding_layers, window_size, with_biases, with_windows
from engine.models.spec import ModelConfig
from engine.models.tensors import Names

NAMES = Names()
_WINDOW, _FULL_LAYERS = 4096, 28  # what transformers assumes where a configuration does not say


def parse(fields: Fields) -> ModelConfig:
    """The decoder that a Qwen 2 configuration means."""
    fields.only("use_mrope", False, default=False)
    return with_biases(read_windows(fields, read_decoder(fields)), attention=True, out=False)


def read_windows(fields: Fields, config: ModelConfig) -> ModelConfig:
    """`config` with the windows of Qwen 2 and 3: from a layer on, or as `layer_types` says.

    Raises:
        EngineError: CONFIG_INVALID, CONFIG_UNSUPPORTED.
    """
    uses, window = fields.flag("use_sliding_window"), window_size(fields, _WINDOW)
    full = fields.count("max_window_layers", _FULL_LAYERS)
    window = window if uses else 0
    sliding = sliding_layers(fields, [window > 0 and i >= full for i in range(config.num_layers)])
    return with_windows(config, sliding, window)
