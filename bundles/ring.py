"""A few buffers between one reader and the threads that hash and write them; memory does not grow with the bundle.

Four lanes of one thread each: chunk hash, file hash, writing, and waiting for the disk, which holds up none of the
others. The reader is the caller's thread. All of them leave the interpreter to the others while they work.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from typing import NamedTuple

from bundles.direct import aligned_buffer
from bundles.format.chunks import Extent
from bundles.format.errors import BundleError

RING_BUFFERS = 8
_LANES = ("chunk", "file", "sink", "sync")

ReadInto = Callable[[memoryview], int]
"""Fills a buffer; how many bytes it got, fewer only at the end."""


class Work(NamedTuple):
    """What is done with a chunk beside its own digest.

    Attributes:
        refusal: raised where the chunk has another digest.
        whole: the file's digest so far; None where it is the chunk's.
        write: takes an offset in the file and bytes.
    """

    refusal: BundleError
    whole: "hashlib._Hash | None"
    write: Callable[[int, memoryview], None]


class Ring:
    """Buffers and lanes; a buffer is filled again when all lanes are done with it.

    Args:
        size: bytes of each buffer.
        lanes: chunk, file, sink and sync, one thread each.

    Attributes:
        spare: the buffer that is free while the ring is drained.
    """

    def __init__(self, size: int, lanes: Sequence[ThreadPoolExecutor]) -> None:
        self._buffers = [aligned_buffer(size) for _ in range(RING_BUFFERS)]
        self._pending: list[list[Future[None]]] = [[] for _ in range(RING_BUFFERS)]
        self._turn = cycle(range(RING_BUFFERS))
        self._chunk_lane, self._file_lane, self._sink_lane, self._sync_lane = lanes
        self._written: Future[None] = Future()
        self._written.set_result(None)
        self.spare = self._buffers[0]

    def pass_chunk(self, read_into: ReadInto, extent: Extent, digest: str, work: Work) -> Future[None]:
        """Send a chunk through the lanes; the future of its digest's check.

        Raises:
            BundleError: `refusal` of an earlier chunk; what reading and writing raise.
        """
        chunk = hashlib.sha256()
        position, end, slot = extent.offset, extent.offset + extent.length, 0
        while position < end:
            slot = next(self._turn)
            self._wait(slot)
            buffer = self._buffers[slot][: end - position]
            block = buffer[: read_into(buffer)]
            if not block:
                raise work.refusal
            pending = self._pending[slot]
            pending.append(self._chunk_lane.submit(chunk.update, block))
            if work.whole is not None:
                pending.append(self._file_lane.submit(work.whole.update, block))
            self._written = self._sink_lane.submit(work.write, position, block)
            pending.append(self._written)
            position += len(block)
        check = self._chunk_lane.submit(_check_chunk, chunk, digest, work.refusal)
        self._pending[slot].append(check)
        return check

    def hash_both(self, chunk: "hashlib._Hash", whole: "hashlib._Hash", block: memoryview) -> None:
        """Hash a block twice, at the same time; the ring is drained."""
        update = self._chunk_lane.submit(chunk.update, block)
        whole.update(block)
        update.result()

    def after_writes(self, job: Callable[[], None]) -> Future[None]:
        """Run a job on the sync lane, once all that was handed over so far is written."""
        written = self._written

        def run() -> None:
            written.result()
            job()

        return self._sync_lane.submit(run)

    def drain(self) -> None:
        """Wait until all is hashed and written; the first refusal is raised."""
        for slot in range(RING_BUFFERS):
            self._wait(slot)

    def _wait(self, slot: int) -> None:
        pending, self._pending[slot] = self._pending[slot], []
        for future in pending:
            future.result()


def _check_chunk(chunk: "hashlib._Hash", digest: str, refusal: BundleError) -> None:
    if chunk.hexdigest() != digest:
        raise refusal


@contextmanager
def open_ring(size: int) -> Iterator[Ring]:
    """A ring with buffers of `size` bytes; its threads end with the block."""
    lanes = [ThreadPoolExecutor(1, thread_name_prefix=f"bundle-{name}") for name in _LANES]
    try:
        yield Ring(size, lanes)
    finally:
        for lane in lanes:
            lane.shutdown(wait=True, cancel_futures=True)
