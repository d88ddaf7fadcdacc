"""A disk that dies at its n-th change, and may forget then what was never made durable, as a power cut does."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bundles.durable import Fs

CHANGES = (
    "create",
    "pwrite",
    "truncate",
    "fdatasync",
    "fsync",
    "fchmod",
    "link",
    "rename",
    "mkdir",
    "unlink",
    "rmdir",
    "commit",
)


class Died(BaseException):
    """The process would be gone: nothing may catch this and go on."""


class DyingFs(Fs):
    """Lets so many changes through once it is armed, then none."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._left: int | None = None
        self._lock = threading.Lock()

    def arm(self, left: int) -> None:
        self._left = left

    def change(self, name: str) -> None:
        with self._lock:
            if self._left is not None:
                if self._left <= 0:
                    raise Died(name)
                self._left -= 1
                self.calls.append(name)


def _counted(name: str) -> Callable[..., Any]:
    real = getattr(Fs, name)

    def call(self: DyingFs, *arguments: Any) -> Any:
        self.change(name)
        return real(self, *arguments)

    return call


for _name in CHANGES:
    setattr(DyingFs, _name, _counted(_name))


class PowerCutFs(DyingFs):
    """Forgets, when the power is cut, all bytes and names that were not synced: the worst a disk may do.

    A name is durable once its folder is synced, bytes once their file is. Transactions are store.db's own affair.
    """

    def __init__(self, spare: Path) -> None:
        super().__init__()
        self._spare = spare
        self._spares = 0
        self._names: list[tuple[int, Callable[[], None]]] = []
        self._bytes: dict[int, list[tuple[int, int, int]]] = {}

    def create(self, path: Path, mode: int = 0o600) -> int:
        is_new = not path.exists()
        fd = super().create(path, mode)
        if is_new:
            self._names.append((_inode(path.parent), lambda: path.unlink()))
        return fd

    def pwrite(self, fd: int, block: bytes | memoryview, offset: int) -> int:
        done = super().pwrite(fd, block, offset)
        with self._lock:
            self._bytes.setdefault(os.fstat(fd).st_ino, []).append((os.dup(fd), offset, done))
        return done

    def fdatasync(self, fd: int) -> None:
        super().fdatasync(fd)
        self._settle(fd)

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        self._settle(fd)

    def link(self, path: Path, other: Path) -> None:
        super().link(path, other)
        self._names.append((_inode(other.parent), lambda: other.unlink()))

    def rename(self, path: Path, other: Path) -> None:
        before = self._keep(other) if other.exists() else None
        super().rename(path, other)

        def undo() -> None:
            os.rename(other, path)
            if before is not None:
                os.rename(before, other)

        self._names.append((_inode(other.parent), undo))

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self._names.append((_inode(path.parent), lambda: Fs().remove_tree(path)))

    def unlink(self, path: Path) -> None:
        kept = self._keep(path)
        folder = _inode(path.parent)
        super().unlink(path)
        self._names.append((folder, lambda: os.rename(kept, path)))

    def cut(self) -> None:
        """The power goes."""
        for written in self._bytes.values():
            for fd, offset, size in written:
                os.pwrite(fd, bytes(size), offset)
        for _, undo in reversed(self._names):
            with suppress(FileNotFoundError):
                undo()

    def close(self) -> None:
        for written in self._bytes.values():
            for fd, _, _ in written:
                os.close(fd)

    def _settle(self, fd: int) -> None:
        with self._lock:
            inode = os.fstat(fd).st_ino
            for held, _, _ in self._bytes.pop(inode, []):
                os.close(held)
            self._names = [name for name in self._names if name[0] != inode]

    def _keep(self, path: Path) -> Path:
        """A second name, outside, of what a change hides."""
        self._spares += 1
        kept = self._spare / str(self._spares)
        os.link(path, kept)
        return kept


def _inode(path: Path) -> int:
    return path.stat().st_ino
