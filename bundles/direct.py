"""Large transfers past the page cache (O_DIRECT), where the disk can: nothing is copied, no page is taken.

What is not aligned, what is small, and files of systems that know no such thing (tmpfs, many FUSE ones) go the
ordinary way. Both may follow each other on one descriptor; the kernel keeps them consistent.

Source: open(2), "O_DIRECT".
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Callable

READ_ALIGNMENT = 512
"""Sectors of nearly all disks, and where members of a bundle begin; a disk of larger ones refuses."""
WRITE_ALIGNMENT = 4096
"""Blocks of nearly all file systems: a smaller piece of one would be read before it is written."""

_LEAST = 1024 * 1024

Move = Callable[[memoryview, int], int]
"""Reads into, or writes from, some of a block, at an offset of the file; how many bytes."""


def aligned_buffer(size: int) -> memoryview:
    """Zeros that begin at a page's edge, as direct transfers need them."""
    return memoryview(mmap.mmap(-1, size))


class Direct:
    """One open file's transfers.

    Args:
        fd: the file; whoever opened it closes it.
        move: reads or writes it.
        alignment: bytes of which place and length must be multiples.
        able: False for the ordinary way alone.
    """

    def __init__(self, fd: int, move: Move, alignment: int, *, able: bool = True) -> None:
        self._fd, self._move, self._alignment = fd, move, alignment
        self._flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        self._able, self._direct = able, False

    def transfer(self, block: memoryview, offset: int) -> int:
        """Move some of `block`, at `offset` of the file; how much of it.

        Raises:
            OSError: as the system call does.
        """
        size = len(block) - len(block) % self._alignment
        if self._able and size >= _LEAST and offset % self._alignment == 0:
            try:
                self._turn(direct=True)
                return self._move(block[:size], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._able = False
        self._turn(direct=False)
        return self._move(block, offset)

    def _turn(self, *, direct: bool) -> None:
        if direct != self._direct:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, self._flags | (os.O_DIRECT if direct else 0))
            self._direct = direct


def reading(fd: int, *, able: bool = True) -> Direct:
    """Reads of a file whose large pieces are wanted once."""
    return Direct(fd, lambda block, offset: os.preadv(fd, [block], offset), READ_ALIGNMENT, able=able)


def writing(fd: int, pwrite: Callable[[int, memoryview, int], int], *, able: bool = True) -> Direct:
    """Writes, by `pwrite`, of a file that nothing reads soon."""
    return Direct(fd, lambda block, offset: pwrite(fd, block, offset), WRITE_ALIGNMENT, able=able)
