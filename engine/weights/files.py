"""The exact files of one model version, opened by digest; what is read is hashed and compared before it is used.

Size and SHA-256 are checked over the very buffer that is handed out, so a file changed after import is refused
however it was changed.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
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


def read_verified(file: File, open_file: OpenFile) -> bytearray:
    """The whole content of `file`.

    Raises:
        EngineError: WEIGHTS_DIGEST_MISMATCH (safetensors) or FILE_DIGEST_MISMATCH (the rest) when size or digest
            is not what the file set says.
    """
    content = bytearray(file.size)
    digest = hashlib.sha256()
    view = memoryview(content)
    descriptor = open_file(file.sha256)
    try:
        position = 0
        while position < file.size:
            count = os.preadv(descriptor, [view[position : position + _CHUNK]], position)
            if count == 0:
                break
            digest.update(view[position : position + count])
            position += count
        surplus = os.pread(descriptor, 1, file.size)
    finally:
        os.close(descriptor)
    if position != file.size or surplus or digest.hexdigest() != file.sha256:
        raise _changed(file)
    return content


def _changed(file: File) -> EngineError:
    kind = "WEIGHTS" if file.path.endswith(".safetensors") else "FILE"
    return EngineError(
        f"{kind}_DIGEST_MISMATCH",
        f"{file.path} in the store is not the file that was approved; import the bundle again",
    )
