"""Watches what a program reads from a file and what it opens for writing, by the calls it makes."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

_READS = ("read", "pread", "readv", "preadv")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Which arguments of an event are names that it makes, moves or removes.
_CHANGES = {
    "os.mkdir": (0, 1),
    "os.rename": (0, 2),
    "os.link": (1, 2),
    "os.symlink": (1, 2),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.truncate": (0, 1),
}


class Medium:
    """Counts the bytes that calls of `os` take from files below a folder while it is entered.

    Attributes:
        bytes_read: so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = f"{os.path.realpath(folder)}/"
        self._real: dict[str, Any] = {}
        self.bytes_read = 0

    def __enter__(self) -> Self:
        for name in _READS:
            self._real[name] = getattr(os, name)
            setattr(os, name, self._counted(self._real[name]))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def check(self) -> None:
        """Called before a read; may raise."""

    def _counted(self, real: Any) -> Any:
        def counted(fd: int, *args: Any) -> Any:
            watched = os.readlink(f"/proc/self/fd/{fd}").startswith(self._folder)
            if watched:
                self.check()
            result = real(fd, *args)
            if watched:
                self.bytes_read += result if isinstance(result, int) else len(result)
            return result

        return counted


class Pulled(Medium):
    """A medium that is pulled once so many bytes were read: every read fails as Linux has it fail."""

    def __init__(self, folder: Path, after: int) -> None:
        super().__init__(folder)
        self._after = after

    def check(self) -> None:
        if self.bytes_read >= self._after:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))


_watching: list[list[Path]] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if (
        event == "open"
        and isinstance(args[0], str | bytes)
        and args[0] != os.devnull
        and (args[2] or 0) & _WRITING
    ):
        _watching[-1].append(Path(os.fsdecode(args[0])))
    elif event in _CHANGES:
        named = (name for name in args[slice(*_CHANGES[event])] if not isinstance(name, int))
        _watching[-1].extend(Path(os.fsdecode(name)) for name in named)


_hooked: list[bool] = []


@contextmanager
def changes() -> Iterator[list[Path]]:
    """Every path that this process opens for writing, makes, moves or removes, wherever it is.

    A name that a call takes beside a folder's descriptor stays relative.
    """
    if not _hooked:
        sys.addaudithook(_hook)  # for good: Python takes none back
        _hooked.append(True)
    found: list[Path] = []
    _watching.append(found)
    try:
        yield found
    finally:
        _watching.remove(found)
