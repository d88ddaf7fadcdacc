"""The GGUF container read strictly: metadata, and where each tensor lies; nothing in it is believed beforehand.

Every length is compared with what is left of the file and with a limit before it is used. Tensors must be known
types, must not overlap, and must fill the file but for alignment.

Source: ggml, docs/gguf.md (version 3); block sizes as in ggml-common.h.
"""

import array
import math
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from engine.errors import EngineError

MAGIC, VERSION = b"GGUF", 3
MAX_HEADER_BYTES = 256 << 20
MAX_STRING_BYTES = 16 << 20
MAX_KEY_BYTES = 1 << 10
MAX_PAIRS, MAX_ELEMENTS, MAX_TENSORS = 1 << 14, 1 << 22, 1 << 18
MAX_DIMS, MAX_NAME_BYTES = 4, 256
MAX_ALIGNMENT = 1 << 16
_DEFAULT_ALIGNMENT = 32

BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_K": (256, 144),
          "Q6_K": (256, 210)}  # fmt: skip
"""Types of tensors that are converted: numbers in a block, and its bytes."""

_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class TensorInfo(NamedTuple):
    """A tensor: its type, its shape as torch writes it (slowest dimension first), and its place in the file."""

    type: str
    shape: tuple[int, ...]
    offset: int
    length: int


class Container(NamedTuple):
    """What a file says of itself.

    Attributes:
        metadata: numbers, texts, booleans and lists of them, by key.
        tensors: by name, in the order of their offsets.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_container(path: Path) -> Container:
    """The container at `path`.

    Raises:
        EngineError: GGUF_INVALID; GGUF_UNSUPPORTED, a version, a type or a split that is not converted, by name;
            SOURCE_UNREADABLE.
    """
    try:
        with path.open("rb") as stream:
            return _read(_Cursor(stream, os.fstat(stream.fileno()).st_size))
    except OSError as error:
        raise EngineError("SOURCE_UNREADABLE", f"{path.name} cannot be read: {error.strerror}") from None


class _Cursor:
    """Reads a file from its beginning, and refuses to pass its end or the limit of a header."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self.size = size
        self.position = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > min(self.size, MAX_HEADER_BYTES) - self.position:
            raise _invalid(f"at byte {self.position} it wants {count} more than a header may have")
        content = self._stream.read(count)
        if len(content) != count:
            raise _invalid("it became shorter while it was read")
        self.position += count
        return content

    def number(self, code: str) -> int:
        """The next integer, of the struct module's type `code`."""
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return value

    def text(self, limit: int) -> str:
        """The next string."""
        length = self.number("Q")
        if length > limit:
            raise _invalid(f"a text of {length} bytes, where {limit} are allowed")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise _invalid("a text is not UTF-8") from None


def _read(cursor: _Cursor) -> Container:
    if cursor.size < 24 or cursor.take(4) != MAGIC:
        raise _invalid("it does not begin as one")
    version = cursor.number("I")
    if version != VERSION:
        raise EngineError("GGUF_UNSUPPORTED", f"GGUF version {version}; version {VERSION} is converted")
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    if tensors > MAX_TENSORS or pairs > MAX_PAIRS:
        raise _invalid(f"{tensors} tensors and {pairs} pairs; {MAX_TENSORS} and {MAX_PAIRS} are allowed")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text(MAX_KEY_BYTES)
        if key in metadata:
            raise _invalid(f"the key {key[:80]!a} occurs twice")
        metadata[key] = _value(cursor, cursor.number("I"))
    _refuse_split(metadata)
    infos = [_info(cursor) for _ in range(tensors)]
    return Container(metadata, _placed(infos, cursor, _alignment(metadata)))


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        return cursor.text(MAX_STRING_BYTES)
    if kind == _ARRAY:
        return _list(cursor)
    if kind not in _SCALARS:
        raise _invalid(f"a value of the unknown kind {kind}")
    raw = cursor.take(struct.calcsize("<" + _SCALARS[kind]))
    if _SCALARS[kind] == "?" and raw not in (b"\0", b"\1"):
        raise _invalid("a boolean is neither 0 nor 1")
    return struct.unpack("<" + _SCALARS[kind], raw)[0]


def _list(cursor: _Cursor) -> list[Any]:
    kind, count = cursor.number("I"), cursor.number("Q")
    if count > MAX_ELEMENTS:
        raise _invalid(f"a list of {count} elements, where {MAX_ELEMENTS} are allowed")
    if kind == _STRING:
        return [cursor.text(MAX_STRING_BYTES) for _ in range(count)]
    if kind not in _SCALARS:
        raise _invalid(f"a list of elements of the kind {kind}")
    code = "B" if _SCALARS[kind] == "?" else _SCALARS[kind]
    values = array.array({"I": "I", "i": "i", "Q": "Q", "q": "q"}.get(code, code))
    values.frombytes(cursor.take(count * values.itemsize))
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def _refuse_split(metadata: Mapping[str, Any]) -> None:
    if metadata.get("split.count", 0) not in (0, 1):
        raise EngineError(
            "GGUF_UNSUPPORTED",
            "one of several files of a split model; join them with llama-gguf-split --merge",
        )


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment % 8:
        raise _invalid("general.alignment is no multiple of 8 within reason")
    return alignment


def _info(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int]:
    """Name, type, shape and offset of the next tensor; its numbers are known to be few enough to multiply."""
    name = cursor.text(MAX_NAME_BYTES)
    count = cursor.number("I")
    if not 1 <= count <= MAX_DIMS:
        raise _invalid(f"tensor {name[:80]!a} has {count} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(count)]))
    number, offset = cursor.number("I"), cursor.number("Q")
    kind = _TYPES.get(number, f"type {number}")
    if kind not in BLOCKS:
        raise EngineError(
            "GGUF_UNSUPPORTED", f"tensor {name[:80]!a} is {kind}; converted are {', '.join(sorted(BLOCKS))}"
        )
    block, _ = BLOCKS[kind]
    if not all(shape) or shape[-1] % block:
        raise _invalid(f"tensor {name[:80]!a} of the shape {list(shape)} cannot be {kind}")
    return name, kind, shape, offset


def _placed(
    infos: list[tuple[str, str, tuple[int, ...], int]], cursor: _Cursor, alignment: int
) -> dict[str, TensorInfo]:
    """The tensors by name, in the order of their places, which must leave neither holes nor overlaps."""
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    end = start
    for name, kind, shape, offset in sorted(infos, key=lambda info: info[3]):
        block, size = BLOCKS[kind]
        length = math.prod(shape) // block * size
        if name in tensors:
            raise _invalid(f"tensor {name[:80]!a} occurs twice")
        if start + offset != -(-end // alignment) * alignment or start + offset + length > cursor.size:
            raise _invalid(f"tensor {name[:80]!a} overlaps another, leaves a hole, or passes the end of the file")
        tensors[name] = TensorInfo(kind, shape, start + offset, length)
        end = start + offset + length
    if not tensors or cursor.size > -(-end // alignment) * alignment:
        raise _invalid("it has no tensors, or bytes that belong to none")
    return tensors


def _invalid(what: str) -> EngineError:
    return EngineError("GGUF_INVALID", f"not a sound GGUF file: {what}")
