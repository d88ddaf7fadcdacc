"""The exact files of one model version, opened by digest; what is read is hashed and compared before it is used.

Size and SHA-256 are checked over the very buffers that are handed out, so a file changed after import is refused
however it was changed.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engine.errors import EngineError

OpenFile = Callable[[str], int]
"""Opens the object with this SHA-256 (hex) and returns a read-only file descriptor, which the caller closes."""

_CHUNK = 8 * 2**20


@dataclass(frozen=True, slots=True)
class File:
    """One file of a model.

    Attributes:
        path: relative path inside the model folder.
        size: bytes.
        sha256: hex digest, its name in the store.
    """

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class FileSet:
    """The exact files of one approved model version.

    Attributes:
        model_digest: SHA-256 of the signed manifest, hex.
        files: every file.
    """

    model_digest: str
    files: tuple[File, ...]

    def find(self, path: str) -> File | None:
        """The file with this path, None when there is none."""
        return next((file for file in self.files if file.path == path), None)

    def get(self, path: str) -> File:
        """The file with this path.

        Raises:
            EngineError: MODEL_FILE_MISSING.
        """
        file = self.find(path)
        if file is None:
            raise EngineError("MODEL_FILE_MISSING", f"the model has no {path}")
        return file

    def matching(self, suffix: str) -> Iterable[File]:
        """The files whose path ends with `suffix`, by path."""
        return sorted((file for file in self.files if file.path.endswith(suffix)), key=lambda file: file.path)


class Reading:
    """A file that is read once from front to back, and hashed as it is read."""

    def __init__(self, file: File, descriptor: int) -> None:
        self._file = file
        self._descriptor = descriptor
        self._position = 0
        self._digest = hashlib.sha256()

    def read(self, count: int) -> bytearray:
        """The next `count` bytes.

        Raises:
            EngineError: WEIGHTS_DIGEST_MISMATCH or FILE_DIGEST_MISMATCH; the file ends before them.
        """
        content = bytearray(count)
        view = memoryview(content)
        done = 0
        while done < count:
            chunk = view[done : done + _CHUNK]
            read = os.preadv(self._descriptor, [chunk], self._position)
            if read == 0:
                raise _changed(self._file)
            self._digest.update(chunk[:read])
            self._position += read
            done += read
        return content

    def finish(self) -> None:
        """Hash what has not been read, and compare.

        Raises:
            EngineError: as `read`; the file is longer, or its digest another.
        """
        while self._position < self._file.size:
            self.read(min(_CHUNK, self._file.size - self._position))
        surplus = os.pread(self._descriptor, 1, self._file.size)
        if surplus or self._digest.hexdigest() != self._file.sha256:
            raise _changed(self._file)


@contextmanager
def verified(file: File, open_file: OpenFile) -> Iterator[Reading]:
    """Read `file` piece by piece; what was read may be used once the block has ended without an error.

    If the block fails, the digest is still compared: that a file was changed says more than what the change broke.

    Raises:
        EngineError: WEIGHTS_DIGEST_MISMATCH (safetensors) or FILE_DIGEST_MISMATCH (the rest) when size or digest
            is not what the file set says.
    """
    descriptor = open_file(file.sha256)
    try:
        reading = Reading(file, descriptor)
        try:
            yield reading
        finally:
            reading.finish()
    finally:
        os.close(descriptor)


def read_verified(file: File, open_file: OpenFile) -> bytearray:
    """The whole content of `file`.

    Raises:
        EngineError: as `verified`.
    """
    with verified(file, open_file) as reading:
        return reading.read(file.size)


def _changed(file: File) -> EngineError:
    kind = "WEIGHTS" if file.path.endswith(".safetensors") else "FILE"
    return EngineError(
        f"{kind}_DIGEST_MISMATCH",
        f"{file.path} in the store is not the file that was approved; import the bundle again",
    )
