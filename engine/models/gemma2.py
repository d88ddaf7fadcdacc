"""The Gemma 2 family: norms before and after each half, soft caps, and a window in every other layer.

Source: Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size", 2024; tensor names as Hugging
Face publishes them.
"""

from dataclasses import replace

from engine.models.fields import Fields
from engine.models.shared import read_decoder, sliding_layers, window_size, with_biases, with_windows
from engine.models.spec import ModelConfig
from engine.models.tensors import Names

NAMES = Names(
    after_attention="post_attention_layernorm.weight",
    before_mlp="pre_feedforward_layernorm.weight",
    after_mlp="post_feedforward_layernorm.weight",
)
HEAD_DIM, WINDOW, QUERY_SCALAR = 256, 4096, 256
"""What transformers assumes of a Gemma where a configuration does not say."""
_ATTENTION_CAP, _LOGITS_CAP = 50.0, 30.0  # the same, of Gemma 2
_GELU = {"gelu_pytorch_tanh": "gelu_tanh"}


def parse(fields: Fields) -> ModelConfig:
    """The decoder that a Gemma 2 configuration means."""
    config = read_gemma(fields)
    sliding = sliding_layers(fields, [i % 2 == 0 for i in range(config.num_layers)])
    config = replace(
        config,
        attention_softcap=softcap(fields, "attn_logit_softcapping", _ATTENTION_CAP),
        logits_softcap=softcap(fields, "final_logit_softcapping", _LOGITS_CAP),
    )
    window = window_size(fields, WINDOW)
    fields.only("sliding_window_size", window, default=window)  # an older name, which is there beside it
    return with_windows(config, sliding, window)


def read_gemma(fields: Fields, has_rope: bool = True) -> ModelConfig:
    """What Gemma 2 and 3 have in common; errors as `engine.models.shared.read_decoder`."""
    fields.only("use_bidirectional_attention", False, default=False)
    fields.only("hidden_act", *_GELU, default="gelu_pytorch_tanh")  # an older name, which nothing reads any more
    config = read_decoder(
        fields,
        tied=True,
        head_dim=HEAD_DIM,
        activations=_GELU,
        activation_field="hidden_activation",
        has_rope=has_rope,
    )
    config = replace(
        config,
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
        attention_scale=fields.number("query_pre_attn_scalar", QUERY_SCALAR) ** -0.5,
    )
    bias = fields.flag("attention_bias")
    return with_biases(config, attention=bias, out=bias)


def softcap(fields: Fields, name: str, default: float | None) -> float:
    """A soft cap; 0 where it is null, for then there is none.

    Raises:
        EngineError: CONFIG_INVALID, CONFIG_UNSUPPORTED.
    """
    return 0.0 if fields.nullable(name, default) is None else fields.number(name, default)
