"""What no import can beat: the disks, read and written from end to end, and the processor, hashing."""

import ctypes
import hashlib
import mmap
import os
import time
from pathlib import Path

from bundles.benchmark.model import random_blocks

_BLOCK = 8 * 1024 * 1024
_HASHED = 512 * 1024 * 1024
_WRITES = 3


def read_rate(path: Path) -> float:
    """Bytes per second of reading a file once, as `dd if=FILE of=/dev/null bs=8M` does."""
    buffer = memoryview(bytearray(_BLOCK))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size, position = os.fstat(fd).st_size, 0
        began = time.perf_counter()
        while position < size:
            position += os.preadv(fd, [buffer], position)
        return size / (time.perf_counter() - began)
    finally:
        os.close(fd)


def write_rate(folder: Path, size: int) -> float:
    """Bytes per second of writing a file durably, as `dd conv=fdatasync bs=8M` does; the best of three.

    A disk that is thinly provisioned is several times slower where it has never been written to.
    """
    return max(_write_once(folder / "written", size) for _ in range(_WRITES))


def _write_once(path: Path, size: int) -> float:
    (block,) = random_blocks(_BLOCK)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        began, written = time.perf_counter(), 0
        while written < size:
            written += os.write(fd, block[: size - written])
        os.fdatasync(fd)
        return size / (time.perf_counter() - began)
    finally:
        os.close(fd)
        path.unlink()


def hash_rate() -> float:
    """Bytes per second of SHA-256 on one thread, from memory."""
    (block,) = random_blocks(_BLOCK)
    digest, began = hashlib.sha256(), time.perf_counter()
    for _ in range(_HASHED // _BLOCK):
        digest.update(block)
    return _HASHED / (time.perf_counter() - began)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def drop_cache(path: Path) -> float:
    """Ask the system to forget a file's pages; the share of them, 0 to 1, that it still holds.

    Dirty pages are written first; on tmpfs, and where other processes map the file, pages stay.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return _cached(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _cached(fd: int, size: int) -> float:
    """The share of a file's pages in memory, told by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        if libc.mincore(address, size, pages) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(page & 1 for page in pages.raw[: len(pages)]) / len(pages)
    finally:
        libc.munmap(address, size)
