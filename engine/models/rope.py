"""Reads rotary embeddings out of a configuration, in the layouts of transformers 4 and of transformers 5.

Transformers 5 has `rope_parameters`, of one object or of one for each kind of layer; transformers 4 has
`rope_theta` beside `rope_scaling`. What a kind of rotary embedding does not know is refused by name.
"""

import math
from collections.abc import Mapping
from typing import Any

from engine.models.fields import Fields, as_number, as_one_of, as_size, invalid, unsupported
from engine.models.spec import DEFAULT_THETA, RopeConfig

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_ORIGINAL = "original_max_position_embeddings"
_HAVE_ORIGINAL = ("yarn", "longrope", "llama3")


def read_rope(
    fields: Fields,
    head_dim: int,
    context: int,
    theta: float = DEFAULT_THETA,
    kinds: tuple[str, ...] = KINDS,
    default: Mapping[str, Any] | None = None,
) -> RopeConfig:
    """The one rotary embedding of a model.

    Args:
        fields: of the configuration.
        head_dim: numbers of a head.
        context: positions the model knows.
        theta: where the configuration does not say.
        kinds: that the family knows.
        default: what `rope_parameters` are where there are none.

    Raises:
        EngineError: CONFIG_INVALID, CONFIG_UNSUPPORTED.
    """
    return rope_of(given_rope(fields, default), head_dim, context, theta, kinds)


def given_rope(fields: Fields, default: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What either layout says, as one object of the newer; errors as `read_rope`."""
    parameters, scaling, theta = (
        fields.mapping("rope_parameters"),
        fields.mapping("rope_scaling"),
        fields.take("rope_theta"),
    )
    if parameters is not None and scaling:
        raise unsupported("rope_parameters beside a rope_scaling")
    given = parameters if parameters is not None else scaling or default or {}
    values = {name: value for name, value in given.items() if value is not None or name == "truncate"}
    inner = values.get("rope_theta", theta)
    if theta is not None and (inner != theta or (parameters is not None and "rope_theta" not in given)):
        raise unsupported("a rope_theta beside rope_parameters or rope_scaling that differs")
    return values if inner is None else values | {"rope_theta": inner}


def rope_of(
    values: dict[str, Any], head_dim: int, context: int, theta: float, kinds: tuple[str, ...] = KINDS
) -> RopeConfig:
    """One rotary embedding from its object, which is emptied; arguments and errors as `read_rope`."""
    legacy = values.pop("type", None)
    kind = values.pop("rope_type", "default" if legacy is None else legacy)
    if not isinstance(kind, str) or kind not in kinds or legacy not in (None, kind):
        raise unsupported(f"rope_type = {kind!r} (supported: {', '.join(sorted(kinds))})")
    found: dict[str, Any] = {"theta": as_number("rope_theta", values.pop("rope_theta", theta))}
    if found["theta"] <= 1:
        raise invalid("rope_theta", "above 1", found["theta"])
    found["partial"] = _partial(values, head_dim)
    if kind in _HAVE_ORIGINAL:
        found["original_context"] = _original(kind, values, context)
    found |= _OWN[kind](values, found, head_dim, context)
    if values:
        raise unsupported(f"unknown rope field {', '.join(sorted(values))}")
    return RopeConfig(kind, **found)


def _partial(values: dict[str, Any], head_dim: int) -> float:
    """The share of a head that is rotated; families that rotate all of it accept no other before."""
    partial = as_number("partial_rotary_factor", values.pop("partial_rotary_factor", 1.0))
    if partial > 1 or int(head_dim * partial) % 2 or not int(head_dim * partial):
        raise invalid("partial_rotary_factor", f"a share of {head_dim} that is an even number", partial)
    return partial


def _original(kind: str, values: dict[str, Any], context: int) -> int:
    default = None if kind == "llama3" else context
    original = as_size(_ORIGINAL, values.pop(_ORIGINAL, default))
    if kind != "llama3" and original < 2:
        raise invalid(_ORIGINAL, "at least 2", original)
    return original


def _factor(values: dict[str, Any]) -> float:
    factor = as_number("factor", values.pop("factor", None))
    if factor < 1:
        raise invalid("rope factor", "at least 1", factor)
    return factor


def _default(values: dict[str, Any], found: dict[str, Any], head_dim: int, context: int) -> dict[str, Any]:
    return {}


def _stretched(values: dict[str, Any], found: dict[str, Any], head_dim: int, context: int) -> dict[str, Any]:
    return {"factor": _factor(values)}


def _llama3(values: dict[str, Any], found: dict[str, Any], head_dim: int, context: int) -> dict[str, Any]:
    names = ("low_freq_factor", "high_freq_factor")
    numbers = {name: as_number(name, values.pop(name, None)) for name in names}
    if numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise invalid("rope", "a high_freq_factor above low_freq_factor", numbers)
    return numbers | {"factor": _factor(values)}


def _yarn(values: dict[str, Any], found: dict[str, Any], head_dim: int, context: int) -> dict[str, Any]:
    factor = _factor(values)
    truncate = values.pop("truncate", True)
    as_one_of("rope truncate", truncate, (True, False))
    fast, slow = (
        as_number(name, values.pop(name, default)) for name, default in (("beta_fast", 32), ("beta_slow", 1))
    )
    if fast < slow:
        raise invalid("beta_fast", f"at least beta_slow, {slow}", fast)
    scales = [
        as_number(name, values.pop(name)) if name in values else None for name in ("mscale", "mscale_all_dim")
    ]
    scale = values.pop("attention_factor", None)
    if scale is None:
        own, whole = scales if None not in scales else (1.0, 0.0)
        scale = _yarn_scale(factor, own or 0.0) / _yarn_scale(factor, whole or 0.0)
    return {
        "factor": factor,
        "scale": as_number("attention_factor", scale),
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": truncate,
    }


def _yarn_scale(factor: float, weight: float) -> float:
    """Of cosines and sines, so that scores keep their entropy in a longer context (YaRN, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(values: dict[str, Any], found: dict[str, Any], head_dim: int, context: int) -> dict[str, Any]:
    count = int(head_dim * found["partial"]) // 2
    original = found["original_context"]
    factor = as_number("factor", values.pop("factor", context / original))
    scale = values.pop("attention_factor", None)
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "scale": as_number("attention_factor", scale),
        "short_factors": _numbers("short_factor", values.pop("short_factor", None), count),
        "long_factors": _numbers("long_factor", values.pop("long_factor", None), count),
    }


def _numbers(name: str, value: object, count: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count:
        raise invalid(name, f"a list of {count} numbers", value)
    return tuple(as_number(name, one) for one in value)


_OWN = {
    "default": _default,
    "linear": _stretched,
    "dynamic": _stretched,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
