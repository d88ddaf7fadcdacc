"""The strict reader of a model's config.json: what it cannot compute exactly, it refuses by name.

Reads the layout of transformers 5 (`rope_parameters`) and of transformers 4 (`rope_theta`, `rope_scaling`). Needs
neither torch nor transformers. A field that is not known is refused, for it may change the mathematics; a field
that is null is as good as absent.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError
from engine.strict_json import load_object

_INERT = frozenset(
    (
        *("_name_or_path", "architectures", "model_type", "transformers_version", "tokenizer_class"),
        *("bos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
        *("dtype", "torch_dtype", "initializer_range", "attention_dropout"),
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    )
)
_ROPE_FIELDS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}
_DEFAULT_THETA = 10000.0  # what transformers assumes for the oldest Llama configurations, which do not say


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        kind: default, linear or llama3.
        theta: base of the frequencies.
        factor: by which positions are stretched (linear, llama3).
        low_freq_factor: wavelengths beyond original / this are stretched fully (llama3).
        high_freq_factor: wavelengths below original / this are left alone (llama3).
        original_context: positions the model was first trained on (llama3).
    """

    kind: str = "default"
    theta: float = _DEFAULT_THETA
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0

    def inv_freq(self, head_dim: int) -> tuple[float, ...]:
        """Radians per token of each pair of numbers, head_dim / 2 of them.

        Source: Su et al., "RoFormer", 2021, equation 15; Chen et al., "Extending Context Window of Large Language
        Models via Positional Interpolation", 2023; for llama3, Meta's Llama 3.1 reference implementation.
        """
        plain = [self.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        if self.kind == "llama3":
            return tuple(self._llama3(frequency) for frequency in plain)
        return tuple(frequency / self.factor for frequency in plain)

    def _llama3(self, frequency: float) -> float:
        turns = self.original_context * frequency / (2 * math.pi)
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = min(1.0, max(0.0, smooth))
        return (1 - smooth) * frequency / self.factor + smooth * frequency


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama family.

    Attributes:
        architecture: as config.json names it.
        vocab_size: tokens.
        hidden_size: numbers per token between layers.
        intermediate_size: numbers per token inside the gated MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: numbers per head; even.
        max_context_tokens: positions the model knows.
        rms_norm_eps: added under the root of each norm.
        rope: positions.
        attention_bias: q, k, v and o projections have a bias.
        mlp_bias: gate, up and down projections have a bias.
        tie_word_embeddings: the output matrix is the embedding table.
        eos_token_ids: tokens that end an answer.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]


def parse_config(config_json: bytes, generation_config_json: bytes | None = None) -> ModelConfig:
    """The configuration in a model's config.json; end tokens from generation_config.json where it names any.

    Raises:
        EngineError: CONFIG_INVALID (not JSON, a field missing or of the wrong type) or CONFIG_UNSUPPORTED (a field
            or value this engine does not compute); the message names the field.
    """
    fields = _Fields(load_object(config_json, "config.json", "CONFIG_INVALID"))
    heads = fields.size("num_attention_heads")
    hidden = fields.size("hidden_size")
    fields.only("hidden_act", "silu")
    fields.only("pretraining_tp", 1, default=1)
    config = ModelConfig(
        architecture=_architecture(fields.raw),
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", heads),
        head_dim=fields.size("head_dim", hidden // heads),
        max_context_tokens=fields.size("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope=_rope(fields),
        attention_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        eos_token_ids=_eos(fields, generation_config_json),
    )
    fields.refuse_rest()
    _check(config)
    return config


class _Fields:
    """The fields of config.json, each taken once; what nobody takes is refused."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = {name: value for name, value in raw.items() if value is not None}
        self._left = set(self.raw) - _INERT

    def take(self, name: str, default: Any = None) -> Any:
        """The value of `name`, or the default."""
        self._left.discard(name)
        return self.raw.get(name, default)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.take(name, default)
        if type(value) is not int or value < 1:
            raise _invalid(name, "a positive whole number", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        return _positive(name, self.take(name, default))

    def flag(self, name: str) -> bool:
        """True or false; absent is false."""
        value = self.take(name, False)
        if type(value) is not bool:
            raise _invalid(name, "true or false", value)
        return value

    def only(self, name: str, supported: object, default: object = None) -> None:
        """Refuse any value but one."""
        value = self.take(name, default)
        if value != supported or type(value) is not type(supported):
            raise _unsupported(f"{name} = {value!r} (supported: {supported!r})")

    def refuse_rest(self) -> None:
        """Refuse the fields nobody took."""
        if self._left:
            raise _unsupported(f"unknown field {', '.join(sorted(self._left))}")


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise _invalid("architectures", "a list of one name", names)
    return names[0]


def _rope(fields: _Fields) -> RopeConfig:
    parameters = fields.take("rope_parameters")
    scaling = fields.take("rope_scaling")
    theta = fields.take("rope_theta")
    if parameters is not None and (scaling is not None or theta not in (None, _get(parameters, "rope_theta"))):
        raise _unsupported("rope_parameters beside a rope_theta or rope_scaling that differs")
    values = dict(_mapping(parameters if parameters is not None else scaling or {}))
    theta = values.pop("rope_theta", None) or theta or _DEFAULT_THETA
    legacy = values.pop("type", None)
    kind = values.pop("rope_type", None) or legacy or "default"
    if kind not in _ROPE_FIELDS or legacy not in (None, kind):
        raise _unsupported(f"rope_type = {kind!r} (supported: {', '.join(sorted(_ROPE_FIELDS))})")
    surplus = {name for name, value in values.items() if value is not None} - _ROPE_FIELDS[kind]
    if surplus:
        raise _unsupported(f"unknown rope field {', '.join(sorted(surplus))}")
    return _rope_of(kind, _positive("rope_theta", theta), values)


def _rope_of(kind: str, theta: float, values: Mapping[str, Any]) -> RopeConfig:
    numbers = {name: _positive(f"rope {name}", values.get(name)) for name in _ROPE_FIELDS[kind]}
    original = numbers.pop("original_max_position_embeddings", 0)
    rope = RopeConfig(kind, theta, original_context=int(original), **numbers)
    if rope.factor < 1 or (kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor):
        raise _invalid("rope", "a factor of at least 1 and high_freq_factor above low_freq_factor", dict(values))
    return rope


def _get(mapping: object, name: str) -> object:
    return mapping.get(name) if isinstance(mapping, dict) else None


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _invalid("rope_parameters or rope_scaling", "an object", value)
    return value


def _eos(fields: _Fields, generation_config_json: bytes | None) -> tuple[int, ...]:
    own = fields.take("eos_token_id", [])
    generation: Mapping[str, Any] = {}
    if generation_config_json:
        generation = load_object(generation_config_json, "generation_config.json", "CONFIG_INVALID")
    value = generation.get("eos_token_id")
    value = own if value is None else value
    ids = value if isinstance(value, list) else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        raise _invalid("eos_token_id", "a token id or a list of them", value)
    return tuple(ids)


def _check(config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise _invalid("num_key_value_heads", f"a divisor of {config.num_heads}", config.num_kv_heads)
    if config.head_dim % 2:
        raise _invalid("head_dim", "an even number", config.head_dim)
    if any(token >= config.vocab_size for token in config.eos_token_ids):
        raise _invalid("eos_token_id", f"below the vocabulary's {config.vocab_size}", config.eos_token_ids)


def _positive(name: str, value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]  # type() narrows nothing
        raise _invalid(name, "a positive number", value)
    return float(value)  # type: ignore[arg-type]  # see above


def _invalid(name: str, wanted: str, value: object) -> EngineError:
    return EngineError("CONFIG_INVALID", f"config.json: {name} must be {wanted}, not {value!r}")


def _unsupported(what: str) -> EngineError:
    return EngineError("CONFIG_UNSUPPORTED", f"config.json: {what}; this engine does not compute it")
