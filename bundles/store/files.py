"""The store's files: each under its digest, read-only, there once however many versions list it.

    sha256/ab/HEX              a file, complete and named by what it is
    models/NAME/SEQUENCE.json  a committed version, for people; store.db decides
    staging/MODEL_DIGEST/N     files of an import that runs or was interrupted
    staging/MODEL_DIGEST/head  its bundle's head, to go on without the first volume

Nothing appears under its final name before its bytes are on the disk.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bundles import direct
from bundles.durable import DISK, Fs
from bundles.format.errors import BundleError

CHANGED, ABSENT, UNREADABLE = "changed", "absent", "unreadable"
HEAD = "head"
"""In a staging folder: a copy of the bundle's head."""
_BLOCK = 4 * 1024 * 1024
_SPARE = 64 * 1024 * 1024


class Usage(NamedTuple):
    """Bytes and number of the store's files, each counted once."""

    bytes: int
    files: int


class Store:
    """The folder `store/` of a home directory; this process is its one writer.

    Args:
        root: made when absent; its parent is there.
        fs: how it is written.
        quota: most bytes it may hold, staging included; 0 for no such limit.
    """

    def __init__(self, root: Path, fs: Fs = DISK, quota: int = 0) -> None:
        self.root = root
        self.fs = fs
        self.quota = quota
        for folder in (root, root / "sha256", root / "models", root / "staging"):
            fs.make_folder(folder)

    def path_of(self, digest: str) -> Path:
        """Where the file with this SHA-256 is or would be."""
        return self.root / "sha256" / digest[:2] / digest

    def staging(self, model_digest: str) -> Path:
        """The folder of what is staged of a model."""
        return self.root / "staging" / model_digest

    def has(self, digest: str, size: int) -> bool:
        """Whether there is a file under this digest, and of this size; its content is another question."""
        try:
            return self.path_of(digest).lstat().st_size == size
        except OSError:
            return False

    def finding(self, digest: str, read: Callable[[int], None]) -> str:
        """What is wrong with a file: changed, absent or unreadable; empty when it is what its name says.

        It is read from the disk where nothing has it mapped: pages in memory say nothing about rot. They are given
        back, so that terabytes do not push out what others need.

        Args:
            digest: of the file.
            read: is told the bytes of each block that was read; may raise.
        """
        return _finding(self.path_of(digest), digest, read)

    def trusts(self, staged: Path, digest: str) -> bool:
        """Whether nothing in the store speaks against a complete file in staging: no other is in its place."""
        try:
            return os.path.samestat(staged.lstat(), self.path_of(digest).lstat())
        except FileNotFoundError:
            return True

    def choose(self, staged: Path, digest: str) -> bool:
        """Whether a file in staging is to be the store's, once both were read: not where the store's is sound.

        Raises:
            BundleError: STAGING_DAMAGED, neither is.
        """
        if not _finding(staged, digest, lambda _: None):
            return True
        if not self.finding(digest, lambda _: None):
            return False
        raise BundleError(
            "STAGING_DAMAGED",
            f"a file that was staged has changed on the disk ({digest[:12]}..); import the bundle again, and it "
            "comes from the medium",
        )

    def whole(self, digests: Iterable[str], read: Callable[[int], None]) -> bool:
        """Whether every file is there and is what its name says; they are read up to the first that is not.

        Args:
            digests: of the files.
            read: as in `finding`.
        """
        return not any(self.finding(digest, read) for digest in dict.fromkeys(digests))

    def adopt(self, staged: Path, digest: str) -> Path:
        """Give a complete file its final name, in place of what had it; the folder whose names are to be synced.

        It keeps its name in staging, so that a crash before the commit costs an import nothing.
        """
        final = self.path_of(digest)
        self.fs.make_folder(final.parent)
        fd = os.open(staged, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self.fs.fchmod(fd, 0o444)
            self.fs.fsync(fd)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), final.lstat()):
                    return final.parent
        finally:
            os.close(fd)
        temporary = final.with_name(f".{digest}.tmp")
        with suppress(FileNotFoundError):
            self.fs.unlink(temporary)
        self.fs.link(staged, temporary)
        self.fs.rename(temporary, final)
        return final.parent

    def remove(self, digests: Iterable[str]) -> int:
        """Delete files that nothing lists; the bytes that are free then."""
        freed = 0
        for digest in sorted(digests):
            path = self.path_of(digest)
            with suppress(FileNotFoundError):
                freed += path.lstat().st_size
                self.fs.unlink(path)
        return freed

    def sweep(self, listed: frozenset[str], committed: Iterable[tuple[str, int]], staged: frozenset[str]) -> int:
        """Remove what a process that died left behind; the bytes of the files.

        Args:
            listed: digests of files that versions have.
            committed: name and sequence of the versions.
            staged: model digests whose staging is kept.
        """
        keep = {self.record_path(name, sequence) for name, sequence in committed}
        for path in self.records():
            if path not in keep:
                self.fs.unlink(path)
        freed = 0
        for path in (self.root / "sha256").glob("*/*"):
            if path.name not in listed:
                freed += path.lstat().st_size
                self.fs.unlink(path)
        for folder in (self.root / "staging").iterdir():
            if folder.name not in staged:
                self.fs.remove_tree(folder)
        return freed

    def trim(self, model_digest: str, recorded: Mapping[int, int]) -> None:
        """Free what is staged of a model beyond its records: no import goes on from there.

        Args:
            model_digest: of the model.
            recorded: durable bytes by a file's place in the manifest.
        """
        for path in (self.root / "staging" / model_digest).glob("*"):
            size = recorded.get(int(path.name)) if path.name.isdecimal() else None
            if path.name == HEAD:
                continue
            if size is None:
                self.fs.unlink(path)
            elif path.lstat().st_nlink == 1 and path.lstat().st_size > size:
                self.fs.truncate(path, size)

    def usage(self) -> Usage:
        """What its files take."""
        sizes = [entry.lstat().st_size for entry in (self.root / "sha256").glob("*/*")]
        return Usage(sum(sizes), len(sizes))

    def staged_bytes(self, model_digest: str = "*") -> int:
        """Bytes in staging, of one model or all, that are not the store's as well."""
        found = [path.lstat() for path in (self.root / "staging").glob(f"{model_digest}/*")]
        return sum(status.st_size for status in found if status.st_nlink == 1)

    def free_bytes(self) -> int:
        """Bytes free on its disk."""
        free = os.statvfs(self.root)
        return free.f_bavail * free.f_frsize

    def check_space(self, needed: int, promised: int = 0) -> None:
        """Refuse an import that would not fit.

        Args:
            needed: bytes it will write.
            promised: bytes that other imports have still to write.

        Raises:
            BundleError: STORE_SPACE, STORE_QUOTA.
        """
        available = max(0, self.free_bytes() - promised)
        if needed + _SPARE > available:
            raise BundleError("STORE_SPACE", f"the model needs {needed} bytes, the store has {available} free")
        if self.quota:
            held = self.usage().bytes + self.staged_bytes() + promised
            if held + needed > self.quota:
                raise BundleError(
                    "STORE_QUOTA",
                    f"the model needs {needed} bytes, the store holds {held} of at most {self.quota}; "
                    "remove a version or raise the quota",
                )

    def record_path(self, name: str, sequence: int) -> Path:
        """Where a committed version's record is."""
        return self.root / "models" / name / f"{sequence}.json"

    def write_record(self, name: str, sequence: int, record: Mapping[str, object]) -> None:
        """Write a version's record, durably."""
        path = self.record_path(name, sequence)
        self.fs.make_folder(path.parent)
        self.fs.write_file(path, json.dumps(record, indent=1).encode() + b"\n", 0o444)

    def records(self) -> tuple[Path, ...]:
        """All records, and what a process that died while it wrote one left."""
        return tuple((self.root / "models").glob("*/*"))

    def remove_record(self, name: str, sequence: int) -> None:
        """Delete a version's record, durably."""
        path = self.record_path(name, sequence)
        with suppress(FileNotFoundError):
            self.fs.unlink(path)
            self.fs.sync_folder(path.parent)


def _finding(path: Path, digest: str, read: Callable[[int], None]) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return ABSENT
    except OSError:
        return UNREADABLE
    content, position = hashlib.sha256(), 0
    try:
        buffer, disk = direct.aligned_buffer(min(_BLOCK, os.fstat(fd).st_size + 1)), direct.reading(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := disk.transfer(buffer, position):
            content.update(buffer[:count])
            os.posix_fadvise(fd, position, count, os.POSIX_FADV_DONTNEED)
            position += count
            read(count)
    except OSError:  # the disk cannot read it any more
        return UNREADABLE
    finally:
        os.close(fd)
    return "" if content.hexdigest() == digest else CHANGED
