"""How a file is cut into chunks: at every 64 MiB, never across files, each named by its SHA-256."""

import hashlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from bundles.format.errors import BundleError

CHUNK_SIZE = 64 * 1024 * 1024
MIN_CHUNK_SIZE = 4096
BUFFER_SIZE = 8 * 1024 * 1024
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


class Extent(NamedTuple):
    """A chunk's place in its file, bytes."""

    offset: int
    length: int


class FileDigests(NamedTuple):
    """A file's size in bytes, its SHA-256 and its chunks' SHA-256, all hex."""

    size: int
    sha256: str
    chunks: tuple[str, ...]


def extents(size: int, chunk_size: int) -> Iterator[Extent]:
    """The chunks of a file of `size` bytes, in order; none of an empty file."""
    for offset in range(0, size, chunk_size):
        yield Extent(offset, min(chunk_size, size - offset))


def digest_file(fd: int, chunk_size: int) -> FileDigests:
    """Hash an open regular file once, whole and by chunk.

    Raises:
        BundleError: SOURCE_CHANGED, it shrank or grew while it was read.
    """
    size = os.fstat(fd).st_size
    whole = hashlib.sha256()
    chunks = []
    for extent in extents(size, chunk_size):
        chunk = hashlib.sha256()
        for block in read_extent(fd, extent):
            whole.update(block)
            chunk.update(block)
        chunks.append(chunk.hexdigest())
    if os.fstat(fd).st_size != size:
        raise BundleError("SOURCE_CHANGED", "a file changed its size while it was read; leave it alone and repeat")
    return FileDigests(size, whole.hexdigest(), tuple(chunks))


def read_extent(fd: int, extent: Extent) -> Iterator[bytes]:
    """The bytes of one extent, in blocks of at most `BUFFER_SIZE`.

    Raises:
        BundleError: SOURCE_CHANGED, the file ends early.
    """
    position, end = extent.offset, extent.offset + extent.length
    while position < end:
        block = os.pread(fd, min(BUFFER_SIZE, end - position), position)
        if not block:
            raise BundleError("SOURCE_CHANGED", "a file became shorter while it was read; repeat")
        yield block
        position += len(block)
