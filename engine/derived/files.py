"""A derived file: the bytes of tensors, each from a multiple of 64 on, then what they are as JSON, and its length.

It is written under another name, flushed to the disk and then renamed, so that a file under its own name is whole.
It is read once, into memory of the reader's own, and these very bytes are hashed: whatever happens to the file
afterwards, and whoever may write it, what is computed with is what was put on record.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.derived.location import UNFINISHED, Location
from engine.errors import EngineError
from kernels.native.memory import aligned_empty

_ALIGNED = 64
_CHUNK = 8 << 20
_LENGTH_BYTES = 8


class Content(NamedTuple):
    """What is in a derived file: its tensors, and what was said of them."""

    about: Mapping[str, Any]
    tensors: Sequence[Tensor]


class DerivedWriter:
    """A file on its way.

    Args:
        descriptor: of an empty file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._digest = hashlib.sha256()
        self._size = 0
        self._tensors: list[dict[str, Any]] = []

    def put(self, tensor: Tensor) -> int:
        """Write a tensor; its number.

        Raises:
            EngineError: DERIVED_UNSUPPORTED, its numbers do not lie side by side.
            OSError: it cannot be written.
        """
        order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride()[axis])
        dense = tensor.detach().permute(order)
        if not dense.is_contiguous():
            raise EngineError("DERIVED_UNSUPPORTED", "a prepared tensor has gaps")
        self._write(bytes(-self._size % _ALIGNED))
        self._tensors.append(
            {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "stride": list(tensor.stride()),
                "begin": self._size,
            }
        )
        if tensor.numel():
            self._write(dense.reshape(-1).view(torch.uint8).numpy().data)
        return len(self._tensors) - 1

    def finish(self, about: Mapping[str, Any]) -> tuple[str, int]:
        """Write what the tensors are, and see to it that all is on the disk; digest and size of the file."""
        content = json.dumps({"about": about, "tensors": self._tensors}).encode()
        self._write(content + len(content).to_bytes(_LENGTH_BYTES, "little"))
        os.fsync(self._descriptor)
        return self._digest.hexdigest(), self._size

    def _write(self, content: bytes | memoryview) -> None:
        view = memoryview(content)
        for first in range(0, len(view), _CHUNK):
            chunk = view[first : first + _CHUNK]
            self._digest.update(chunk)
            while chunk:
                chunk = chunk[os.write(self._descriptor, chunk) :]
        self._size += len(view)


@contextmanager
def writing(path: Path) -> Iterator[DerivedWriter]:
    """A file that appears under `path`, readable and no more, once the block has ended well; else nothing is left.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.unlink(missing_ok=True)  # of somebody who was killed
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    try:
        try:
            yield DerivedWriter(descriptor)
        finally:
            os.close(descriptor)
        unfinished.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_derived(location: Location) -> Content:
    """The file, in memory of its own that has been hashed.

    Raises:
        EngineError: DERIVED_MISSING; DERIVED_CHANGED, it is not the file that was put on record.
    """
    derived = location.derived
    if not derived.is_sound:
        raise EngineError("DERIVED_MISSING", "the deployment's derived file has no name of ours")
    try:
        descriptor = os.open(location.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise EngineError("DERIVED_MISSING", f"{location.path} cannot be opened: {error.strerror}") from error
    try:
        memory = _read(descriptor, location)
    except OSError as error:
        raise EngineError("DERIVED_MISSING", f"{location.path} cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return _parse(memory)


def _read(descriptor: int, location: Location) -> Tensor:
    """All bytes, once they are known to be those on record."""
    derived, found = location.derived, os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size != derived.size:
        raise _changed(location)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    memory = aligned_empty(derived.size)
    view, digest, position = memory.numpy().data, hashlib.sha256(), 0
    with ThreadPoolExecutor(1, "hash") as hashing:  # one piece is hashed while the next is read
        hashed: Future[None] | None = None
        while position < derived.size:
            count = os.preadv(descriptor, [view[position : position + _CHUNK]], position)
            if count == 0:
                raise _changed(location)
            if hashed is not None:
                hashed.result()
            hashed = hashing.submit(digest.update, view[position : position + count])
            position += count
    if digest.hexdigest() != derived.sha256:
        raise _changed(location)
    return memory


def _parse(memory: Tensor) -> Content:
    """Tensors over `memory`, whose bytes were written by `DerivedWriter`."""
    end = len(memory) - _LENGTH_BYTES
    length = int.from_bytes(bytes(memory[end:].numpy()), "little")
    described = json.loads(bytes(memory[end - length : end].numpy()))
    return Content(described["about"], [_tensor(memory, entry) for entry in described["tensors"]])


def _tensor(memory: Tensor, entry: Mapping[str, Any]) -> Tensor:
    dtype: torch.dtype = getattr(torch, entry["dtype"])
    size = dtype.itemsize
    for count in entry["shape"]:
        size *= count
    flat = memory[entry["begin"] : entry["begin"] + size].view(dtype)
    return flat.as_strided(entry["shape"], entry["stride"])


def _changed(location: Location) -> EngineError:
    return EngineError("DERIVED_CHANGED", f"{location.path} is not the file that was put on record")
