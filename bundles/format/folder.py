"""A bundle as a folder: the members of a whole bundle as files, each under its name, and nothing else.

Everything is opened below one descriptor of the folder and never through a link. A folder has no order, so the
head is handed out in the one legal order, and what follows it in the order of the verified manifest (`arrange`).
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator

from bundles import direct
from bundles.format.container import Member, read_whole
from bundles.format.errors import BundleError
from bundles.format.members import END, HEADER, MANIFEST, OMS, REVOCATION, refuse_unlisted, root_version

_FILES = (HEADER, MANIFEST, OMS, END)
_FOLDERS = ("attest", "c", "licence", "trust")
_MAX_ENTRIES = 1_000_000  # of one folder; a manifest of 32 MiB cannot list as many chunks
_MAX_TRUST = 64
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class FolderReader:
    """Hands out the files of an open folder as members; a `Source`.

    Args:
        fd: descriptor of the folder, which `close` closes.

    Attributes:
        bytes_read: all bytes taken from its files so far.
    """

    def __init__(self, fd: int) -> None:
        self._root = fd
        self._folders: dict[str, int] = {}
        self._fd = -1
        self._disk: direct.Direct
        self._size = self._left = 0
        self._name = ""
        self._queue: Iterator[str] | None = None
        self.bytes_read = 0

    def next(self) -> Member | None:
        """See `Source`; a member that is absent is refused here.

        Raises:
            BundleError: CONTAINER_MISSING, CONTAINER_UNLISTED, CONTAINER_SYMLINK, CONTAINER_HARDLINK,
                CONTAINER_DEVICE, CONTAINER_DIRECTORY, CONTAINER_MODE, SOURCE_CHANGED, SOURCE_UNREADABLE.
        """
        self._end_member()
        if self._queue is None:
            self._queue = self._head()
        name = next(self._queue, None)
        return None if name is None else self._begin(name)

    def read(self, limit: int) -> bytes:
        """See `Source`."""
        return read_whole(Member(self._name, self._left), limit, self.read_into)

    def read_into(self, buffer: memoryview) -> int:
        """See `Source`."""
        wanted, done = min(len(buffer), self._left), 0
        while done < wanted:
            try:
                count = self._disk.transfer(buffer[done:wanted], self._size - self._left)
            except OSError as error:
                raise BundleError("SOURCE_UNREADABLE", f"the medium cannot be read: {error.strerror}") from None
            if count == 0:
                raise BundleError("SOURCE_CHANGED", f"{self._name} became shorter while it was read; repeat")
            done += count
            self._left -= count
            self.bytes_read += count
        return wanted

    def skip(self) -> None:
        """See `Source`."""
        self._left = 0

    def arrange(self, names: Iterable[str], ahead: Member | None, *, all_of: bool = True) -> Member | None:
        """See `Source`: what follows is `names` and end.json, and each file of the folder is one of them."""
        del ahead  # it is handed out again, in its place
        self._left = 0
        self._end_member()
        order = list(names)
        if all_of:
            self._check_listed(frozenset(order))
        self._queue = iter([*order, END])
        return None

    def survey(self) -> Iterator[tuple[str, int]]:
        """Every chunk's name, with a place that means nothing; no content is read.

        Raises:
            BundleError: SOURCE_UNREADABLE, CONTAINER_SYMLINK, CONTAINER_UNLISTED.
        """
        for name in self._names_in("c", _MAX_ENTRIES):
            yield name, 0

    def revisit(self, name: str, at: int) -> Member:
        """Open one member, in no order.

        Raises:
            BundleError: as `next`.
        """
        del at
        self._close_member()
        return self._begin(name)

    def rewind(self) -> None:
        """See `Source`."""
        self._close_member()
        self._queue = None

    def close(self) -> None:
        """See `Source`."""
        self._close_member()
        for fd in (*self._folders.values(), self._root):
            if fd >= 0:
                os.close(fd)
        self._folders.clear()
        self._root = -1

    def _begin(self, name: str) -> Member:
        self._fd = self._open(name)
        self._disk = direct.reading(self._fd)
        self._size = self._left = os.fstat(self._fd).st_size
        self._name = name
        return Member(name, self._size)

    def _head(self) -> Iterator[str]:
        found = self._entries(self._root, _MAX_ENTRIES)
        if HEADER not in found:
            raise BundleError("CONTAINER_MISSING", f"the folder has no {HEADER}; it is not a bundle")
        if OMS in found and MANIFEST not in found:
            raise BundleError("CONTAINER_MISSING", f"the folder has no {MANIFEST}")
        for name in found:
            if name not in _FILES and name not in _FOLDERS:
                refuse_unlisted(name)
        trust = self._names_in("trust", _MAX_TRUST)
        versions = {version: name for name in trust if (version := root_version(name)) is not None}
        for name in trust:
            if name != REVOCATION and name not in versions.values():
                refuse_unlisted(name)
        roots = [versions[version] for version in sorted(versions)]
        rest = [name for name in (REVOCATION, MANIFEST, OMS, END) if name in found or name in trust]
        return iter([HEADER, *roots, *rest])

    def _check_listed(self, listed: frozenset[str]) -> None:
        for folder in _FOLDERS:
            if folder != "trust":
                for name in self._names_in(folder, _MAX_ENTRIES):
                    if name not in listed:
                        refuse_unlisted(name)

    def _names_in(self, folder: str, limit: int) -> list[str]:
        """The member names of the files in a folder of this one; none where it is absent."""
        fd = self._folder(folder)
        return [] if fd is None else [f"{folder}/{name}" for name in self._entries(fd, limit)]

    def _entries(self, fd: int, limit: int) -> list[str]:
        names = []
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    names.append(entry.name)
                    if len(names) > limit:
                        refuse_unlisted(entry.name)
        except OSError as error:
            raise BundleError("SOURCE_UNREADABLE", f"the folder cannot be read: {error.strerror}") from None
        return sorted(names)

    def _folder(self, name: str) -> int | None:
        if name not in self._folders:
            try:
                self._folders[name] = os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=self._root)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise self._not_opened(name, self._root, name, error) from None
        return self._folders[name]

    def _open(self, name: str) -> int:
        folder, _, base = name.rpartition("/")
        parent = self._folder(folder) if folder else self._root
        if parent is None:
            raise BundleError("CONTAINER_MISSING", f"the folder has no {name}")
        try:
            fd = os.open(base, _OPEN, dir_fd=parent)
        except OSError as error:
            raise self._not_opened(base, parent, name, error) from None
        refusal = _refusal(os.fstat(fd), name)
        if refusal is not None:
            os.close(fd)
            raise refusal
        return fd

    def _not_opened(self, base: str, parent: int, name: str, error: OSError) -> BundleError:
        if error.errno == errno.ENOENT:
            return BundleError("CONTAINER_MISSING", f"the folder has no {name}")
        try:
            kind = os.stat(base, dir_fd=parent, follow_symlinks=False)
        except OSError:
            return BundleError("SOURCE_UNREADABLE", f"{name} cannot be opened: {error.strerror}")
        if stat.S_ISREG(kind.st_mode) and error.errno == errno.ENOTDIR:
            return BundleError("CONTAINER_UNLISTED", f"the bundle has {name!a}, which no manifest lists")
        unreadable = BundleError("SOURCE_UNREADABLE", f"{name} cannot be opened: {error.strerror}")
        return _refusal(kind, name) or unreadable

    def _end_member(self) -> None:
        if self._left:
            raise RuntimeError(f"{self._name} was not read to its end")
        if self._fd >= 0 and os.fstat(self._fd).st_size != self._size:
            raise BundleError("SOURCE_CHANGED", f"{self._name} changed its size while it was read; repeat")
        self._close_member()

    def _close_member(self) -> None:
        self._left = 0
        if self._fd >= 0:
            if self._name.startswith("c/"):  # read once, and through the page cache where it is small
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(self._fd)
        self._fd = -1


def _refusal(found: os.stat_result, name: str) -> BundleError | None:
    """Why a directory entry is no member; None where it is a plain file with no name but this."""
    mode = found.st_mode
    rules = (
        ("CONTAINER_SYMLINK", "a symbolic link", stat.S_ISLNK(mode)),
        ("CONTAINER_DIRECTORY", "a directory", stat.S_ISDIR(mode)),
        ("CONTAINER_DEVICE", "a device, FIFO or socket", not stat.S_ISREG(mode)),
        ("CONTAINER_HARDLINK", "a file with a second name (hard link)", found.st_nlink > 1),
        ("CONTAINER_MODE", "a file with set-id or sticky bits", bool(mode & 0o7000)),
    )
    for code, what, holds in rules:
        if holds:
            return BundleError(code, f"{name} is {what}; copy the bundle again, as plain files")
    return None
