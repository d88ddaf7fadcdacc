"""What the configurations of all families of decoders share: the plainest decoder, biases and windows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.models.fields import Fields, as_one_of, invalid
from engine.models.rope import KINDS, given_rope, rope_of
from engine.models.spec import DEFAULT_THETA, Dense, LayerSpec, ModelConfig, RopeConfig

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers: of those that attend to all, and of those with a window."""
_SILU = {"silu": "silu", "swish": "silu"}  # two names of one function


def read_decoder(
    fields: Fields,
    theta: float = DEFAULT_THETA,
    tied: bool = False,
    head_dim: int | None = None,
    activations: dict[str, str] | None = None,
    activation_field: str = "hidden_act",
    has_rope: bool = True,
) -> ModelConfig:
    """A decoder of the plainest kind with these fields: pre-norm, a gated MLP in every layer, full attention.

    Args:
        fields: of the configuration.
        theta: of the rotary embedding, where the configuration does not say.
        tied: whether the output matrix is the embedding table, where it does not say.
        head_dim: numbers of a head, where it does not say; None: hidden numbers over heads.
        activations: the family's, by the name the configuration gives them.
        activation_field: the field that names it.
        has_rope: it has one rotary embedding of any kind; else the family reads its own.

    Raises:
        EngineError: CONFIG_INVALID, CONFIG_UNSUPPORTED.
    """
    known = _SILU if activations is None else activations
    fields.only(activation_field, *known)
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    if fields.take("head_dim", head_dim) is None and hidden % heads:
        raise invalid(
            "hidden_size", f"a multiple of num_attention_heads, {heads}, where there is no head_dim", hidden
        )
    head_dim = fields.size("head_dim", head_dim or hidden // heads)
    kv_heads, context = fields.size("num_key_value_heads", heads), fields.size("max_position_embeddings")
    if heads % kv_heads:
        raise invalid("num_key_value_heads", f"a divisor of {heads}", kv_heads)
    if head_dim % 2:
        raise invalid("head_dim", "an even number", head_dim)
    return ModelConfig(
        architecture=architecture_name(fields),
        model_type=fields.text("model_type"),
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_context_tokens=context,
        eos_token_ids=(),
        tie_word_embeddings=fields.flag("tie_word_embeddings", tied),
        layers=(LayerSpec(Dense(fields.size("intermediate_size"))),) * fields.size("num_hidden_layers"),
        ropes=(whole_rope(fields, head_dim, context, theta),) if has_rope else (),
        norm_eps=fields.number("rms_norm_eps"),
        activation=known[fields.raw[activation_field]],
        attention_scale=head_dim**-0.5,
    )


def whole_rope(
    fields: Fields,
    head_dim: int,
    context: int,
    theta: float,
    default: dict[str, Any] | None = None,
    kinds: tuple[str, ...] = KINDS,
) -> RopeConfig:
    """A rotary embedding that rotates whole heads; arguments and errors as `engine.models.rope.read_rope`."""
    fields.only("partial_rotary_factor", 1, default=1)
    values = given_rope(fields, default)
    as_one_of("rope partial_rotary_factor", values.get("partial_rotary_factor", 1), (1,))
    return rope_of(values, head_dim, context, theta, kinds)


def architecture_name(fields: Fields) -> str:
    """The one architecture that the configuration names.

    Raises:
        EngineError: CONFIG_INVALID.
    """
    names = fields.raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise invalid("architectures", "a list of one name", names)
    return names[0]


def with_biases(config: ModelConfig, attention: bool, out: bool, mlp: bool = False) -> ModelConfig:
    """`config` whose projections have these biases."""
    return replace(config, attention_bias=attention, out_bias=out, mlp_bias=mlp)


def with_window(config: ModelConfig, window: int) -> ModelConfig:
    """`config` whose layers all attend to the last `window` tokens; 0: to all."""
    return replace(config, layers=tuple(replace(layer, window=window) for layer in config.layers))


def window_size(fields: Fields, default: int | None = None) -> int:
    """The sliding window; 0 where it is null, for then there is none.

    Raises:
        EngineError: CONFIG_INVALID, CONFIG_UNSUPPORTED.
    """
    if fields.nullable("sliding_window", default) is None:
        return 0
    return fields.size("sliding_window", default)


def sliding_layers(fields: Fields, default: Sequence[bool]) -> tuple[bool, ...]:
    """Which layers have a window: those that `layer_types` calls so, or the family's own choice.

    Raises:
        EngineError: CONFIG_INVALID.
    """
    types = fields.take("layer_types")
    if types is None:
        return tuple(default)
    if not isinstance(types, list) or len(types) != len(default) or set(types) - {FULL, SLIDING}:
        raise invalid("layer_types", f"a list of {len(default)} of {FULL} and {SLIDING}", types)
    return tuple(kind == SLIDING for kind in types)


def with_windows(config: ModelConfig, sliding: Sequence[bool], window: int) -> ModelConfig:
    """`config` whose `sliding` layers attend to the last `window` tokens.

    Raises:
        EngineError: CONFIG_INVALID; there are such layers, and no window.
    """
    if any(sliding) and not window:
        raise invalid("sliding_window", "a positive whole number, for layers have one", None)
    layers = zip(config.layers, sliding, strict=True)
    return replace(
        config, layers=tuple(replace(layer, window=window if is_sliding else 0) for layer, is_sliding in layers)
    )


def read_top_k(fields: Fields, experts: int) -> int:
    """How many of the experts a token takes.

    Raises:
        EngineError: CONFIG_INVALID, CONFIG_UNSUPPORTED.
    """
    top_k = fields.size("num_experts_per_tok")
    if top_k > experts:
        raise invalid("num_experts_per_tok", f"at most the {experts} experts", top_k)
    return top_k
