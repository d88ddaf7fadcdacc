"""Prepared objects as JSON and tensors, and back: what a backend made of weights, whatever layout it has.

A backend's prepared objects are named tuples, tuples and lists of tensors, numbers, texts and None. Types are kept
by name, and only those of `kernels` are made again; a tensor that is in several places stays one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from engine.errors import EngineError

Json: TypeAlias = Any
_OURS = "kernels."
_PLAIN = (bool, int, float, str, type(None))


def encode(value: Any, keep: Callable[[Tensor], int]) -> Json:
    """What `value` is, but for its tensors.

    Args:
        value: a prepared object.
        keep: takes a tensor; its number.

    Raises:
        EngineError: DERIVED_UNSUPPORTED, there is something in it that no file can hold.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type != "cpu":
            raise EngineError("DERIVED_UNSUPPORTED", "a prepared tensor's numbers are its library's own secret")
        return {"tensor": keep(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if type(value) in (tuple, list):
        return {type(value).__name__: [encode(item, keep) for item in value]}
    if isinstance(value, tuple) and hasattr(value, "_fields") and type(value).__module__.startswith(_OURS):
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"type": name, "fields": [encode(item, keep) for item in value]}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise EngineError("DERIVED_UNSUPPORTED", f"a prepared {kind} is not kept in files")


def decode(tree: Json, tensors: Sequence[Tensor]) -> Any:
    """The object that `encode` made `tree` of.

    Raises:
        EngineError: DERIVED_MISMATCH, this program has no such objects.
    """
    match tree:
        case {"tensor": int(number)}:
            return tensors[number]
        case {"dtype": str(name)}:
            return getattr(torch, name)
        case {"tuple": list(items)}:
            return tuple(decode(item, tensors) for item in items)
        case {"list": list(items)}:
            return [decode(item, tensors) for item in items]
        case {"type": str(name), "fields": list(items)}:
            kind = _kind(name)
            if len(kind._fields) != len(items):
                raise EngineError("DERIVED_MISMATCH", f"{name} was another one when the derived file was made")
            return kind(*(decode(item, tensors) for item in items))
        case _:
            return tree


def _kind(name: str) -> Any:
    """The named tuple MODULE:NAME of ours."""
    module, _, names = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), names) if module.startswith(_OURS) else None
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")):
        raise EngineError("DERIVED_MISMATCH", f"there is no {name}, of which the derived file is made")
    return found
