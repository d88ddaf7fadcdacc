"""A process's log on disk: appended to, rotated by size at line ends, readable by its owner alone."""

import io
import os
from pathlib import Path


class LogFile:
    """`path`, and older ones `path.1` (the youngest) and so on.

    Args:
        path: the file; its folder exists.
        max_bytes: a chunk that would make the file longer starts a new one.
        kept: older ones that are kept.
    """

    def __init__(self, path: Path, max_bytes: int = 8 << 20, kept: int = 3) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._kept = kept
        self._file: io.FileIO | None = None
        self._torn = False

    def write(self, chunk: bytes) -> None:
        """Append whole lines, or whatever a process wrote last.

        Raises:
            OSError: `chunk` is not in the log, or not all of it; what is written next begins on a line of its own.
        """
        file = self._room_for(len(chunk))
        rest = memoryview(b"\n" + chunk if self._torn else chunk)
        while rest:
            written = file.write(rest)
            self._torn = True
            rest = rest[written:]
        self._torn = False

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def last_lines(self, count: int) -> list[str]:
        """The newest `count` lines of the current file; none when there is no file."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 64 * 1024))
                return file.read(64 * 1024).decode(errors="replace").splitlines()[-count:]
        except FileNotFoundError:
            return []

    def _room_for(self, length: int) -> io.FileIO:
        """The open file; a new one when `length` more bytes would make it too long."""
        if self._file is None:
            self._file = self._open()
        if self._file.tell() and self._file.tell() + length > self._max_bytes:
            self._rotate()
            self.close()
            self._torn = False
            self._file = self._open()
        return self._file

    def _open(self) -> io.FileIO:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        file = io.FileIO(descriptor, "ab")
        file.seek(0, os.SEEK_END)
        return file

    def _rotate(self) -> None:
        """Make every file one older."""
        if not self._kept:
            self.path.unlink(missing_ok=True)
        for number in range(self._kept, 0, -1):
            older = self.path if number == 1 else self._numbered(number - 1)
            if older.exists():
                older.replace(self._numbered(number))

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")
