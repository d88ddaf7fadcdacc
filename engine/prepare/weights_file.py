"""Safetensors files written tensor by tensor in any order, in shards; the same tensors are the same bytes.

Source: the safetensors format, huggingface/safetensors README ("Format"); Hugging Face's index of shards.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from engine.errors import EngineError

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}
_ALIGNMENT = 8


class TensorPlan(NamedTuple):
    """A tensor to be written: number type as safetensors calls it, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def total_bytes(plans: Mapping[str, TensorPlan]) -> int:
    """Bytes of all tensors."""
    return sum(plan.size for plan in plans.values())


class WeightsWriter:
    """Writes tensors in any order; use `writing`.

    Args:
        folder: where the files go.
        plans: every tensor, in the order in which they lie in the files.
        shard_bytes: of a file, unless one tensor alone is larger.
    """

    def __init__(self, folder: Path, plans: Mapping[str, TensorPlan], shard_bytes: int) -> None:
        self._folder = folder
        self._plans = plans
        self._left = set(plans)
        self._places: dict[str, tuple[Path, int]] = {}
        shards = _shards(plans, shard_bytes)
        for i, shard in enumerate(shards):
            self._lay_out(folder / _name(i, len(shards)), shard)

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """A tensor's bytes, little endian, piece by piece.

        Raises:
            ValueError: it was not planned, is written already, or has another length.
            EngineError: DISK_FULL.
        """
        if name not in self._left:
            raise ValueError(name)
        path, position = self._places[name]
        end = position + self._plans[name].size
        with path.open("r+b", buffering=0) as stream:
            for piece in pieces:  # what they are read from may fail, too, and is no fault of this disk
                if position + len(piece) > end:
                    raise ValueError(name)
                with _disk(self._folder):
                    position += _write_at(stream.fileno(), piece, position)
        if position != end:
            raise ValueError(name)
        self._left.remove(name)

    def finish(self) -> None:
        """Write the index, where there are several files.

        Raises:
            ValueError: a planned tensor was not written.
        """
        if self._left:
            raise ValueError(min(self._left))
        if len({path for path, _ in self._places.values()}) > 1:
            places = {name: path.name for name, (path, _) in self._places.items()}
            index = {"metadata": {"total_size": total_bytes(self._plans)}, "weight_map": places}
            (self._folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")

    def _lay_out(self, path: Path, names: Sequence[str]) -> None:
        """A file with its header, as long as it will be."""
        header = _header({name: self._plans[name] for name in names})
        position = len(header)
        with _disk(self._folder), path.open("xb") as stream:
            stream.write(header)
            for name in names:
                self._places[name] = (path, position)
                position += self._plans[name].size
            stream.truncate(position)


@contextmanager
def writing(
    folder: Path, plans: Mapping[str, TensorPlan], shard_bytes: int = SHARD_BYTES
) -> Iterator[WeightsWriter]:
    """A writer that is finished where the block ends well.

    Raises:
        EngineError: DISK_FULL, the tensors would not fit.
    """
    check_space(folder, total_bytes(plans))
    writer = WeightsWriter(folder, plans, shard_bytes)
    yield writer
    writer.finish()


def check_space(folder: Path, needed: int) -> None:
    """Refuse before the first byte what does not fit on the disk.

    Raises:
        EngineError: DISK_FULL.
    """
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    if needed > free:
        raise EngineError("DISK_FULL", f"the model needs {needed} bytes below {folder}, {free} are free")


def _name(number: int, count: int) -> str:
    """Of a shard, as Hugging Face names them."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Names what goes wrong with the disk."""
    try:
        yield
    except OSError as error:
        raise EngineError("DISK_FULL", f"{folder} cannot be written: {error.strerror}") from None


def _write_at(fd: int, piece: bytes | memoryview, position: int) -> int:
    view, done = memoryview(piece).cast("B"), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], position + done)
    return done


def _shards(plans: Mapping[str, TensorPlan], most: int) -> Sequence[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, plan in plans.items():
        if shards[-1] and size + plan.size > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += plan.size
    return shards


def _header(plans: Mapping[str, TensorPlan]) -> bytes:
    entries, position = {}, 0
    for name, plan in plans.items():
        entries[name] = {
            "dtype": plan.dtype,
            "shape": list(plan.shape),
            "data_offsets": [position, position + plan.size],
        }
        position += plan.size
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
