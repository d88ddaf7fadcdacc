"""The model store: files by digest, records by model name, and a staging area whose content nobody believes.

    sha256/ab/HEX              a file, read-only, complete and named by what it is
    models/NAME/SEQUENCE.json  a committed version, for people and for repair; store.db decides
    staging/IMPORT/N           files of a running import; swept at start

Nothing appears under its final name before its bytes are on the disk.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from bundles.durable import sync_folder, write_file
from bundles.format.errors import BundleError
from bundles.format.manifest import File

_BLOCK = 4 * 1024 * 1024
_SPARE = 64 * 1024 * 1024


class Store:
    """The folder `store/` of a home directory; this process is its one writer.

    Args:
        root: made when absent.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in (root, root / "sha256", root / "models", root / "staging"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_folder(root)

    def path_of(self, digest: str) -> Path:
        """Where the file with this SHA-256 is or would be."""
        return self.root / "sha256" / digest[:2] / digest

    def whole(self, digests: Iterable[str], read: Callable[[int], None]) -> bool:
        """Whether every file is there and its content is what its name says; all of them are read for that.

        Args:
            digests: of the files.
            read: is told the bytes of each block that was read; may raise.
        """
        return all(self._is_sound(digest, read) for digest in dict.fromkeys(digests))

    def _is_sound(self, digest: str, read: Callable[[int], None]) -> bool:
        content = hashlib.sha256()
        try:
            with self.path_of(digest).open("rb", buffering=0) as file:
                while block := file.read(_BLOCK):
                    content.update(block)
                    read(len(block))
        except OSError:  # absent, or the disk cannot read it any more
            return False
        return content.hexdigest() == digest

    def sweep(self, committed: Iterable[tuple[str, int]]) -> None:
        """Remove what a process that died left behind: all staging, and records of versions not `committed`."""
        shutil.rmtree(self.root / "staging")
        (self.root / "staging").mkdir(mode=0o700)
        keep = {self.record_path(name, sequence) for name, sequence in committed}
        for path in (self.root / "models").glob("*/*"):
            if path not in keep:
                path.unlink()

    def check_space(self, needed: int) -> None:
        """Refuse an import that would not fit.

        Raises:
            BundleError: STORE_SPACE.
        """
        free = os.statvfs(self.root)
        available = free.f_bavail * free.f_frsize
        if needed + _SPARE > available:
            raise BundleError("STORE_SPACE", f"the model needs {needed} bytes, the store has {available} free")

    def record_path(self, name: str, sequence: int) -> Path:
        """Where a committed version's record is."""
        return self.root / "models" / name / f"{sequence}.json"

    def write_record(self, name: str, sequence: int, record: Mapping[str, object]) -> None:
        """Write a version's record, durably."""
        path = self.record_path(name, sequence)
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o700)
            sync_folder(path.parent.parent)
        write_file(path, json.dumps(record, indent=1).encode() + b"\n", 0o444)


class Staging:
    """One import's files until they are published; a `pipeline.Sink`.

    Args:
        store: where they go.
        import_id: names the staging folder.
    """

    def __init__(self, store: Store, import_id: str) -> None:
        self._store = store
        self._folder = store.root / "staging" / import_id
        self._folder.mkdir(mode=0o700)
        self._current = -1
        self._open: dict[str, tuple[int, int]] = {}
        self._staged: dict[Path, str] = {}

    def begin(self, file: File) -> None:
        """See `pipeline.Sink`."""
        self._current = os.open(
            self._next(file.sha256), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )

    def write(self, offset: int, block: memoryview) -> None:
        """See `pipeline.Sink`."""
        done = 0
        while done < len(block):
            done += os.pwrite(self._current, block[done:], offset + done)

    def end(self, file: File) -> None:
        """See `pipeline.Sink`."""
        os.fdatasync(self._current)
        self._close_current()
        path = next(reversed(self._staged))
        self._open[file.path] = (os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), file.size)

    def keep(self, digest: str, content: bytes) -> None:
        """See `pipeline.Sink`."""
        with open(self._next(digest), "xb") as stream:
            stream.write(content)

    def files(self) -> Mapping[str, tuple[int, int]]:
        """See `pipeline.Sink`."""
        return self._open

    def publish(self) -> None:
        """Give every staged file its final name, durably; equal files share one."""
        folders = set()
        for path, digest in self._staged.items():
            final = self._store.path_of(digest)
            if not final.parent.is_dir():
                final.parent.mkdir(mode=0o700)
                folders.add(final.parent.parent)
            _seal(path)
            os.rename(path, final)
            folders.add(final.parent)
        for folder in sorted(folders):
            sync_folder(folder)

    def close(self) -> None:
        """Forget everything that was not published."""
        self._close_current()
        for fd, _ in self._open.values():
            os.close(fd)
        self._open.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _next(self, digest: str) -> Path:
        path = self._folder / str(len(self._staged))
        self._staged[path] = digest
        return path

    def _close_current(self) -> None:
        if self._current >= 0:
            os.close(self._current)
        self._current = -1


def _seal(path: Path) -> None:
    """Make a staged file read-only and durable."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(fd, 0o444)
        os.fsync(fd)
    finally:
        os.close(fd)
