"""The one pass over a bundle: every step from the first byte to judged files, the same for verify and import.

The payload is read once into a small ring of buffers. Chunk hash, file hash and sink each work on the very same
buffer, on a thread of their own (hashing and writing release the interpreter lock), so what is written is what was
hashed and memory does not grow with the bundle.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from itertools import cycle
from typing import Protocol

from bundles.content import forbidden
from bundles.content.inspector import Inspector, Verdict
from bundles.content.judge import check_model, judge
from bundles.format.chunks import BUFFER_SIZE, EMPTY_SHA256, Extent, extents
from bundles.format.errors import BundleError
from bundles.format.manifest import File, Manifest
from bundles.reader import BundleReader
from bundles.trust.policy import Head, Verified, verify_head
from bundles.trust.roots import Root

RING_BUFFERS = 4


class State(StrEnum):
    """Where a bundle is on its way; committed and rejected are final."""

    QUARANTINE = "quarantine"
    SIGNED = "signed"
    POLICY = "policy"
    STREAMING = "streaming"
    CONTENT = "content"
    COMMITTED = "committed"
    REJECTED = "rejected"


@dataclass(frozen=True)
class Progress:
    """A moment of a verification or import.

    Attributes:
        state: where it is.
        bytes_done: payload bytes verified.
        bytes_total: payload bytes in all; 0 until the manifest is verified.
        file: the file being read.
        model_version: name@version, once verified.
        model_digest: SHA-256 of the signed manifest, hex, once verified.
        reason: stable code, with REJECTED.
        message: what was wrong and what to do, with REJECTED.
    """

    state: State
    bytes_done: int = 0
    bytes_total: int = 0
    file: str = ""
    model_version: str = ""
    model_digest: str = ""
    reason: str = ""
    message: str = ""


Report = Callable[[Progress], None]


class Sink(Protocol):
    """Where verified bytes go. `write` runs on a thread of its own, between `begin` and `end` of its file."""

    def begin(self, file: File) -> None:
        """The next file starts."""

    def write(self, offset: int, block: memoryview) -> None:
        """Bytes of the current file; the buffer is reused afterwards."""

    def end(self, file: File) -> None:
        """The current file is complete and its digests hold."""

    def keep(self, digest: str, content: bytes) -> None:
        """A signed document that travels with the model."""

    def files(self) -> Mapping[str, tuple[int, int]]:
        """By path, a read-only descriptor and the size in bytes; of weights it need hold the header only."""


class Chunks(Protocol):
    """Something that hands out chunks: a bundle, or the base that a delta was made against."""

    def open_chunk(self, digest: str, length: int) -> None:
        """Step to a chunk; its bytes come from `read_into`."""

    def read_into(self, buffer: memoryview) -> int:
        """Fill `buffer` from the chunk; how many bytes it got, fewer only at the chunk's end."""


class Base(Chunks, Protocol):
    """The chunks of an older model, for a bundle that leaves them out; in any order, as often as asked."""

    @property
    def digests(self) -> frozenset[str]:
        """SHA-256 of every chunk of its manifest, hex."""


@dataclass(frozen=True)
class Accepted:
    """A bundle that passed.

    Attributes:
        verified: the signed statements.
        head: the members they were in.
        verdict: what engine-inspect found.
    """

    verified: Verified
    head: Head
    verdict: Verdict


@dataclass(frozen=True)
class Terms:
    """What a bundle is held to.

    Attributes:
        pinned: the trust root that is believed.
        now: the clock.
        gate: refuses (BundleError) what is not for here and now; False ends the pass, there is nothing to do.
        inspector: runs engine-inspect.
        base: finds the base of a delta by its model digest; None where it is not here.
    """

    pinned: Root
    now: datetime
    gate: Callable[[Verified], bool]
    inspector: Inspector
    base: Callable[[str], Base | None] = lambda _: None


def read_bundle(reader: BundleReader, terms: Terms, sink: Sink, report: Report) -> Accepted | Verified:
    """Take an open bundle through all steps; what passed, or just the manifest when the gate ended it.

    Raises:
        BundleError: every code of docs/bundle-format.md.
    """
    report(Progress(State.QUARANTINE))
    head = reader.read_head()
    verified = verify_head(head, terms.pinned, terms.now)
    manifest = verified.manifest
    at = Progress(
        State.SIGNED,
        bytes_total=manifest.total_size,
        model_version=manifest.reference,
        model_digest=verified.model_digest,
    )
    report(at)
    if not terms.gate(verified):
        return verified
    forbidden.check_names(file.path for file in manifest.files)
    report(replace(at, state=State.POLICY))
    base = terms.base(manifest.base) if manifest.base is not None else None
    reader.expect(manifest, base.digests if base is not None else frozenset())
    for document in manifest.documents:
        sink.keep(document.sha256, reader.read_document(document))
    stream_payload(reader, manifest, sink, replace(at, state=State.STREAMING), report, base)
    reader.read_end()
    report(replace(at, state=State.CONTENT, bytes_done=manifest.total_size))
    verdict = judge(sink.files(), terms.inspector)
    check_model(manifest.model, verdict, {file.path: file.sha256 for file in manifest.files})
    return Accepted(verified, head, verdict)


def stream_payload(
    reader: BundleReader, manifest: Manifest, sink: Sink, at: Progress, report: Report, base: Base | None = None
) -> None:
    """Read, hash and hand over every chunk, in manifest order; `report` is told `at` as it advances.

    A chunk that a delta leaves out comes from `base`, and is hashed like any other.

    Raises:
        BundleError: CHUNK_DIGEST, FILE_DIGEST, the CONTAINER codes.
    """
    report(at)
    with _open_ring(min(BUFFER_SIZE, manifest.chunk_size)) as ring:
        for file in manifest.files:
            sink.begin(file)
            whole = hashlib.sha256()
            checks: deque[tuple[int, Future[None]]] = deque()
            for extent, digest in zip(extents(file.size, manifest.chunk_size), file.chunks, strict=True):
                chunks: Chunks = reader if base is None or reader.carries(digest) else base
                chunks.open_chunk(digest, extent.length)
                check = ring.pass_chunk(chunks, extent, digest, _Work(file, whole, sink))
                checks.append((extent.length, check))
                at = _advance(at, file, checks, report, wait=False)
            ring.drain()
            at = _advance(at, file, checks, report, wait=True)
            _check_file(file, whole.hexdigest())
            sink.end(file)


def _advance(
    at: Progress, file: File, checks: deque[tuple[int, Future[None]]], report: Report, *, wait: bool
) -> Progress:
    """Report the chunks whose digests are known to hold."""
    while checks and (wait or checks[0][1].done()):
        length, check = checks.popleft()
        check.result()
        at = replace(at, bytes_done=at.bytes_done + length, file=file.path)
        report(at)
    return at


def _check_file(file: File, digest: str) -> None:
    """Of a file with at most one chunk the manifest itself was checked: its digest is the chunk's."""
    expected = file.sha256 if len(file.chunks) > 1 else EMPTY_SHA256
    if digest != expected:
        raise BundleError("FILE_DIGEST", f"{file.path} is not the file that the manifest names")


@dataclass(frozen=True)
class _Work:
    file: File
    whole: "hashlib._Hash"
    sink: Sink


class _Ring:
    """Buffers between one reader and three workers; a buffer is filled again when all three are done with it."""

    def __init__(self, size: int, lanes: Sequence[ThreadPoolExecutor]) -> None:
        self._buffers = [memoryview(bytearray(size)) for _ in range(RING_BUFFERS)]
        self._pending: list[list[Future[None]]] = [[] for _ in range(RING_BUFFERS)]
        self._turn = cycle(range(RING_BUFFERS))
        self._chunk_lane, self._file_lane, self._sink_lane = lanes

    def pass_chunk(self, chunks: Chunks, extent: Extent, digest: str, work: _Work) -> Future[None]:
        """Send the current chunk through the workers; the future of its digest's check."""
        chunk = hashlib.sha256()
        end, slot = extent.offset + extent.length, 0
        position = extent.offset
        while position < end:
            slot = next(self._turn)
            self._wait(slot)
            block = self._buffers[slot][: chunks.read_into(self._buffers[slot])]
            pending = self._pending[slot]
            pending.append(self._chunk_lane.submit(chunk.update, block))
            if len(work.file.chunks) > 1:
                pending.append(self._file_lane.submit(work.whole.update, block))
            pending.append(self._sink_lane.submit(work.sink.write, position, block))
            position += len(block)
        check = self._chunk_lane.submit(_check_chunk, chunk, digest, work.file)
        self._pending[slot].append(check)
        return check

    def drain(self) -> None:
        """Wait until every worker has done all it was given; the first refusal is raised."""
        for slot in range(RING_BUFFERS):
            self._wait(slot)

    def _wait(self, slot: int) -> None:
        pending, self._pending[slot] = self._pending[slot], []
        for future in pending:
            future.result()


def _check_chunk(chunk: "hashlib._Hash", digest: str, file: File) -> None:
    if chunk.hexdigest() != digest:
        raise BundleError("CHUNK_DIGEST", f"a chunk of {file.path} is damaged; copy the bundle again")


@contextmanager
def _open_ring(size: int) -> Iterator[_Ring]:
    lanes = [ThreadPoolExecutor(1, thread_name_prefix=f"bundle-{name}") for name in ("chunk", "file", "sink")]
    try:
        yield _Ring(size, lanes)
    finally:
        for lane in lanes:
            lane.shutdown(wait=True, cancel_futures=True)
