"""Verify a bundle without writing anything, and show an unbelieved view of one.

    verified = verify(Path("demo.bundle"), roots.load(Path("root.json")))

Verification is the importer's own pass with a sink that keeps only what judging needs, in memory.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bundles.base import BundleBase
from bundles.content.files import ModelFiles
from bundles.content.forbidden import HEAD_BYTES, TAIL_BYTES
from bundles.content.inspector import Inspector
from bundles.content.safetensors import header_end
from bundles.format import manifest as manifests
from bundles.format.errors import BundleError
from bundles.format.manifest import File, Manifest
from bundles.format.source import beside
from bundles.pipeline import Base, Progress, Report, Sink, Terms, no_base, read_bundle
from bundles.reader import BundleReader
from bundles.trust import dsse
from bundles.trust.policy import Site, Verified, check_policy, verify_head
from bundles.trust.roots import Root


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
) -> Verified:
    """Verify every signature, chunk and file of a bundle against a trust root; what was signed.

    Args:
        path: the bundle: a file, the first of its volumes with the others beside it, or a folder.
        pinned: the root that is believed.
        site: clock and floors to hold it to; today's clock and no floors when absent.
        inspector: runs engine-inspect.
        report: is told the progress.
        bases: for a delta, the bundle that it was made against; for a chain of deltas all before it, in any order.

    Raises:
        BundleError: every code of docs/bundle-format.md.
    """
    site = site or Site(datetime.now(UTC))

    def gate(verified: Verified) -> bool:
        check_policy(verified, site)
        return True

    with ExitStack() as stack:

        def base(manifest: Manifest) -> Base:
            if not bases:
                return no_base(manifest)
            return stack.enter_context(BundleBase(bases, manifest.base or ""))

        reader = stack.enter_context(closing(BundleReader(beside(path))))
        sink = stack.enter_context(closing(MemorySink()))
        terms = Terms(pinned, site.now, gate, inspector or Inspector(), base)
        accepted = read_bundle(reader, terms, sink, report)
    return accepted if isinstance(accepted, Verified) else accepted.verified


class MemorySink(Sink):
    """Keeps in anonymous memory what judging reads: small files whole, of weights the header and the end.

    All files lie one after the other in one sparse piece of memory; what is not kept takes none.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("bundle-files", os.MFD_CLOEXEC)
        self._begins: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._at = File.model_construct(path="", size=0)
        self._keep = 0

    @property
    def sizes(self) -> Mapping[str, int]:
        """See `content.files.ModelFiles`."""
        return self._sizes

    def read(self, path: str, offset: int, length: int) -> bytes:
        """See `content.files.ModelFiles`."""
        wanted = max(0, min(length, self._sizes[path] - offset))
        return os.pread(self._fd, wanted, self._begins[path] + offset)

    def begin(self, file: File, told: Callable[[int], None]) -> int:
        """See `pipeline.Sink`; nothing is here already."""
        self._begins[file.path] = os.lseek(self._fd, 0, os.SEEK_END)
        self._sizes[file.path] = file.size
        self._at = file
        self._keep = 0 if file.role == "weights" else file.size
        os.ftruncate(self._fd, self._begins[file.path] + file.size)
        return 0

    def write(self, offset: int, block: memoryview) -> None:
        """See `pipeline.Sink`."""
        if offset == 0 and self._keep == 0:
            # A header that cannot be is refused in judging; its first bytes are enough for that.
            self._keep = HEAD_BYTES
            with suppress(BundleError):
                self._keep = max(HEAD_BYTES, header_end(bytes(block[:8]), self._at.size, "the file"))
        tail = self._at.size - TAIL_BYTES
        self._put(offset, block[: max(0, self._keep - offset)])
        self._put(max(offset, tail), block[max(0, tail - offset) :])

    def end(self, file: File) -> None:
        """See `pipeline.Sink`."""

    def keep(self, digest: str, content: bytes) -> None:
        """See `pipeline.Sink`."""

    def files(self) -> ModelFiles:
        """See `pipeline.Sink`."""
        return self

    def close(self) -> None:
        """Give the memory back."""
        os.close(self._fd)

    def _put(self, offset: int, block: memoryview) -> None:
        if block:
            os.pwrite(self._fd, block, self._begins[self._at.path] + offset)


@dataclass(frozen=True)
class Inspection:
    """What a bundle says about itself, and whether that may be believed.

    Attributes:
        manifest: as found in the bundle.
        model_digest: SHA-256 of the manifest's bytes, hex.
        keyids: key ids the manifest's signatures name.
        has_oms: a publisher's signature is in it.
        roots: how many trust roots it brings.
        verified: the signed statements, when a root was given and they hold.
        refusal: why they do not.
    """

    manifest: Manifest
    model_digest: str
    keyids: tuple[str, ...]
    has_oms: bool
    roots: int
    verified: Verified | None = None
    refusal: BundleError | None = None


def inspect(path: Path, pinned: Root | None = None) -> Inspection:
    """Read a bundle's head; with a root, its signatures too. No chunk is read, so no file is verified.

    Raises:
        BundleError: the head cannot be read.
    """
    with closing(BundleReader(beside(path))) as reader:
        head = reader.read_head()
    envelope = dsse.parse(head.envelope, "the signed manifest")
    verified, refusal = None, None
    if pinned is not None:
        try:
            verified = verify_head(head, pinned, datetime.now(UTC))
        except BundleError as error:
            refusal = error
    return Inspection(
        manifests.parse(envelope.payload),
        hashlib.sha256(envelope.payload).hexdigest(),
        tuple(signature.keyid for signature in envelope.signatures),
        head.oms is not None,
        len(head.roots),
        verified,
        refusal,
    )
