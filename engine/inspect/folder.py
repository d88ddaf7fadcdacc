"""A model's files as whoever asks for a verdict hands them over: copies in one sealed piece of memory.

The question is one JSON object on standard input, {"kind": "model", "fd": 5, "files": [{"path": "config.json",
"size": 612, "offset": 0, "length": 612}, ...]}. Every file is listed; of weights only the header is there, and of
what this process does not read, nothing.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from engine.errors import EngineError

KINDS = ("model", "adapter")
_CHUNK = 8 << 20


class Entry(NamedTuple):
    """A file: its path and size, and the bytes of its beginning that are in the memory, from `offset` on."""

    path: str
    size: int
    offset: int
    length: int


class Folder:
    """The files of one model or adapter.

    Args:
        fd: descriptor of the memory that holds them.
        entries: what is where.
    """

    def __init__(self, fd: int, entries: Sequence[Entry]) -> None:
        self._fd = fd
        self._entries = {entry.path: entry for entry in entries}

    @property
    def paths(self) -> list[str]:
        """Every path, sorted."""
        return sorted(self._entries)

    def matching(self, suffix: str) -> Iterator[str]:
        """The paths that end with `suffix`, sorted."""
        return (path for path in self.paths if path.lower().endswith(suffix))

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return self._entries[path].size

    def head(self, path: str, length: int) -> bytes:
        """The first `length` bytes of a file, or as many as were handed over."""
        entry = self._entries[path]
        parts: list[bytes] = []
        position, end = entry.offset, entry.offset + min(length, entry.length)
        while position < end and (part := os.pread(self._fd, min(_CHUNK, end - position), position)):
            parts.append(part)
            position += len(part)
        return b"".join(parts)

    def read(self, path: str, limit: int) -> bytes | None:
        """A whole file; None when there is none.

        Raises:
            EngineError: FILE_TOO_LARGE; INVALID_QUESTION, it was not handed over.
        """
        if path not in self._entries:
            return None
        entry = self._entries[path]
        if entry.size > limit:
            raise EngineError("FILE_TOO_LARGE", f"{path} has {entry.size} bytes; {limit} are allowed")
        if entry.length != entry.size:
            raise EngineError("INVALID_QUESTION", f"{path} was not handed over")
        return self.head(path, limit)


@dataclass(frozen=True)
class Question:
    """What is asked: whether these files are a sound model or adapter."""

    kind: str
    folder: Folder


def read_question(source: BinaryIO) -> Question:
    """The question on standard input.

    Raises:
        EngineError: INVALID_QUESTION.
    """
    try:
        question: dict[str, Any] = json.loads(source.read())
        fd = int(question["fd"])
        size = os.fstat(fd).st_size
        entries = [_entry(file, size) for file in question["files"]]
        if question["kind"] not in KINDS:
            raise ValueError("unknown kind")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise EngineError("INVALID_QUESTION", "standard input is no question about files") from error
    return Question(question["kind"], Folder(fd, entries))


def _entry(value: dict[str, Any], limit: int) -> Entry:
    entry = Entry(str(value["path"]), int(value["size"]), int(value["offset"]), int(value["length"]))
    if not 0 <= entry.length <= entry.size or not 0 <= entry.offset <= limit - entry.length:
        raise ValueError("a file beyond the memory")
    return entry
