"""A model's files as open descriptors, handed over by whoever asks for a verdict.

The question is one JSON object on standard input, {"files": [{"path": "config.json", "fd": 5}, ...]}; the
descriptors are inherited and read-only.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from engine.errors import EngineError

_CHUNK = 8 << 20


class Folder:
    """The files of one model.

    Args:
        descriptors: open file descriptors by path.
    """

    def __init__(self, descriptors: Mapping[str, int]) -> None:
        self._descriptors = dict(descriptors)

    @property
    def paths(self) -> list[str]:
        """Every path, sorted."""
        return sorted(self._descriptors)

    def matching(self, suffix: str) -> Iterator[str]:
        """The paths that end with `suffix`, sorted."""
        return (path for path in self.paths if path.endswith(suffix))

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return os.fstat(self._descriptors[path]).st_size

    def head(self, path: str, length: int) -> bytes:
        """The first `length` bytes of a file, or as many as there are."""
        parts: list[bytes] = []
        position = 0
        while position < length:
            part = os.pread(self._descriptors[path], min(_CHUNK, length - position), position)
            if not part:
                break
            parts.append(part)
            position += len(part)
        return b"".join(parts)

    def read(self, path: str, limit: int) -> bytes | None:
        """A whole file; None when there is none.

        Raises:
            EngineError: FILE_TOO_LARGE.
        """
        if path not in self._descriptors:
            return None
        if self.size(path) > limit:
            raise EngineError("FILE_TOO_LARGE", f"{path} has {self.size(path)} bytes; {limit} are allowed")
        return self.head(path, limit)


def read_folder(source: BinaryIO) -> Folder:
    """The folder that a question names.

    Raises:
        EngineError: INVALID_QUESTION.
    """
    try:
        question = json.loads(source.read())
        files = {str(file["path"]): int(file["fd"]) for file in question["files"]}
        for descriptor in files.values():
            os.fstat(descriptor)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise EngineError("INVALID_QUESTION", "standard input names no open files") from error
    return Folder(files)
