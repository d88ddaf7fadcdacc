"""Where a bundle's members come from: one volume's file, or one folder; read the same way."""

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from bundles.format.container import ContainerReader, Member, open_unfollowed
from bundles.format.errors import BundleError
from bundles.format.folder import FolderReader

FIRST_SUFFIX = ".001"


class Source(Protocol):
    """One volume or one folder, front to back.

    Attributes:
        bytes_read: all bytes taken from the medium so far.
    """

    bytes_read: int

    def next(self) -> Member | None:
        """The next member; None at the end, which is then known to be the end of the medium.

        Raises:
            BundleError: one of the CONTAINER codes, SOURCE_CHANGED, SOURCE_UNREADABLE.
        """

    def read(self, limit: int) -> bytes:
        """The whole content of the current member, which may not be larger than `limit` bytes.

        Raises:
            BundleError: CONTAINER_MEMBER_SIZE; or as `read_into`.
        """

    def read_into(self, buffer: memoryview) -> int:
        """Fill `buffer` from the current member; how many bytes it got, fewer only at the member's end.

        Raises:
            BundleError: CONTAINER_TRUNCATED, SOURCE_CHANGED, SOURCE_UNREADABLE.
        """

    def skip(self) -> None:
        """Leave what is left of the current member unread.

        Raises:
            BundleError: CONTAINER_TRUNCATED.
        """

    def arrange(self, names: Iterable[str], ahead: Member | None, *, all_of: bool = True) -> Member | None:
        """Learn which members follow, in order, before end.json.

        A file has an order of its own, and `ahead`, the member that `next` gave last and nobody read, stays the
        one that comes next. A folder has none: it hands out these, and holds nothing else where they are `all_of`
        its members.

        Raises:
            BundleError: CONTAINER_UNLISTED, a folder holds other members too.
        """

    def rewind(self) -> None:
        """Back to the beginning."""

    def close(self) -> None:
        """Close what is open; more than once is no harm."""


def open_source(path: Path) -> ContainerReader | FolderReader:
    """Open a volume or a bundle's folder, itself and not what a link points to; the caller closes it.

    Raises:
        BundleError: SOURCE_SYMLINK, SOURCE_NOT_FILE, SOURCE_UNREADABLE.
    """
    fd = open_unfollowed(path)
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        return FolderReader(fd)
    if stat.S_ISREG(mode):
        return ContainerReader(fd)
    os.close(fd)
    raise BundleError("SOURCE_NOT_FILE", f"{path} is neither a regular file nor a folder")


def beside(path: Path) -> Callable[[int], Source]:
    """Opens the volumes that lie beside the first one at `path`: with NAME.001, its second one is NAME.002.

    The function it gives raises BundleError VOLUME_MISSING where there is none, else as `open_source`.
    """

    def volume(index: int) -> Source:
        return open_source(path if index == 1 else sibling(path, index))

    return volume


def sibling(path: Path, index: int) -> Path:
    """Where volume `index` lies when the first one is at `path`.

    Raises:
        BundleError: VOLUME_MISSING.
    """
    if path.suffix == FIRST_SUFFIX:
        found = path.with_suffix(f".{index:03}")
        if found.is_symlink() or found.exists():
            return found
        raise BundleError("VOLUME_MISSING", f"volume {index} is wanted and {found} does not exist")
    raise BundleError(
        "VOLUME_MISSING", f"volume {index} is wanted; {path} is not called NAME.001, so nothing lies beside it"
    )
