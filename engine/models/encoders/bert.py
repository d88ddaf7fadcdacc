"""BERT: learned positions and segments, norms behind each half of a layer.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", NAACL 2019; tensor names as Hugging
Face publishes them.
"""

from engine.models.encoders import reading
from engine.models.encoders.names import EncoderNames, LayerNames
from engine.models.encoders.spec import EncoderConfig, EncoderLayerSpec
from engine.models.fields import Fields

LAYER = LayerNames(
    query_key_value=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up=("intermediate.dense",),
    down="output.dense",
    mlp_norm="output.LayerNorm",
)
NAMES = EncoderNames(
    prefix="bert.",
    words="embeddings.word_embeddings",
    places="embeddings.position_embeddings",
    types="embeddings.token_type_embeddings",
    first_norm="embeddings.LayerNorm",
    layers="encoder.layer",
    layer=LAYER,
    last_norm="",
    dense="bert.pooler.dense",
    norm="",
    classifier="classifier",
    spare=("pooler.dense", "embeddings.position_ids", "embeddings.token_type_ids"),
)


def parse(architecture: str, fields: Fields) -> EncoderConfig:
    """The configuration of a BERT."""
    return parse_learned(architecture, fields, padding=None)


def parse_learned(architecture: str, fields: Fields, padding: int | None) -> EncoderConfig:
    """The configuration of an encoder with learned positions, which are counted from behind `padding`."""
    reading.begin(fields)
    hidden = fields.size("hidden_size")
    places = fields.size("max_position_embeddings", 512)
    return EncoderConfig(
        architecture=architecture,
        model_type=fields.text("model_type"),
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_heads=reading.heads(fields, hidden),
        max_context_tokens=places if padding is None else places - padding - 1,
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        activation=reading.activation(fields, "hidden_act", default="gelu"),
        layers=(EncoderLayerSpec(),) * fields.size("num_hidden_layers"),
        num_places=places,
        num_types=fields.size("type_vocab_size", 2),
        padding_id=padding,
        head=reading.head(fields, architecture),
    )
