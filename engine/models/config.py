"""The strict reader of a model's config.json: what it cannot compute exactly, it refuses by name.

Reads the layout of transformers 5 (`rope_parameters`) and of transformers 4 (`rope_theta`, `rope_scaling`). Needs
neither torch nor transformers. A field that is not known is refused, for it may change the mathematics; a field
that is null is as good as absent.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError
from engine.strict_json import load_object

_INERT = frozenset(
    (
        *("_name_or_path", "architectures", "transformers_version", "transformers.js_config", "tokenizer_class"),
        *("bos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
        *("dtype", "torch_dtype", "initializer_range", "attention_dropout"),
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    )
)
_NO_OPS = {  # fields that mean nothing with this value, and something else with any other
    "partial_rotary_factor": 1,
    "pretraining_tp": 1,
    "is_llama_config": True,
    "rope_interleaved": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "torchscript": False,
}
_AT_MOST = {  # far beyond any model of today, and small enough that a table of that size harms nobody
    "max_position_embeddings": 2**20,
    "vocab_size": 2**20,
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    "original_max_position_embeddings": 2**20,
    "rope_theta": 1e12,
    "factor": 2**20,
}
_LARGEST = 1e6  # of numbers with no limit of their own
_ACTIVATIONS = ("silu", "swish")  # two names of one function
_ROPE_FIELDS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
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
        """Radians per token of each pair of numbers, head_dim / 2 of them, each a float32.

        They are rounded where transformers rounds them, for models are trained and published with those: far into
        a context an angle differs by more from the exact one than a logit may.

        Source: Su et al., "RoFormer", 2021, equation 15; Chen et al., "Extending Context Window of Large Language
        Models via Positional Interpolation", 2023; for llama3, Meta's Llama 3.1 reference implementation.
        """
        plain = [_float32(1 / _float32(self.theta ** _float32(i / head_dim))) for i in range(0, head_dim, 2)]
        if self.kind == "llama3":
            return tuple(_float32(self._llama3(frequency)) for frequency in plain)
        return tuple(_float32(frequency / self.factor) for frequency in plain)

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
        model_type: as config.json names it; decides with transformers, and must be the architecture's.
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
    model_type: str
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
    fields.only("hidden_act", *_ACTIVATIONS)
    for name, value in _NO_OPS.items():
        fields.only(name, value, default=value)
    config = ModelConfig(
        architecture=_architecture(fields.raw),
        model_type=fields.text("model_type"),
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", heads),
        head_dim=fields.size("head_dim", None if hidden % heads else hidden // heads),
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
        return _size(name, self.take(name, default))

    def number(self, name: str) -> float:
        """A positive finite number."""
        return _positive(name, self.take(name))

    def text(self, name: str) -> str:
        """A string."""
        value = self.take(name)
        if type(value) is not str:
            raise _invalid(name, "a string", value)
        return value

    def flag(self, name: str) -> bool:
        """True or false; absent is false."""
        value = self.take(name, False)
        if type(value) is not bool:
            raise _invalid(name, "true or false", value)
        return value

    def only(self, name: str, *supported: object, default: object = None) -> None:
        """Refuse any value but these."""
        _only(name, self.take(name, default), *supported)

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
    parameters, scaling, theta = (fields.take(n) for n in ("rope_parameters", "rope_scaling", "rope_theta"))
    if parameters is not None and scaling is not None:
        raise _unsupported("rope_parameters beside a rope_scaling")
    given = _mapping(parameters if parameters is not None else {} if scaling is None else scaling)
    values = {name: value for name, value in given.items() if value is not None}
    inner = values.pop("rope_theta", theta)
    if theta is not None and (inner != theta or (parameters is not None and "rope_theta" not in given)):
        raise _unsupported("a rope_theta beside rope_parameters or rope_scaling that differs")
    legacy = values.pop("type", None)
    kind = values.pop("rope_type", "default" if legacy is None else legacy)
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS or legacy not in (None, kind):
        raise _unsupported(f"rope_type = {kind!r} (supported: {', '.join(sorted(_ROPE_FIELDS))})")
    _only("rope partial_rotary_factor", values.pop("partial_rotary_factor", 1), 1)
    return _rope_of(kind, _positive("rope_theta", _DEFAULT_THETA if inner is None else inner), values)


def _rope_of(kind: str, theta: float, values: dict[str, Any]) -> RopeConfig:
    numbers = {name: _positive(name, values.pop(name, None)) for name in sorted(_ROPE_FIELDS[kind])}
    original = 0
    if kind == "llama3":
        original = _size("original_max_position_embeddings", values.pop("original_max_position_embeddings", None))
    if values:
        raise _unsupported(f"unknown rope field {', '.join(sorted(values))}")
    rope = RopeConfig(kind, theta, original_context=original, **numbers)
    if theta < 1:
        raise _invalid("rope_theta", "at least 1", theta)
    if rope.factor < 1 or (kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor):
        raise _invalid("rope", "a factor of at least 1 and high_freq_factor above low_freq_factor", numbers)
    return rope


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


def _size(name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise _invalid(name, "a positive whole number", value)
    _bound(name, value)
    return value


def _positive(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise _invalid(name, "a positive number", value)
    _bound(name, value)
    return float(value)


def _bound(name: str, value: float) -> None:
    limit = _AT_MOST.get(name, _LARGEST)
    if value > limit:
        raise _unsupported(f"{name} is beyond {limit}, the largest this engine takes")


def _only(name: str, value: object, *supported: object) -> None:
    if value not in supported or isinstance(value, bool) != isinstance(supported[0], bool):
        raise _unsupported(f"{name} = {value!r} (supported: {', '.join(map(repr, supported))})")


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _invalid(name: str, wanted: str, value: object) -> EngineError:
    return EngineError("CONFIG_INVALID", f"config.json: {name} must be {wanted}, not {value!r}")


def _unsupported(what: str) -> EngineError:
    return EngineError("CONFIG_UNSUPPORTED", f"config.json: {what}; this engine does not compute it")
