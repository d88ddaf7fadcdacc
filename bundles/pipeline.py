"""The one pass over a bundle: every step from the first byte to judged files, the same for verify and import.

The payload is read once into a small ring of buffers (`ring.py`). Chunk hash, file hash and sink each work on the
very same buffer, on a thread of their own (hashing and writing release the interpreter lock), so what is written
is what was hashed and memory does not grow with the bundle.

A byte is hashed twice where its file has several chunks. The chunk's digest refuses a damaged medium at once, lets
an interrupted import go on, and names what a delta leaves out; the file's digest is what the publisher signed and
what the store calls the file, and it does not follow from those of the chunks. Of a file of one chunk they are the
same, and taken once.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from itertools import accumulate
from typing import NamedTuple, Protocol

from bundles.content.files import ModelFiles
from bundles.content.inspector import Inspector, Verdict
from bundles.content.judge import check_listing, check_model, judge
from bundles.format.chunks import BUFFER_SIZE, EMPTY_SHA256, Extent, extents
from bundles.format.errors import BundleError
from bundles.format.manifest import File, Manifest, Volume
from bundles.reader import BundleReader
from bundles.ring import ReadInto, Ring, Work, open_ring
from bundles.trust.policy import Head, Verified, verify_head
from bundles.trust.revocation import Revocations
from bundles.trust.roots import Root

_MOST_UNSETTLED = 32  # files whose bytes are on their way to the disk, each with a descriptor


class State(StrEnum):
    """Where a bundle is on its way; committed and rejected are final."""

    QUARANTINE = "quarantine"
    SIGNED = "signed"
    POLICY = "policy"
    STREAMING = "streaming"
    CONTENT = "content"
    COMMITTED = "committed"
    REJECTED = "rejected"
    PREPARING = "preparing"  # of a bundle that is built, before all: its model is converted or quantised


@dataclass(frozen=True)
class Progress:
    """A moment of a verification or import.

    Attributes:
        state: where it is.
        bytes_done: payload bytes verified.
        bytes_total: payload bytes in all; 0 until the manifest is verified.
        bytes_reused: of bytes_done, those that were there already.
        bytes_hashed: bytes that this pass looked at, wherever they came from.
        bytes_per_second: of those, over the last seconds; told by the importer.
        file: the file being read.
        kind: model, adapter, draft or trust, once verified.
        model_version: name@version, once verified.
        model_digest: SHA-256 of the signed manifest, hex, once verified.
        volumes: of the bundle, 1 where it is whole; 0 until verified.
        volume_wanted: the one it waits for; 0 while it waits for none.
        volume_refused: why the last one offered was not taken.
        reason: stable code, with REJECTED.
        message: what was wrong and what to do, with REJECTED.
    """

    state: State
    bytes_done: int = 0
    bytes_total: int = 0
    bytes_reused: int = 0
    bytes_hashed: int = 0
    bytes_per_second: int = 0
    file: str = ""
    kind: str = ""
    model_version: str = ""
    model_digest: str = ""
    volumes: int = 0
    volume_wanted: int = 0
    volume_refused: str = ""
    reason: str = ""
    message: str = ""


Report = Callable[[Progress], None]


class Sink:
    """Where verified bytes go. `write` runs on a thread of its own, between `begin` and `end` of its file.

    One that begins empty and keeps nothing for a next time needs no more than begin, write and files.
    """

    def begin(self, file: File, told: Callable[[int], None]) -> int:
        """The next file starts; how many of its bytes need not come from the medium.

        That is its whole size where the sink has the file and vouches for it, else a multiple of the chunk size:
        bytes that `held` gives, to be hashed again. `told` hears how many bytes were hashed to find out; it may
        raise.
        """
        raise NotImplementedError

    def held(self, offset: int, buffer: memoryview) -> int:
        """Bytes of the current file that were there when it began; how many, 0 where there are none."""
        return 0

    def write(self, offset: int, block: memoryview) -> None:
        """Bytes of the current file; the buffer is reused afterwards."""
        raise NotImplementedError

    def checkpoint(self, size: int, *, pause: bool) -> Callable[[], None] | None:
        """So many bytes of the current file are handed over; with `pause`, nothing follows for a while.

        What makes them durable, where the sink wants that now; it runs on a thread of its own once they are
        written, also after `end`.
        """
        return None

    def settled(self, file: File, size: int) -> None:
        """So many bytes of a file are durable and their digests hold, of a whole file its own, too."""

    def end(self, file: File) -> None:
        """The current file is complete and its digests hold."""

    def keep(self, digest: str, content: bytes) -> None:
        """A signed document that travels with the model."""

    def files(self) -> ModelFiles:
        """What it holds, for judging."""
        raise NotImplementedError


class Base(Protocol):
    """The model that a delta builds on: chunks that are not in the bundle."""

    @property
    def chunks(self) -> frozenset[str]:
        """Digests of all its chunks."""

    def open(self, digest: str) -> ReadInto:
        """What fills buffers with a chunk, from its beginning; it may raise `damaged`."""

    def damaged(self, why: str) -> BundleError:
        """The refusal of a delta whose base is not what it was."""


def no_base(manifest: Manifest) -> Base:
    """Of a delta where there is no store.

    Raises:
        BundleError: BASE_ABSENT.
    """
    raise BundleError(
        "BASE_ABSENT", f"the bundle holds only what changed since {manifest.base}, and that model is not here"
    )


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
        base: finds the model that a delta builds on.
        revocations: in force here.
        revocation_floor: the highest sequence of revocations that was ever in force here.
        keep: is given the head and the documents by member name, before a byte of payload is read.
    """

    pinned: Root
    now: datetime
    gate: Callable[[Verified], bool]
    inspector: Inspector
    base: Callable[[Manifest], Base] = no_base
    revocations: Revocations | None = None
    revocation_floor: int = 0
    keep: Callable[[Head, Mapping[str, bytes]], None] = lambda head, documents: None


def read_bundle(reader: BundleReader, terms: Terms, sink: Sink, report: Report) -> Accepted | Verified:
    """Take an open bundle through all steps; what passed, or just the manifest when the gate ended it.

    Raises:
        BundleError: every code of docs/bundle-format.md.
    """
    report(Progress(State.QUARANTINE))
    head = reader.read_head()
    verified = verify_head(
        head, terms.pinned, terms.now, terms.revocations, revocation_floor=terms.revocation_floor
    )
    manifest = verified.manifest
    at = Progress(
        State.SIGNED,
        bytes_total=manifest.total_size,
        kind=manifest.kind,
        model_version=manifest.reference,
        model_digest=verified.model_digest,
        volumes=max(1, len(manifest.volumes)),
    )
    report(at)
    if not terms.gate(verified):
        return verified
    check_listing({file.path: file.size for file in manifest.files})
    base = terms.base(manifest) if manifest.base is not None else None
    report(replace(at, state=State.POLICY))
    reader.expect(manifest, base.chunks if base else frozenset())
    documents = {document.member: reader.read_document(document) for document in manifest.documents}
    for document in manifest.documents:
        sink.keep(document.sha256, documents[document.member])
    terms.keep(head, documents)
    at = stream_payload(reader, manifest, sink, replace(at, state=State.STREAMING), report, base)
    reader.read_end()
    report(replace(at, state=State.CONTENT, file=""))
    verdict = judge(sink.files(), terms.inspector, manifest.kind)
    check_model(manifest.model, verdict, {file.path: file.sha256 for file in manifest.files})
    return Accepted(verified, head, verdict)


def stream_payload(
    reader: BundleReader, manifest: Manifest, sink: Sink, at: Progress, report: Report, base: Base | None = None
) -> Progress:
    """Read, hash and hand over every chunk, in manifest order; `report` is told `at` as it advances; the last.

    Raises:
        BundleError: CHUNK_DIGEST, FILE_DIGEST, the CONTAINER and VOLUME codes.
    """
    report(at)
    with open_ring(min(BUFFER_SIZE, manifest.chunk_size)) as ring:
        stream = _Stream(reader, sink, ring, base, report, at, manifest.volumes)
        try:
            for file in manifest.files:
                stream.pass_file(file, manifest.chunk_size)
        finally:
            stream.settle(most=0)  # also of what is refused or interrupted: the next import goes on from there
        return stream.at


class _Check(NamedTuple):
    """A chunk on its way through the ring."""

    length: int
    reused: int
    done: "Future[None]"


class _Mark(NamedTuple):
    """Bytes of a file that are durable when `synced` is done, and verified when so many checks have been."""

    file: File
    size: int
    checks: int
    synced: "Future[None]"


class _Stream:
    """Files on their way from medium, staging or base, through the ring, to the sink."""

    def __init__(
        self,
        reader: BundleReader,
        sink: Sink,
        ring: Ring,
        base: Base | None,
        report: Report,
        at: Progress,
        volumes: Sequence[Volume] = (),
    ) -> None:
        self.at = at
        self._reader, self._sink, self._ring, self._base, self._report = reader, sink, ring, base, report
        self._checks: deque[_Check] = deque()
        self._marks: deque[_Mark] = deque()
        self._handed = self._checked = self._carried = 0
        self._volume_ends = frozenset(accumulate(volume.chunks for volume in volumes[:-1]))

    def pass_file(self, file: File, chunk_size: int) -> None:
        """One file, from wherever its bytes are."""
        before = self.at = replace(self.at, file=file.path)
        whole = hashlib.sha256()
        held = self._sink.begin(file, self._look)
        if held < file.size:
            held, whole = self._hash_held(file, chunk_size, held)
        self.at = replace(
            before,
            bytes_hashed=self.at.bytes_hashed,
            bytes_done=before.bytes_done + held,
            bytes_reused=before.bytes_reused + held,
        )
        for extent, digest in zip(extents(file.size, chunk_size), file.chunks, strict=True):
            self._before_chunk(file, max(held, extent.offset), digest)
            if extent.offset >= held:
                self._pass_chunk(file, extent, digest, whole)
            elif self._reader.carries(digest):
                self._reader.skip_chunk(digest, extent.length)
        self._complete(file, whole if held < file.size or not file.size else None)

    def settle(self, most: int) -> None:
        """Tell the sink what is durable and verified; wait until at most so many marks are left."""
        while self._marks and self._marks[0].checks <= self._checked:
            if len(self._marks) <= most and not self._marks[0].synced.done():
                return
            mark = self._marks.popleft()
            mark.synced.result()
            self._sink.settled(mark.file, mark.size)

    def _hash_held(self, file: File, chunk_size: int, held: int) -> tuple[int, "hashlib._Hash"]:
        """Hash again what the sink has of a file; how much of it is as it must be, and the file's digest so far.

        What staging lost of it, and all behind that, comes from the medium.
        """
        whole = hashlib.sha256()
        for extent, digest in zip(extents(held, chunk_size), file.chunks, strict=False):
            before, chunk, left = whole.copy(), hashlib.sha256(), extent.length
            while left and (got := self._sink.held(extent.offset + extent.length - left, self._ring.spare[:left])):
                self._ring.hash_both(chunk, whole, self._ring.spare[:got])
                self._look(got)
                left -= got
            if left or chunk.hexdigest() != digest:
                return extent.offset, before
        return held, whole

    def _before_chunk(self, file: File, size: int, digest: str) -> None:
        """Where the next volume begins, maybe hours away, record all until then and `size` bytes of the file."""
        if not self._reader.carries(digest):
            return
        if self._carried in self._volume_ends:
            self._ring.drain()
            self._advance(wait=True)
            if size < file.size:
                self._mark(file, size, pause=True)
            self.settle(most=0)
        self._carried += 1

    def _pass_chunk(self, file: File, extent: Extent, digest: str, whole: "hashlib._Hash") -> None:
        reused = 0
        refusal = BundleError("CHUNK_DIGEST", f"a chunk of {file.path} is damaged; copy the bundle again")
        if self._reader.carries(digest) or self._base is None:
            self._reader.open_chunk(digest, extent.length)
            source: ReadInto = self._reader.read_into
        else:
            source, reused = self._base.open(digest), extent.length
            refusal = self._base.damaged(f"a chunk of {file.path}")
        work = Work(refusal, whole if len(file.chunks) > 1 else None, self._sink.write)
        check = self._ring.pass_chunk(source, extent, digest, work)
        self._checks.append(_Check(extent.length, reused, check))
        self._handed += 1
        self._advance(wait=False)
        end = extent.offset + extent.length
        if end < file.size:
            self._mark(file, end)
            self.settle(_MOST_UNSETTLED)

    def _complete(self, file: File, whole: "hashlib._Hash | None") -> None:
        """The file's last byte was handed over; `whole` is its digest unless the sink vouches for it."""
        self._ring.drain()
        self._advance(wait=True)
        if whole is not None:
            # Of a file with at most one chunk the manifest itself was checked: its digest is the chunk's.
            if whole.hexdigest() != (file.sha256 if len(file.chunks) > 1 else EMPTY_SHA256):
                raise BundleError("FILE_DIGEST", f"{file.path} is not the file that the manifest names")
            self._mark(file, file.size)
        self._sink.end(file)
        self.settle(_MOST_UNSETTLED)
        self._report(self.at)

    def _mark(self, file: File, size: int, *, pause: bool = False) -> None:
        sync = self._sink.checkpoint(size, pause=pause)
        if sync is not None:
            self._marks.append(_Mark(file, size, self._handed, self._ring.after_writes(sync)))

    def _advance(self, *, wait: bool) -> None:
        """Report the chunks whose digests are known to hold."""
        while self._checks and (wait or self._checks[0].done.done()):
            check = self._checks.popleft()
            check.done.result()
            self._checked += 1
            self.at = replace(
                self.at,
                bytes_done=self.at.bytes_done + check.length,
                bytes_reused=self.at.bytes_reused + check.reused,
                bytes_hashed=self.at.bytes_hashed + check.length,
            )
            self._report(self.at)

    def _look(self, count: int) -> None:
        """So many bytes that were here already were hashed."""
        self.at = replace(
            self.at, bytes_done=self.at.bytes_done + count, bytes_hashed=self.at.bytes_hashed + count
        )
        self._report(self.at)
