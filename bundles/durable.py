"""Files that are complete or absent, whatever moment the power goes.

`Fs` is the one way by which the importer changes its disk, transactions of store.db included, so that a test can
die at any of its calls and look at what is left.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


class Fs:
    """The calls that change a disk, as the operating system has them; the rest is made of these."""

    def create(self, path: Path, mode: int = 0o600) -> int:
        """A descriptor to write `path`, made or emptied; it is no link."""
        return os.open(path, _CREATE, mode)

    def pwrite(self, fd: int, block: bytes | memoryview, offset: int) -> int:
        """Write some of `block`; how much."""
        return os.pwrite(fd, block, offset)

    def truncate(self, path: Path, size: int) -> None:
        """Cut a file to so many bytes."""
        os.truncate(path, size)

    def fdatasync(self, fd: int) -> None:
        """Make an open file's content durable."""
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        """Make an open file, its mode included, or an open folder's names durable."""
        os.fsync(fd)

    def fchmod(self, fd: int, mode: int) -> None:
        """Change an open file's mode."""
        os.fchmod(fd, mode)

    def link(self, path: Path, other: Path) -> None:
        """Give a file a second name."""
        os.link(path, other, follow_symlinks=False)

    def rename(self, path: Path, other: Path) -> None:
        """Give a file another name, replacing what has it."""
        os.rename(path, other)

    def mkdir(self, path: Path) -> None:
        """Make a folder of this user's own."""
        os.mkdir(path, 0o700)

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

    def commit(self, database: sqlite3.Connection) -> None:
        """End a transaction durably."""
        database.execute("COMMIT")

    def write(self, fd: int, block: bytes | memoryview, offset: int = 0) -> None:
        """Write all of `block`."""
        view = memoryview(block)
        done = 0
        while done < len(view):
            done += self.pwrite(fd, view[done:], offset + done)

    def write_file(self, path: Path, content: bytes, mode: int = 0o644) -> None:
        """Replace `path` by `content`, durably."""
        temporary = _temporary(path)
        fd = self.create(temporary, mode)
        try:
            self.write(fd, content)
            self.fsync(fd)
            self.rename(temporary, path)
        except Exception:
            with suppress(OSError):
                self.unlink(temporary)
            raise
        finally:
            os.close(fd)
        self.sync_folder(path.parent)

    def make_folder(self, path: Path) -> None:
        """Make a folder in one that exists, durably; nothing when it is there."""
        if not path.is_dir():
            self.mkdir(path)
            self.sync_folder(path.parent)

    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.fsync(fd)
        finally:
            os.close(fd)

    def remove_tree(self, folder: Path) -> None:
        """Remove a folder and all in it, following no link; nothing when it is not there."""
        if not folder.is_dir():
            return
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                self.remove_tree(path)
            else:
                self.unlink(path)
        self.rmdir(folder)


DISK = Fs()


def is_temporary(path: Path) -> bool:
    """Whether a process that died while it replaced a file left this."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A stream whose content becomes `path`, whole, when the block ends without an error; else nothing changes."""
    temporary = _temporary(path)
    fd = DISK.create(temporary, mode)
    try:
        with open(fd, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    DISK.sync_folder(path.parent)


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `content`, durably."""
    DISK.write_file(path, content, mode)
