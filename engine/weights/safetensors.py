"""Tensors from safetensors files: a strict reader of the header, and the tensors behind it.

The header must describe its data exactly: tensors in any order, without gap, overlap or surplus.

Source: the safetensors format, huggingface/safetensors README ("Format").
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.errors import EngineError
from engine.strict_json import load_object
from engine.weights.files import File, OpenFile, verified

if TYPE_CHECKING:
    from torch import Tensor

_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "uint8",  # exponents of scales, read as bytes
}
ITEM_BYTES = {name: {"64": 8, "32": 4, "16": 2}.get(name[-2:], 1) for name in _TORCH_NAMES}
"""Of each number type, as safetensors calls it."""

_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""Of a file that is read; published ones have under 20 MB."""


class TensorEntry(NamedTuple):
    """Where a tensor lies: number type, shape, and byte range from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(content: bytes | bytearray | memoryview, file_size: int, path: str) -> dict[str, TensorEntry]:
    """The tensors that a safetensors file describes.

    Args:
        content: the file, or at least its header.
        file_size: bytes of the whole file.
        path: of the file, for messages.

    Raises:
        EngineError: WEIGHTS_INVALID.
    """
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if file_size < _LENGTH_BYTES or length > MAX_HEADER_BYTES or start > min(file_size, len(content)):
        raise _invalid(path, "its header does not fit")
    header = load_object(bytes(content[_LENGTH_BYTES:start]), f"the header of {path}", "WEIGHTS_INVALID")
    try:
        header.pop("__metadata__", None)
        entries = {name: _entry(value, start) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _invalid(path, "its header is malformed") from error
    position = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position or entry.end - entry.begin != math.prod(entry.shape) * ITEM_BYTES[entry.dtype]:
            raise _invalid(path, "its tensors leave gaps, overlap, or are not as long as their shapes say")
        position = entry.end
    if position != file_size:
        raise _invalid(path, "it holds bytes that belong to no tensor")
    return entries


def read_stored_header(file: File, open_file: OpenFile) -> dict[str, TensorEntry]:
    """The tensors that a file of the store says it holds; its bytes are not hashed, whoever loads them does that.

    Raises:
        EngineError: WEIGHTS_INVALID; WEIGHTS_DIGEST_MISMATCH, it is so because the file was changed.
    """
    descriptor = open_file(file.sha256)
    try:
        head = os.pread(descriptor, _LENGTH_BYTES, 0)
        length = min(int.from_bytes(head, "little"), file.size, MAX_HEADER_BYTES)
        return read_header(head + os.pread(descriptor, length, len(head)), file.size, file.path)
    except EngineError:
        with verified(file, open_file):
            raise
    finally:
        os.close(descriptor)


def read_tensors(file: File, open_file: OpenFile) -> dict[str, tuple[TensorEntry, Tensor]]:
    """The tensors of a file, each in a buffer of its own, and what its header says of them; every byte is hashed.

    Raises:
        EngineError: WEIGHTS_DIGEST_MISMATCH, WEIGHTS_INVALID.
    """
    import torch  # the header is read by engine-inspect too, which must not load torch

    tensors = {}
    with verified(file, open_file) as reading:
        head = reading.read(min(_LENGTH_BYTES, file.size))
        rest = min(int.from_bytes(head, "little"), file.size - len(head), MAX_HEADER_BYTES)
        entries = read_header(head + reading.read(rest), file.size, file.path)
        for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
            if entry.begin == entry.end:
                raise _invalid(file.path, f"tensor {name} is empty")
            dtype = getattr(torch, _TORCH_NAMES[entry.dtype])
            content = reading.read(entry.end - entry.begin)
            tensors[name] = (entry, torch.frombuffer(content, dtype=dtype).view(entry.shape))
    return tensors


def _entry(value: Mapping[str, Any], start: int) -> TensorEntry:
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if set(value) != {"dtype", "shape", "data_offsets"} or value["dtype"] not in ITEM_BYTES:
        raise ValueError("unknown field or number type")
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError("not a size")
    return TensorEntry(value["dtype"], shape, start + begin, start + end)


def _invalid(path: str, what: str) -> EngineError:
    return EngineError("WEIGHTS_INVALID", f"{path} is not a sound safetensors file: {what}")
