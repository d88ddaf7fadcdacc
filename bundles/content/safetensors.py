"""Whether a safetensors file is what its header says: every byte of data owned by one tensor of known type.

Source: safetensors format description (8-byte little-endian header length, JSON header, contiguous data).
"""

import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

from bundles.content.text import parse
from bundles.format.errors import BundleError

MAX_HEADER = 16 * 1024 * 1024
"""Bytes of one header; 120 000 tensors. The format's own limit of 100 MB would take over a gigabyte to parse."""

_PREFIX = 8
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


class Tensor(NamedTuple):
    """A tensor's type, shape and place in the data, bytes from the data's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header_end(prefix: bytes, size: int, path: str) -> int:
    """Bytes from the file's beginning to the end of its header, told by its first eight.

    Raises:
        BundleError: SAFETENSORS_HEADER.
    """
    if len(prefix) < _PREFIX:
        raise BundleError("SAFETENSORS_HEADER", f"{path} is too short for a safetensors file")
    (length,) = struct.unpack("<Q", prefix[:_PREFIX])
    if length > MAX_HEADER or length > size - _PREFIX:
        raise BundleError("SAFETENSORS_HEADER", f"{path} announces a header of {length} bytes")
    return _PREFIX + int(length)


def read_tensors(read: Callable[[int, int], bytes], size: int, path: str) -> tuple[Tensor, ...]:
    """The tensors of a file of `size` bytes, in the order of their data.

    Args:
        read: the file's bytes at an offset, of a length.
        size: of the whole file, bytes.
        path: names the file in errors.

    Raises:
        BundleError: SAFETENSORS_HEADER, SAFETENSORS_TENSOR, SAFETENSORS_DUPLICATE, SAFETENSORS_OVERLAP,
            SAFETENSORS_HOLE, SAFETENSORS_SIZE, CONTENT_TOO_LARGE, or a JSON code.
    """
    end = header_end(read(0, _PREFIX), size, path)
    header = _header(read(_PREFIX, end - _PREFIX), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BundleError("SAFETENSORS_HEADER", f"{path} has metadata that is not text")
    tensors = sorted(
        (_tensor(name, entry, path) for name, entry in header.items()), key=lambda t: (t.begin, t.end)
    )
    _check_cover(tensors, size - end, path)
    return tuple(tensors)


def _header(raw: bytes, path: str) -> dict[str, object]:
    """The header, which begins with its brace as every reader of the format demands."""
    try:
        header = parse(raw, f"the header of {path}")
    except BundleError as error:
        if error.code == "JSON_DUPLICATE_KEY":
            raise BundleError("SAFETENSORS_DUPLICATE", f"{path} lists a tensor twice") from None
        raise
    if not isinstance(header, dict) or not raw.startswith(b"{"):
        raise BundleError("SAFETENSORS_HEADER", f"{path} has a header that does not begin with an object")
    return header


def _tensor(name: str, entry: object, path: str) -> Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)], **rest} if (
            not rest
        ):
            numbers = (*shape, begin, end)
            if all(type(n) is int and n >= 0 for n in numbers) and begin <= end:  # true is no number
                _check_bytes(name, dtype, shape, end - begin, path)
                return Tensor(name, dtype, tuple(shape), begin, end)
    raise BundleError("SAFETENSORS_TENSOR", f"{path} describes the tensor {name[:80]!a} in an unknown form")


def _check_bytes(name: str, dtype: str, shape: list[int], length: int, path: str) -> None:
    if dtype not in _BITS:
        raise BundleError("SAFETENSORS_TENSOR", f"{path}: {name[:80]!a} has the unknown type {dtype[:16]!a}")
    if _count(shape, most=8 * length) * _BITS[dtype] != 8 * length:
        raise BundleError("SAFETENSORS_SIZE", f"{path}: {name[:80]!a} has other bytes than its shape needs")


def _count(shape: list[int], most: int) -> int:
    """Numbers in a tensor, or any number over `most`: a product of many large ones would take hours."""
    count = 0 if 0 in shape else 1
    for dim in shape:
        count *= dim
        if count > most:
            break
    return count


def _check_cover(tensors: list[Tensor], data: int, path: str) -> None:
    position = 0
    for tensor in tensors:
        if tensor.begin < position:
            raise BundleError("SAFETENSORS_OVERLAP", f"{path}: {tensor.name[:80]!a} overlaps another tensor")
        if tensor.begin > position:
            raise BundleError("SAFETENSORS_HOLE", f"{path} has bytes that belong to no tensor")
        position = tensor.end
    if position != data:
        code = "SAFETENSORS_HOLE" if position < data else "SAFETENSORS_SIZE"
        raise BundleError(code, f"{path} has {data} bytes of data, its tensors need {position}")


def read_index(raw: bytes, path: str) -> dict[str, str]:
    """The shard of each tensor, as a `*.safetensors.index.json` says.

    Raises:
        BundleError: INDEX_SCHEMA, CONTENT_TOO_LARGE, or a JSON code.
    """
    match parse(raw, path, any_number=True):
        case {"weight_map": dict(weight_map)} if all(isinstance(shard, str) for shard in weight_map.values()):
            return weight_map
    raise BundleError("INDEX_SCHEMA", f"{path} has no weight_map of names to files")


def check_index(index: Mapping[str, str], shards: Mapping[str, frozenset[str]], path: str) -> None:
    """Refuse a weights index that names a shard or tensor that is not there, or leaves one out.

    Args:
        index: shard by tensor, of `read_index`.
        shards: names of the tensors in each weights file, by path.
        path: of the index.

    Raises:
        BundleError: INDEX_SHARD_ABSENT, INDEX_INCOMPLETE.
    """
    folder = path.rpartition("/")[0]
    for tensor, shard in index.items():
        full = f"{folder}/{shard}" if folder else shard
        if full not in shards:
            raise BundleError("INDEX_SHARD_ABSENT", f"{path} names the shard {full[:120]!a}, which is not there")
        if tensor not in shards[full]:
            raise BundleError("INDEX_SHARD_ABSENT", f"{path} looks for {tensor[:80]!a} in the wrong shard")
    named = {f"{folder}/{shard}" if folder else shard for shard in index.values()}
    forgotten = sorted(tensor for shard in named for tensor in shards[shard] - index.keys())
    if forgotten:
        raise BundleError(
            "INDEX_INCOMPLETE", f"{path} leaves out {forgotten[0][:80]!a}, which a shard of it holds"
        )
