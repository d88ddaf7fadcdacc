"""Reads a bundle's members in their one order; what comes out of order, twice or unlisted is refused."""

import hashlib
from collections.abc import Iterator

from bundles.format import strict_json
from bundles.format.container import ContainerReader, Member
from bundles.format.errors import BundleError
from bundles.format.manifest import Document, Manifest
from bundles.trust.oms import MAX_SIGNATURE
from bundles.trust.policy import Head
from bundles.trust.roots import MAX_ROOT, MAX_ROOTS

HEADER = "header.json"
REVOCATION = "trust/revocation.json"
MANIFEST = "manifest.dsse.json"
OMS = "oms.sig"
END = "end.json"
FORMAT = "cloister.bundle"
FORMAT_VERSION = 1
MAX_HEADER = 4096
MAX_ENVELOPE = 44 * 1024 * 1024
_FIXED = frozenset({HEADER, REVOCATION, MANIFEST, OMS, END})


def root_member(version: int) -> str:
    """The member name of a trust root."""
    return f"trust/{version}.root.json"


def header_hints(manifest: Manifest) -> dict[str, object]:
    """What `header.json` says: hints for people and tools, believed by nobody."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bundle_id": manifest.bundle_id,
        "kind": manifest.kind,
        "name": manifest.name,
        "version": manifest.version,
        "total_size": manifest.total_size,
    }


def end_document(manifest: Manifest) -> dict[str, object]:
    """What `end.json` must say."""
    return {"bundle_id": manifest.bundle_id, "chunks": sum(len(file.chunks) for file in manifest.files)}


class BundleReader:
    """The members of an open bundle, front to back, once.

    Args:
        fd: a regular file; the caller closes it.
    """

    def __init__(self, fd: int) -> None:
        self.container = ContainerReader(fd)
        self._ahead: Member | None = None
        self._seen: set[str] = set()
        self._listed: frozenset[str] = _FIXED

    def read_head(self) -> Head:
        """Everything before the documents; nothing of it is believed yet.

        Raises:
            BundleError: HEADER_FORMAT, the CONTAINER and JSON codes.
        """
        header = self._read(HEADER, MAX_HEADER)
        hints = strict_json.parse_object(header, HEADER)
        if (hints.get("format"), hints.get("format_version")) != (FORMAT, FORMAT_VERSION):
            raise BundleError("HEADER_FORMAT", "this is no bundle of a format that this version reads")
        roots = tuple(self._roots())
        if self._peek() == REVOCATION:
            raise BundleError("REVOCATION_UNREADABLE", "the bundle carries revocations; it needs a newer Cloister")
        envelope = self._read(MANIFEST, MAX_ENVELOPE)
        found = self._peek() or ""
        if found in self._seen or found.startswith("trust/"):
            raise self._refusal(found, OMS)
        oms = self._read(OMS, MAX_SIGNATURE) if found == OMS else None
        return Head(header, roots, envelope, oms)

    def expect(self, manifest: Manifest) -> None:
        """Take the verified manifest, which decides what may come next."""
        names = {document.member for document in manifest.documents}
        names.update(f"c/{digest}" for file in manifest.files for digest in file.chunks)
        self._listed = _FIXED | names

    def read_document(self, document: Document) -> bytes:
        """An attestation or licence, verified.

        Raises:
            BundleError: DOCUMENT_DIGEST, the CONTAINER codes.
        """
        self._open(document.member, document.size)
        content = self.container.read(document.size)
        if hashlib.sha256(content).hexdigest() != document.sha256:
            raise BundleError("DOCUMENT_DIGEST", f"{document.member} is not the document that the manifest names")
        return content

    def open_chunk(self, digest: str, length: int) -> None:
        """Step to a chunk; its bytes come from `container.read_into`.

        Raises:
            BundleError: the CONTAINER codes.
        """
        self._open(f"c/{digest}", length)

    def read_end(self, manifest: Manifest, header: bytes) -> None:
        """The last member and the end of the file.

        Raises:
            BundleError: BUNDLE_MIXED, the CONTAINER and JSON codes.
        """
        end = strict_json.parse_object(self._read(END, MAX_HEADER), END)
        hints = strict_json.parse_object(header, HEADER)
        if end != end_document(manifest) or hints != header_hints(manifest):
            raise BundleError(
                "BUNDLE_MIXED", "the bundle's first, signed and last parts belong to different bundles"
            )
        found = self._peek()
        if found is not None:
            raise self._refusal(found, "the end")

    def _roots(self) -> Iterator[bytes]:
        previous = 0
        for _ in range(MAX_ROOTS + 1):
            name = self._peek() or ""
            number = name.removeprefix("trust/").removesuffix(".root.json")
            if not number.isdecimal() or name != root_member(int(number)):
                return
            if int(number) <= previous:
                raise self._refusal(name, "a newer trust root")
            previous = int(number)
            yield self._read(name, MAX_ROOT)
        raise BundleError("CONTAINER_UNLISTED", f"the bundle carries over {MAX_ROOTS} trust roots")

    def _peek(self) -> str | None:
        if self._ahead is None:
            self._ahead = self.container.next()
        return self._ahead.name if self._ahead else None

    def _read(self, name: str, limit: int) -> bytes:
        self._take(name)
        return self.container.read(limit)

    def _open(self, name: str, size: int) -> None:
        member = self._take(name)
        if member.size != size:
            raise BundleError("CONTAINER_MEMBER_SIZE", f"{name} has {member.size} bytes, the manifest says {size}")

    def _take(self, name: str) -> Member:
        found = self._peek()
        member, self._ahead = self._ahead, None
        if member is None or found != name:
            raise self._refusal(found, name)
        self._seen.add(name)
        return member

    def _refusal(self, found: str | None, expected: str) -> BundleError:
        if found is None or (found == END and expected != "the end"):
            return BundleError("CONTAINER_MISSING", f"the bundle ends where {expected} must be")
        if found in self._seen:
            return BundleError("CONTAINER_DUPLICATE", f"the bundle holds {found} twice")
        if found in self._listed or found.startswith("trust/"):
            return BundleError("CONTAINER_ORDER", f"the bundle has {found} where {expected} must be")
        return BundleError("CONTAINER_UNLISTED", f"the bundle has {found}, which no manifest lists")
