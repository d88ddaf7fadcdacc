"""The tensors of a folder's safetensors files, from their headers alone."""

import math
from collections import Counter
from collections.abc import Collection, Mapping

from engine.errors import EngineError
from engine.inspect.folder import Folder
from engine.strict_json import load_object
from engine.weights.safetensors import ITEM_BYTES, TensorEntry, read_header

MAX_HEADER_BYTES = 16 << 20
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_tensors(folder: Folder, dtypes: Collection[str] = tuple(ITEM_BYTES)) -> dict[str, TensorEntry]:
    """Every tensor of every safetensors file, by name.

    Args:
        folder: the files.
        dtypes: number types that they may have.

    Raises:
        EngineError: MODEL_FILE_MISSING, WEIGHTS_INVALID, DTYPE_UNSUPPORTED, TENSORS_MISMATCH.
    """
    found: dict[str, TensorEntry] = {}
    for path in folder.matching(".safetensors"):
        length = int.from_bytes(folder.head(path, 8), "little")
        if length > MAX_HEADER_BYTES:
            raise EngineError("WEIGHTS_INVALID", f"{path} declares a header of {length} bytes")
        head = folder.head(path, 8 + length)
        _check_dtypes(head[8:], path, dtypes)
        entries = read_header(head, folder.size(path), path)
        twice = sorted(found.keys() & entries.keys())
        if twice:
            raise EngineError("TENSORS_MISMATCH", f"tensor {twice[0]} is in {path} and in another file")
        found.update(entries)
    if not found:
        raise EngineError("MODEL_FILE_MISSING", "there are no tensors in safetensors files")
    return found


def most_common_dtype(entries: Mapping[str, TensorEntry]) -> tuple[str, int]:
    """The number type of most numbers, as people call it, and how many numbers there are of all types."""
    numbers = Counter[str]()
    for entry in entries.values():
        numbers[entry.dtype] += math.prod(entry.shape)
    dtype, _ = numbers.most_common(1)[0]
    return _NAMES.get(dtype, dtype), numbers.total()


def _check_dtypes(header: bytes, path: str, dtypes: Collection[str]) -> None:
    """Refuse by its name a number type that this engine does not compute with."""
    tensors = load_object(header, f"the header of {path}", "WEIGHTS_INVALID")
    for name, value in tensors.items():
        dtype = value.get("dtype") if isinstance(value, dict) else None
        if name != "__metadata__" and isinstance(dtype, str) and dtype not in dtypes:
            raise EngineError(
                "DTYPE_UNSUPPORTED",
                f"tensor {name[:80]} of {path} is {dtype[:16]}; computed with are {', '.join(dtypes)}",
            )
