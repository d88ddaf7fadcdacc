"""What no import can beat: the disks, read and written from end to end, and the processor, hashing."""

import ctypes
import hashlib
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bundles import direct
from bundles.benchmark.model import random_blocks

_BLOCK = 8 * 1024 * 1024
_HASHED = 512 * 1024 * 1024


def read_rate(path: Path) -> float:
    """Bytes per second of reading a file once, as `dd bs=8M` does: with iflag=direct or not, the faster way."""
    rates = []
    for past_cache in (False, True):
        drop_cache(path)
        began = time.perf_counter()
        size = _read(path, past_cache=past_cache)
        rates.append(size / (time.perf_counter() - began))
    return max(rates)


def write_rate(folder: Path, size: int) -> float:
    """Bytes per second of writing a file durably, as `dd conv=fdatasync bs=8M` does: with oflag=direct or without.

    The first is not counted: a disk that is thinly provisioned is several times slower where it has never been
    written to.
    """
    rates = []
    for past_cache in (True, False, True):
        began = time.perf_counter()
        _write(folder / "written", size, past_cache=past_cache)
        rates.append(size / (time.perf_counter() - began))
    return max(rates[1:])


def hash_rate(threads: int) -> float:
    """Bytes per second of SHA-256 on so many threads at once, together, from memory."""
    with ThreadPoolExecutor(threads) as pool:
        blocks = [next(random_blocks(_BLOCK)) for _ in range(threads)]
        began = time.perf_counter()
        list(pool.map(_hash, blocks))
        return threads * _HASHED / (time.perf_counter() - began)


def _hash(block: bytes) -> None:
    digest = hashlib.sha256()
    for _ in range(_HASHED // _BLOCK):
        digest.update(block)


def _read(path: Path, *, past_cache: bool) -> int:
    """Read a file to its end; its size."""
    buffer = direct.aligned_buffer(_BLOCK)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        disk = direct.reading(fd, able=past_cache)
        position = 0
        while count := disk.transfer(buffer, position):
            position += count
        return position
    finally:
        os.close(fd)


def _write(path: Path, size: int, *, past_cache: bool) -> None:
    """Write so many bytes durably, and remove them."""
    block = direct.aligned_buffer(_BLOCK)
    block[:] = next(random_blocks(_BLOCK))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        disk = direct.writing(fd, os.pwrite, able=past_cache)
        written = 0
        while written < size:
            written += disk.transfer(block[: size - written], written)
        os.fdatasync(fd)
    finally:
        os.close(fd)
        path.unlink()


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
