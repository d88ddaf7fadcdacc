"""Starts of kernels as JSON, so that one machine can say what another is to compile.

A tensor is its number type and whether it begins at a multiple of 16 bytes, as that is all a kernel is compiled
for; a list read back has tensors without memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import triton.language as tl

from kernels.triton.launch import Launch

Json: TypeAlias = Any
_OURS = "kernels."
_PLAIN = (bool, int, float, str, type(None))
_ALIGNED = 16


def to_json(starts: Sequence[Launch]) -> list[Json]:
    """Starts as `from_json` reads them.

    Raises:
        TypeError: an argument is nothing of which a kernel can be compiled elsewhere.
    """
    return [
        {
            "kernel": f"{start.kernel.fn.__module__}:{start.kernel.fn.__name__}",
            "grid": list(start.grid),
            "args": [_encode(arg) for arg in start.args],
            "options": {name: _encode(value) for name, value in start.options.items()},
        }
        for start in starts
    ]


def from_json(entries: Sequence[Mapping[str, Json]]) -> list[Launch]:
    """The starts of a list.

    Raises:
        ValueError: it names what is no kernel of ours.
    """
    return [
        Launch(
            _kernel(entry["kernel"]),
            tuple(entry["grid"]),
            tuple(_decode(arg) for arg in entry["args"]),
            {name: _decode(value) for name, value in entry["options"].items()},
        )
        for entry in entries
    ]


def _encode(value: Any) -> Json:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": dtype, "aligned": value.data_ptr() % _ALIGNED == 0}
    if isinstance(value, tl.dtype):
        return {"dtype": value.name}
    raise TypeError(f"a start with a {type(value).__name__} is not kept in lists")


def _decode(value: Json) -> Any:
    match value:
        case {"tensor": str(name), "aligned": bool(aligned)}:
            dtype: torch.dtype = getattr(torch, name)
            whole = torch.empty(_ALIGNED, dtype=dtype, device="meta")
            return whole if aligned else whole[1:]
        case {"dtype": str(name)}:
            return tl.dtype(name)
        case _:
            return value


def _kernel(name: str) -> Any:
    """What `triton.jit` made of the function MODULE:NAME, whatever it is called there."""
    module, _, function = name.partition(":")
    objects = vars(importlib.import_module(module)).values() if module.startswith(_OURS) else ()
    for found in objects:
        if hasattr(found, "warmup") and found.fn.__name__ == function and found.fn.__module__ == module:
            return found
    raise ValueError(f"{name} is no kernel of ours")
