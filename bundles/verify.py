"""Verify a bundle without writing anything, and show an unbelieved view of one.

    verified = verify(Path("demo.bundle"), roots.load(Path("root.json")))

Verification is the importer's own pass with a sink that keeps only what judging needs, in memory.
"""

import hashlib
import os
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bundles.content.inspector import Inspector
from bundles.content.safetensors import header_end
from bundles.format import manifest as manifests
from bundles.format.errors import BundleError
from bundles.format.manifest import File, Manifest
from bundles.format.source import beside
from bundles.pipeline import Progress, Report, Terms, read_bundle
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
) -> Verified:
    """Verify every signature, chunk and file of a bundle against a trust root; what was signed.

    Args:
        path: the bundle.
        pinned: the root that is believed.
        site: clock and floors to hold it to; today's clock and no floors when absent.
        inspector: runs engine-inspect.
        report: is told the progress.

    Raises:
        BundleError: every code of docs/bundle-format.md.
    """
    site = site or Site(datetime.now(UTC))

    def gate(verified: Verified) -> bool:
        check_policy(verified, site)
        return True

    terms = Terms(pinned, site.now, gate, inspector or Inspector())
    sink = MemorySink()
    try:
        with closing(BundleReader(beside(path))) as reader:
            accepted = read_bundle(reader, terms, sink, report)
    finally:
        sink.close()
    return accepted if isinstance(accepted, Verified) else accepted.verified


class MemorySink:
    """Keeps in anonymous memory what judging reads: small files whole, of weights the header and a hole."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[int, int]] = {}
        self._fd = -1
        self._keep = 0

    def begin(self, file: File) -> None:
        """See `pipeline.Sink`."""
        self._fd = os.memfd_create("bundle-file", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, file.size)
        self._keep = 0 if file.role == "weights" else file.size

    def write(self, offset: int, block: memoryview) -> None:
        """See `pipeline.Sink`."""
        if offset == 0 and self._keep == 0:
            # A header that cannot be is refused in judging; its first bytes are enough for that.
            self._keep = len(block)
            with suppress(BundleError):
                self._keep = header_end(bytes(block[:8]), os.fstat(self._fd).st_size, "the file")
        wanted = block[: max(0, self._keep - offset)]
        if wanted:
            os.pwrite(self._fd, wanted, offset)

    def end(self, file: File) -> None:
        """See `pipeline.Sink`."""
        read_only = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._files[file.path] = (read_only, file.size)
        self._close_current()

    def keep(self, digest: str, content: bytes) -> None:
        """See `pipeline.Sink`."""

    def files(self) -> Mapping[str, tuple[int, int]]:
        """See `pipeline.Sink`."""
        return self._files

    def close(self) -> None:
        """Give the memory back."""
        self._close_current()
        for fd, _ in self._files.values():
            os.close(fd)
        self._files.clear()

    def _close_current(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


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
