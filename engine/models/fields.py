"""The strict reader of config.json's fields: what no family takes is refused by name.

Needs neither torch nor transformers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import EngineError

_INERT = frozenset(
    (
        *("_name_or_path", "architectures", "transformers_version", "transformers.js_config", "tokenizer_class"),
        *("bos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
        *("dtype", "torch_dtype", "initializer_range", "attention_dropout", "cache_implementation"),
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing"),
        *("_attn_implementation_autoset", "unsloth_fixed", "unsloth_version"),
    )
)
_NO_OPS = {  # fields that mean nothing with this value, and something else with any other
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "torchscript": False,
}
_HOW_TO_ATTEND = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
)  # all come to the same
_AT_MOST = {  # far beyond any model of today, and small enough that a table of that size harms nobody
    "max_position_embeddings": 2**20,
    "vocab_size": 2**20,
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "moe_intermediate_size": 2**18,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    "num_experts": 4096,
    "num_local_experts": 4096,
    "sliding_window": 2**30,
    "original_max_position_embeddings": 2**20,
    "rope_theta": 1e12,
    "factor": 2**20,
}
_LARGEST = 1e6  # of numbers with no limit of their own
_SMALLEST = 1e-12


class Fields:
    """The fields of config.json, each taken once; what nobody takes is refused.

    Args:
        raw: the object.
        where: before the name of a field in messages, where the object lies in another.
    """

    def __init__(self, raw: Mapping[str, Any], where: str = "") -> None:
        self.raw = raw
        self._where = where
        self._left = set(raw) - _INERT
        for name, value in _NO_OPS.items():
            self.only(name, value, default=value)
        self.only("_attn_implementation", *_HOW_TO_ATTEND, default=_HOW_TO_ATTEND[0])

    def take(self, name: str, default: Any = None) -> Any:
        """The value of `name`; the default where it is absent or null."""
        value = self.nullable(name, default)
        return default if value is None else value

    def nullable(self, name: str, default: Any = None) -> Any:
        """The value of `name`, None where it is null; the default where it is absent."""
        self._left.discard(name)
        return self.raw.get(name, default)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number."""
        return as_size(name, self.take(name, default))

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number, zero or more."""
        value = self.take(name, default)
        return 0 if type(value) is int and value == 0 else as_size(name, value)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        return as_number(name, self.take(name, default))

    def text(self, name: str) -> str:
        """A string."""
        value = self.take(name)
        if type(value) is not str:
            raise invalid(name, "a string", value)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.take(name, default)
        if type(value) is not bool:
            raise invalid(name, "true or false", value)
        return value

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        """An object; None where it is absent or null."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise invalid(name, "an object", value)
        return value

    def only(self, name: str, *supported: object, default: object = None) -> None:
        """Refuse any value but these."""
        as_one_of(name, self.take(name, default), supported)

    def ignore(self, *names: str) -> None:
        """Fields that change nothing, whatever they say."""
        self._left.difference_update(names)

    def refuse_rest(self) -> None:
        """Refuse the fields nobody took; a field that is null is as good as absent."""
        left = sorted(name for name in self._left if self.raw[name] is not None)
        if left:
            raise unsupported(f"unknown {self._where}field {', '.join(left)}")


def as_size(name: str, value: object) -> int:
    """`value`, if it is a positive whole number.

    Raises:
        EngineError: CONFIG_INVALID, or CONFIG_UNSUPPORTED where it is larger than any model's.
    """
    if type(value) is not int or value < 1:
        raise invalid(name, "a positive whole number", value)
    _bound(name, value)
    return value


def as_number(name: str, value: object) -> float:
    """`value` as a float, if it is a positive finite number; errors as `as_size`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise invalid(name, "a positive number", value)
    _bound(name, value)
    return float(value)


def as_one_of(name: str, value: object, supported: Sequence[object]) -> None:
    """Refuse any `value` but these; true is not 1 here."""
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in supported):
        raise unsupported(f"{name} = {value!r} (supported: {', '.join(map(repr, supported))})")


def invalid(name: str, wanted: str, value: object) -> EngineError:
    """A field is missing or of the wrong type."""
    return EngineError("CONFIG_INVALID", f"config.json: {name} must be {wanted}, not {str(value)[:100]!r}")


def unsupported(what: str) -> EngineError:
    """A field or value that this engine does not compute."""
    return EngineError("CONFIG_UNSUPPORTED", f"config.json: {what}; this engine does not compute it")


def _bound(name: str, value: float) -> None:
    limit = _AT_MOST.get(name, _LARGEST)
    if value > limit:
        raise unsupported(f"{name} is beyond {limit}, the largest this engine takes")
    if value < _SMALLEST:
        raise unsupported(f"{name} is below {_SMALLEST}, the smallest this engine takes")
