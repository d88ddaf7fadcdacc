"""Verify a bundle without writing anything, and show an unbelieved view of one.

    verified = verify(Path("demo.bundle"), roots.load(Path("root.json")))

Verification is the importer's own pass with a sink that keeps only what judging needs.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import NamedTuple

from bundles.base import BundleBase
from bundles.content.files import ModelFiles
from bundles.content.forbidden import HEAD_BYTES, TAIL_BYTES
from bundles.content.inspector import Inspector
from bundles.content.safetensors import header_end
from bundles.format import manifest as manifests
from bundles.format.errors import BundleError
from bundles.format.manifest import File, Manifest
from bundles.format.members import TrustHead
from bundles.format.source import beside
from bundles.pipeline import Base, Progress, Report, Sink, Terms, no_base, read_bundle
from bundles.reader import BundleReader
from bundles.trust import dsse
from bundles.trust.policy import Site, Verified, VerifiedTrust, check_policy, verify_head, verify_trust
from bundles.trust.revocation import Revocations
from bundles.trust.roots import Root

MOST_MEMORY = 128 * 1024 * 1024


def _silent(_: Progress) -> None:
    """Report nothing."""


def verify(
    path: Path,
    pinned: Root,
    *,
    site: Site | None = None,
    inspector: Inspector | None = None,
    report: Report = _silent,
    bases: Sequence[Path] = (),
    revocations: Revocations | None = None,
) -> Verified:
    """Verify every signature, chunk and file of a bundle against a trust root; what was signed.

    Args:
        path: the bundle: a file, the first of its volumes with the others beside it, or a folder.
        pinned: the root that is believed.
        site: clock and floors to hold it to; today's clock and no floors when absent.
        inspector: runs engine-inspect.
        report: is told the progress.
        bases: for a delta, the bundle that it was made against; for a chain of deltas all before it, in any order.
        revocations: in force.

    Raises:
        BundleError: every code of docs/bundle-format.md.
    """
    site = site or Site(datetime.now(UTC))

    with ExitStack() as stack:
        sink = stack.enter_context(closing(KeptFiles()))

        def gate(verified: Verified) -> bool:
            check_policy(verified, site)
            sink.again = _Again(stack, (path, *bases), verified)
            return True

        def base(manifest: Manifest) -> Base:
            if not bases:
                return no_base(manifest)
            return stack.enter_context(BundleBase(bases, manifest.base or ""))

        reader = stack.enter_context(closing(BundleReader(beside(path))))
        terms = Terms(pinned, site.now, gate, inspector or Inspector(), base, revocations)
        accepted = read_bundle(reader, terms, sink, report)
    return accepted if isinstance(accepted, Verified) else accepted.verified


class _Piece(NamedTuple):
    """Bytes of a file that are kept: where they are in the file, how many, where they lie."""

    offset: int
    length: int
    at: int


class KeptFiles(Sink):
    """Keeps what judging reads: small files whole, of weights the header and the end.

    All pieces lie one after the other in memory, and beyond `MOST_MEMORY` in a temporary file without a name. What
    judging wants besides, where an archive's end among the weights points to, is taken from the bundle again.
    """

    def __init__(self) -> None:
        self.again: Callable[[File, int, int], bytes] | None = None
        self._kept = SpooledTemporaryFile(max_size=MOST_MEMORY)  # noqa: SIM115  # `close` closes it
        self._pieces: dict[str, list[_Piece]] = {}
        self._files: dict[str, File] = {}
        self._sizes: dict[str, int] = {}
        self._path = ""
        self._head = self._end = 0

    @property
    def sizes(self) -> Mapping[str, int]:
        """See `content.files.ModelFiles`."""
        return self._sizes

    def read(self, path: str, offset: int, length: int) -> bytes:
        """See `content.files.ModelFiles`."""
        end = min(offset + length, self._sizes[path])
        content = bytearray(max(0, end - offset))
        missing = len(content)
        for piece in self._pieces[path]:
            first, last = max(offset, piece.offset), min(end, piece.offset + piece.length)
            if first < last:
                self._kept.seek(piece.at + first - piece.offset)
                content[first - offset : last - offset] = self._kept.read(last - first)
                missing -= last - first
        if not missing:
            return bytes(content)
        if self.again is None:
            raise RuntimeError("a weights file is judged by bytes that nobody kept")
        return self.again(self._files[path], offset, end - offset)

    def begin(self, file: File, told: Callable[[int], None]) -> int:
        """See `pipeline.Sink`; nothing is here already."""
        self._pieces[file.path] = []
        self._files[file.path] = file
        self._sizes[file.path] = file.size
        self._path = file.path
        self._head = 0 if file.role == "weights" else file.size
        return 0

    def write(self, offset: int, block: memoryview) -> None:
        """See `pipeline.Sink`."""
        if offset == 0 and self._head == 0:
            # A header that cannot be is refused in judging; its first bytes are enough for that.
            self._head = HEAD_BYTES
            with suppress(BundleError):
                self._head = max(HEAD_BYTES, header_end(bytes(block[:8]), self._sizes[self._path], "the file"))
        kept = max(0, min(len(block), self._head - offset))
        tail = min(len(block), max(kept, self._sizes[self._path] - TAIL_BYTES - offset))
        self._keep(offset, block[:kept])
        self._keep(offset + tail, block[tail:])

    def end(self, file: File) -> None:
        """See `pipeline.Sink`."""

    def keep(self, digest: str, content: bytes) -> None:
        """See `pipeline.Sink`."""

    def files(self) -> ModelFiles:
        """See `pipeline.Sink`."""
        return self

    def close(self) -> None:
        """Give the memory back."""
        self._kept.close()

    def _keep(self, offset: int, block: memoryview) -> None:
        if block:
            self._kept.seek(self._end)
            self._kept.write(block)
            self._pieces[self._path].append(_Piece(offset, len(block), self._end))
            self._end += len(block)


class _Again:
    """Bytes of a verified bundle, read once more, each chunk of them whole and by its digest.

    Args:
        stack: closes what is opened, if anything ever is.
        paths: the bundle, and the bases where it is a delta.
        verified: its signed statements.
    """

    def __init__(self, stack: ExitStack, paths: Sequence[Path], verified: Verified) -> None:
        self._stack, self._paths, self._verified = stack, paths, verified
        self._bundle: BundleBase | None = None
        self._held = ("", b"")

    def __call__(self, file: File, offset: int, length: int) -> bytes:
        """Bytes of a file at an offset.

        Raises:
            BundleError: SOURCE_CHANGED.
        """
        size, end = self._verified.manifest.chunk_size, offset + length
        chunks = range(offset // size, -(-end // size))
        content = b"".join(self._chunk(file.chunks[i], min(size, file.size - i * size)) for i in chunks)
        return content[offset - chunks.start * size :][:length]

    def _chunk(self, digest: str, length: int) -> bytes:
        if self._held[0] == digest:
            return self._held[1]
        if self._bundle is None:
            self._bundle = self._stack.enter_context(BundleBase(self._paths, self._verified.model_digest))
        read_into, buffer, done = self._bundle.open(digest), memoryview(bytearray(length)), 0
        while done < length and (got := read_into(buffer[done:])):
            done += got
        if hashlib.sha256(buffer).hexdigest() != digest:
            raise BundleError("SOURCE_CHANGED", "the bundle changed while it was verified; repeat")
        self._held = digest, bytes(buffer)
        return self._held[1]


def verify_trust_bundle(
    path: Path, pinned: Root, *, now: datetime | None = None, revocations: Revocations | None = None
) -> VerifiedTrust:
    """Verify a trust bundle against a trust root; the roots and revocations that it brings.

    Args:
        path: the trust bundle.
        pinned: the root that is believed.
        now: the clock; today's when absent.
        revocations: in force so far.

    Raises:
        BundleError: the SOURCE, CONTAINER, JSON, ROOT, REVOCATION and SIGNATURE codes.
    """
    head = read_trust_bundle(path)
    return verify_trust(head.roots, head.revocation, pinned, now or datetime.now(UTC), revocations)


def read_trust_bundle(path: Path) -> TrustHead:
    """The members of a trust bundle; nothing of them is believed.

    Raises:
        BundleError: HEADER_FORMAT, it is none; the SOURCE, CONTAINER and JSON codes.
    """
    with closing(BundleReader(beside(path))) as reader:
        reader.read_header()
        return reader.read_trust()


def kind_of(path: Path) -> str:
    """What a bundle says it is: model, adapter, draft or trust.

    Raises:
        BundleError: HEADER_FORMAT, VOLUME_ORDER; the SOURCE, CONTAINER and JSON codes.
    """
    with closing(BundleReader(beside(path))) as reader:
        return reader.read_header()


@dataclass(frozen=True)
class Inspection:
    """What a bundle says about itself, and whether that may be believed.

    Attributes:
        manifest: as found in the bundle.
        model_digest: SHA-256 of the manifest's bytes, hex.
        keyids: key ids the manifest's signatures name.
        documents: attestations and licences by member name; they are what the manifest says they are.
        oms: the publisher's signature; None where there is none yet.
        roots: how many trust roots it brings.
        verified: the signed statements, when a root was given and they hold.
        refusal: why they do not.
    """

    manifest: Manifest
    model_digest: str
    keyids: tuple[str, ...]
    documents: Mapping[str, bytes]
    oms: bytes | None
    roots: int
    verified: Verified | None = None
    refusal: BundleError | None = None


def inspect(
    path: Path, pinned: Root | None = None, *, now: datetime | None = None, revocations: Revocations | None = None
) -> Inspection:
    """Read a bundle up to its first chunk; with a root, verify its signatures. No file is verified.

    Args:
        path: the bundle, its first volume, or a folder; of a delta no base is needed.
        pinned: the root that is believed.
        now: the clock; today's when absent.
        revocations: in force.

    Raises:
        BundleError: it cannot be read so far.
    """
    with closing(BundleReader(beside(path))) as reader:
        head = reader.read_head()
        envelope = dsse.parse(head.envelope, "the signed manifest")
        manifest = manifests.parse(envelope.payload)
        reader.expect_documents(manifest)
        documents = {document.member: reader.read_document(document) for document in manifest.documents}
    verified, refusal = None, None
    if pinned is not None:
        try:
            verified = verify_head(head, pinned, now or datetime.now(UTC), revocations)
        except BundleError as error:
            refusal = error
    return Inspection(
        manifest,
        hashlib.sha256(envelope.payload).hexdigest(),
        tuple(signature.keyid for signature in envelope.signatures),
        documents,
        head.oms,
        len(head.roots),
        verified,
        refusal,
    )
