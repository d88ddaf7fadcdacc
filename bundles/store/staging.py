"""One model's files until they are published, kept over a crash or a cancelled import for the next one.

What is recorded of a file is on the disk: a record follows the fdatasync of the bytes it speaks of, and their
digests. So a resumed import believes the record, reads none of those bytes from the medium, and hashes again only
the beginning of the file that was being written, and files that it shares with the store by a second name.

It believes no record that the store speaks against: a file that is damaged there, or that something else took the
place of, is hashed once more before it is published.
"""

import os
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from bundles import direct
from bundles.content.files import FolderFiles, ModelFiles
from bundles.format.errors import BundleError
from bundles.format.manifest import File, Manifest
from bundles.pipeline import Sink
from bundles.store.files import Store

SYNC_INTERVAL = 256 * 1024 * 1024
"""Bytes of a file that may be on their way to the disk and not recorded: what a resumed import reads again."""

_MOST_PENDING = 256


class Records(Protocol):
    """Remembers by model digest how many bytes of each file, by its place in the manifest, are staged."""

    def staged(self, model_digest: str) -> dict[int, int]:
        """What was recorded."""

    def stage(self, model_digest: str, sizes: Mapping[int, int]) -> None:
        """Record more."""

    def unstage(self, model_digest: str, positions: Iterable[int]) -> None:
        """Forget these files."""


class Staging(Sink):
    """The sink of an import; `open` it once the model is known.

    Args:
        store: where its files go.
        records: what is durable.
        interval: bytes between records.
    """

    def __init__(self, store: Store, records: Records, interval: int = SYNC_INTERVAL) -> None:
        self._store, self._fs, self._records, self._interval = store, store.fs, records, interval
        self._model_digest = ""
        self._folder = Path()
        self._recorded: dict[int, int] = {}
        self._pending: dict[int, int] = {}
        self._grown = 0
        self._fd, self._synced = -1, 0
        self._disk: direct.Direct | None = None
        self._syncing: set[int] = set()
        self._digests: dict[Path, str] = {}
        self._believed: dict[Path, int] = {}
        self._positions: dict[str, int] = {}
        self._names: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._files: FolderFiles | None = None

    def open(self, model_digest: str) -> None:
        """Take up what is staged of this model, or begin."""
        self._model_digest = model_digest
        self._folder = self._store.root / "staging" / model_digest
        self._fs.make_folder(self._folder)
        self._recorded = self._records.staged(model_digest)
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._files = FolderFiles(folder, self._names, self._sizes)

    def needed(self, manifest: Manifest) -> int:
        """Bytes that are still to be written of this model."""
        return sum(
            file.size - min(file.size, self._recorded.get(position, 0))
            for position, file in enumerate(manifest.files)
            if not self._store.has(file.sha256, file.size)
        )

    def begin(self, file: File, told: Callable[[int], None]) -> int:
        """See `pipeline.Sink`: a file that is staged, or whole in the store, needs nothing from the medium."""
        position = len(self._positions)
        path = self._folder / str(position)
        self._positions[file.path] = position
        self._names[file.path], self._sizes[file.path] = path.name, file.size
        self._digests[path] = file.sha256
        self._synced = held = self._usable(path, file, self._recorded.get(position, 0))
        if held and held == file.size:
            self._believed[path] = position
            return held
        if file.size and self._take_from_store(file, path, told):
            self._believed[path] = position
            self.settled(file, file.size)
            return file.size
        if held < self._recorded.get(position, 0):
            self._forget(position)  # first: it must not speak of what is written now
        if held:
            self._fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        else:
            self._clear(path)
            self._fd = self._fs.create(path)
        self._disk = direct.writing(self._fd, self._fs.pwrite)
        return held

    def held(self, offset: int, buffer: memoryview) -> int:
        """See `pipeline.Sink`."""
        return os.preadv(self._fd, [buffer], offset)

    def write(self, offset: int, block: memoryview) -> None:
        """See `pipeline.Sink`."""
        if self._disk is None:
            raise RuntimeError("no file has begun")
        done = 0
        while done < len(block):
            done += self._disk.transfer(block[done:], offset + done)

    def checkpoint(self, size: int, *, pause: bool) -> Callable[[], None] | None:
        """See `pipeline.Sink`."""
        path = next(reversed(self._sizes))
        last = size == self._sizes[path]
        if not last and (size == self._synced or (not pause and size - self._synced < self._interval)):
            return None
        fd, begin, self._synced = self._fd, self._synced, size
        if last:
            self._fd = -1
            self._syncing.add(fd)

        def sync() -> None:
            self._fs.fdatasync(fd)
            # What is on the disk is not needed in memory: a model of 140 GB must not push out what others use.
            os.posix_fadvise(fd, begin, size - begin, os.POSIX_FADV_DONTNEED)
            if last:
                self._syncing.discard(fd)
                os.close(fd)

        return sync

    def settled(self, file: File, size: int) -> None:
        """See `pipeline.Sink`."""
        position = self._positions[file.path]
        self._grown += size - max(self._pending.get(position, 0), self._recorded.get(position, 0))
        self._pending[position] = size
        if size < file.size or self._grown >= self._interval or len(self._pending) >= _MOST_PENDING:
            self._record()

    def keep(self, digest: str, content: bytes) -> None:
        """See `pipeline.Sink`."""
        path = self._folder / f"document-{digest}"
        self._clear(path)
        fd = self._fs.create(path)
        try:
            self._fs.write(fd, content)
        finally:
            os.close(fd)
        self._digests[path] = digest

    def files(self) -> ModelFiles:
        """See `pipeline.Sink`."""
        if self._files is None:
            raise RuntimeError("no model is staged")
        return self._files

    def publish(self, damaged: Collection[str] = ()) -> None:
        """Give every file its final name, durably; equal files share one.

        Args:
            damaged: digests of what the store is known to have lost.

        Raises:
            BundleError: STAGING_DAMAGED; the next import takes that file from the medium.
        """
        self._record()
        wanted = [path for path in self._digests if self._is_wanted(path, damaged)]
        folders = {self._store.adopt(path, self._digests[path]) for path in wanted}
        for folder in sorted(folders):
            self._fs.sync_folder(folder)

    def discard(self) -> None:
        """Remove all that is staged of the model."""
        if self._model_digest:
            self._fs.remove_tree(self._folder)

    def close(self) -> None:
        """Close what is open; what is durable stays for a next time, and is recorded."""
        for fd in {self._fd, *self._syncing} - {-1}:
            os.close(fd)
        self._fd = -1
        self._syncing.clear()
        if self._files is not None:
            self._files.close()
            self._files = None

    def trim(self) -> None:
        """Free what no record will speak of, once it is closed: a full disk has room for the records then."""
        if self._model_digest:
            self._store.trim(self._model_digest, {**self._recorded, **self._pending})

    def record(self) -> None:
        """Record what is durable and was not recorded yet."""
        if self._folder.is_dir():
            self._record()

    def _record(self) -> None:
        if self._pending:
            self._fs.sync_folder(self._folder)
            self._records.stage(self._model_digest, self._pending)
            self._recorded.update(self._pending)
            self._pending, self._grown = {}, 0

    def _is_wanted(self, path: Path, damaged: Collection[str]) -> bool:
        """Whether the store is to have a file from staging; what its record vouches for is hashed if in doubt."""
        digest, position = self._digests[path], self._believed.get(path)
        if position is None or (digest not in damaged and self._store.trusts(path, digest)):
            return True
        try:
            return self._store.choose(path, digest)
        except BundleError:
            self._forget(position)
            raise

    def _forget(self, position: int) -> None:
        """Nothing of this file is staged."""
        self._records.unstage(self._model_digest, [position])
        self._recorded.pop(position, None)

    def _usable(self, path: Path, file: File, recorded: int) -> int:
        """How much of what is recorded is there; nothing of what is the store's too."""
        try:
            status = path.lstat()
        except OSError:
            return 0
        if not stat.S_ISREG(status.st_mode) or not recorded <= status.st_size <= file.size:
            return 0
        if status.st_nlink > 1 or (recorded < file.size and not status.st_mode & stat.S_IWUSR):
            return 0
        return recorded

    def _take_from_store(self, file: File, path: Path, told: Callable[[int], None]) -> bool:
        """Take a file that the store has, if it is what its name says; a second name of it holds it."""
        if not self._store.has(file.sha256, file.size) or self._store.finding(file.sha256, told):
            return False
        self._clear(path)
        try:
            self._fs.link(self._store.path_of(file.sha256), path)
        except OSError:  # removed at this moment, or on a disk without links
            return False
        return True

    def _clear(self, path: Path) -> None:
        """Never write into what is there: it may be the store's own file by a second name."""
        with suppress(FileNotFoundError):
            self._fs.unlink(path)
