"""How a file is cut into chunks: at every 64 MiB, never across files, each named by its SHA-256."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

CHUNK_SIZE = 64 * 1024 * 1024
MIN_CHUNK_SIZE = 4096
BUFFER_SIZE = 8 * 1024 * 1024
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


class Extent(NamedTuple):
    """A chunk's place in its file, bytes."""

    offset: int
    length: int


def extents(size: int, chunk_size: int) -> Iterator[Extent]:
    """The chunks of a file of `size` bytes, in order; none of an empty file."""
    for offset in range(0, size, chunk_size):
        yield Extent(offset, min(chunk_size, size - offset))
