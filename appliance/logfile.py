"""A process's log on disk: appended to, rotated by size at line ends, readable by its owner alone."""

import os
from pathlib import Path

_MAX_BYTES = 8 * 1024 * 1024
_KEPT = 3


class LogFile:
    """`path`, and up to three older ones `path.1` to `path.3`.

    Args:
        path: the file; its folder exists.
        max_bytes: a chunk that would make the file longer starts a new one.
    """

    def __init__(self, path: Path, max_bytes: int = _MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._open()

    def write(self, chunk: bytes) -> None:
        """Append whole lines, or whatever a process wrote last."""
        if self._file.tell() and self._file.tell() + len(chunk) > self._max_bytes:
            self._rotate()
        self._file.write(chunk)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def last_lines(self, count: int) -> list[str]:
        """The newest `count` lines of the current file."""
        with self.path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 64 * 1024))
            return file.read().decode(errors="replace").splitlines()[-count:]

    def _open(self) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "ab", buffering=0)
        self._file.seek(0, os.SEEK_END)

    def _rotate(self) -> None:
        self._file.close()
        for number in range(_KEPT, 0, -1):
            older = self.path if number == 1 else self._numbered(number - 1)
            if older.exists():
                older.replace(self._numbered(number))
        self._open()

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")
