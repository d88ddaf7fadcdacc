"""ModernBERT: rotary positions, windows in two of three layers, gated MLPs, norms before each half of a layer.

Source: Warner et al., "Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder", 2024; tensor names as
Hugging Face publishes them.
"""

from collections.abc import Mapping
from typing import Any

from engine.models.encoders import reading
from engine.models.encoders.names import EncoderNames, LayerNames
from engine.models.encoders.spec import EncoderConfig, EncoderLayerSpec
from engine.models.fields import Fields, as_number, as_one_of, invalid, unsupported

NAMES = EncoderNames(
    prefix="model.",
    words="embeddings.tok_embeddings",
    places="",
    types="",
    first_norm="embeddings.norm",
    layers="layers",
    layer=LayerNames(
        query_key_value=("attn.Wqkv",),
        attention_out="attn.Wo",
        attention_norm="attn_norm",
        up=("mlp.Wi",),
        down="mlp.Wo",
        mlp_norm="mlp_norm",
    ),
    last_norm="final_norm",
    dense="head.dense",
    norm="head.norm",
    classifier="classifier",
    spare=(),
)
_KINDS = ("full_attention", "sliding_attention")
_THETAS = {"full_attention": ("global_rope_theta", 160_000.0), "sliding_attention": ("local_rope_theta", 10_000.0)}
_EVERY = 3  # so many layers one looks at all tokens, where a configuration does not say
_GATED = ("gelu", "gelu_tanh", "silu")
_INERT = (
    *("initializer_cutoff_factor", "mlp_dropout", "embedding_dropout", "decoder_bias", "layer_norm_eps"),
    *("deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index", "reference_compile"),
    *("repad_logits_with_grad",),
)


def parse(architecture: str, fields: Fields) -> EncoderConfig:
    """The configuration of a ModernBERT."""
    reading.begin(fields)
    fields.ignore(*_INERT)
    hidden = fields.size("hidden_size")
    heads = reading.heads(fields, hidden)
    if hidden // heads % 2:
        raise invalid("num_attention_heads", "such that heads have an even size", heads)
    return EncoderConfig(
        architecture=architecture,
        model_type=fields.text("model_type"),
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_heads=heads,
        max_context_tokens=fields.size("max_position_embeddings"),
        norm_eps=fields.number("norm_eps", 1e-5),
        activation=reading.activation(fields, "hidden_activation", *_GATED, default="gelu"),
        layers=_layers(fields),
        is_gated=True,
        pre_norm=True,
        attention_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
        norm_bias=fields.flag("norm_bias"),
        head=reading.head(fields, architecture, **_head(fields)),
    )


def _head(fields: Fields) -> dict[str, Any]:
    fields.only("classifier_pooling", "cls", "mean", default="cls")
    return {
        "pooling": fields.take("classifier_pooling", "cls"),
        "activation": reading.activation(fields, "classifier_activation", default="gelu"),
        "has_bias": fields.flag("classifier_bias"),
        "has_norm": True,
    }


def _layers(fields: Fields) -> tuple[EncoderLayerSpec, ...]:
    count = fields.size("num_hidden_layers")
    reach = fields.size("local_attention", 128) // 2
    if reach == 0:
        raise unsupported("local_attention = 1: a token that sees itself alone")
    every = fields.size("global_attn_every_n_layers", _EVERY)
    kinds = fields.take("layer_types")
    if kinds is None:
        kinds = [_KINDS[i % every > 0] for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or not all(kind in _KINDS for kind in kinds):
        raise invalid("layer_types", f"a list of {count} out of {', '.join(_KINDS)}", kinds)
    thetas = {kind: _theta(fields, kind) for kind in _KINDS}
    reaches = {"full_attention": 0, "sliding_attention": reach}
    return tuple(EncoderLayerSpec(reaches[kind], thetas[kind]) for kind in kinds)


def _theta(fields: Fields, kind: str) -> float:
    """Base of the rotary frequencies of layers of this kind, in the layout of transformers 5 or 4."""
    name, default = _THETAS[kind]
    fields.only("rope_scaling", None)
    old = fields.nullable(name, default)
    given: Mapping[str, Any] = fields.mapping("rope_parameters") or {}
    unknown = sorted(given.keys() - set(_KINDS))
    inner = given.get(kind)
    if unknown or not isinstance(inner, dict | None):
        raise unsupported(f"rope_parameters with {', '.join(unknown) or f'{kind} that is no object'}")
    values = {"rope_type": "default", "rope_theta": old} | (inner or {})
    as_one_of(f"rope_parameters {kind} rope_type", values.pop("rope_type"), ("default",))
    theta = as_number("rope_theta", values.pop("rope_theta"))
    if values or theta < 1:
        raise unsupported(f"rope_parameters {kind} with {', '.join(sorted(values)) or f'rope_theta = {theta}'}")
    return theta
