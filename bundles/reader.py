"""Reads a bundle's members in their one order, over all its volumes; what is out of order or unlisted is refused.

    reader = BundleReader(beside(Path("demo.bundle")))
    head = reader.read_head()          # nothing of it is believed
    reader.expect(manifest)            # parsed from what verified
    ...                                # read_document, open_chunk and read_into, or skip_chunk, in manifest order
    reader.read_end()

Sources are one volume's file or one folder each; this reader knows no difference between them. A volume is opened
for the first chunk that is wanted of it: one whose chunks are all skipped is never asked for.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate, chain, islice
from pathlib import Path

from bundles.format import members, strict_json
from bundles.format.container import ContainerReader, Member
from bundles.format.errors import BundleError
from bundles.format.folder import FolderReader
from bundles.format.manifest import Document, Manifest, Volume
from bundles.format.members import FIXED, MAX_HEADER, TrustHead
from bundles.format.source import Source, open_source
from bundles.trust.oms import MAX_SIGNATURE
from bundles.trust.policy import Head
from bundles.trust.roots import MAX_ROOT, MAX_ROOTS

_THE_END = "the end"


class BundleReader:
    """The members of a bundle, front to back, once.

    Args:
        volumes: opens a volume by its number, from 1; asked for the next one when the one before is at its end and
            closed. It may wait for a medium, and raise.
        head: what was kept of the first volume, up to its first chunk; without it the first volume is opened now.
    """

    def __init__(self, volumes: Callable[[int], Source], head: Source | None = None) -> None:
        self._volumes = volumes
        self._volume = 0 if head else 1
        self._source = head or volumes(1)
        self._read_before = 0
        self._ahead: Member | None = None
        self._seen: set[str] = set()
        self._manifest: Manifest | None = None
        self._listed = FIXED
        self._carried: frozenset[str] = frozenset()
        self._plan: tuple[Volume, ...] = ()
        self._ends: tuple[int, ...] = ()
        self._next = 0
        self._unopened: list[tuple[str, int]] = []
        self._kind = ""
        self.header = b""

    @property
    def bytes_read(self) -> int:
        """All bytes taken from the media so far."""
        return self._read_before + self._source.bytes_read

    def close(self) -> None:
        """Close the volume that is open."""
        self._source.close()

    def read_header(self) -> str:
        """Read the first member; the kind of bundle that it says this is: model, adapter, draft or trust.

        Raises:
            BundleError: HEADER_FORMAT, VOLUME_ORDER, the CONTAINER and JSON codes.
        """
        self.header = self._read(members.HEADER, MAX_HEADER)
        self._kind = members.check_first(self.header)
        return self._kind

    def read_head(self) -> Head:
        """Everything before the documents, and the header unless it was read; nothing of it is believed yet.

        Raises:
            BundleError: HEADER_FORMAT, VOLUME_ORDER, the CONTAINER and JSON codes.
        """
        if (self._kind or self.read_header()) == members.TRUST:
            raise BundleError(
                "HEADER_FORMAT", "this is a trust bundle, which holds no model (cloister trust show)"
            )
        roots = tuple(self._roots())
        revocation = self._revocation()
        envelope = self._read(members.MANIFEST, members.MAX_ENVELOPE)
        found = self._peek() or ""
        if found in self._seen or found.startswith("trust/"):
            raise self._refusal(found, members.OMS)
        oms = self._read(members.OMS, MAX_SIGNATURE) if found == members.OMS else None
        return Head(self.header, roots, envelope, oms, revocation)

    def read_trust(self) -> TrustHead:
        """All of a trust bundle behind the header that `read_header` read; nothing of it is believed yet.

        Raises:
            BundleError: HEADER_FORMAT, BUNDLE_MIXED, the CONTAINER and JSON codes.
        """
        if not members.same(strict_json.parse_object(self.header, members.HEADER), members.trust_header()):
            raise BundleError("HEADER_FORMAT", "this is no trust bundle of a format that this version reads")
        roots = tuple(self._roots())
        revocation = self._revocation()
        documents = len(roots) + (revocation is not None)
        if not documents and self._peek() == members.END:
            raise BundleError("CONTAINER_MISSING", "the trust bundle has neither a root nor revocations")
        self._read_end_document(members.trust_end(documents), "BUNDLE_MIXED")
        return TrustHead(self.header, roots, revocation)

    def expect(self, manifest: Manifest, base_chunks: frozenset[str] = frozenset()) -> None:
        """Take the verified manifest, which decides what may come next.

        Args:
            manifest: as it verified.
            base_chunks: digests of all chunks of the base that a delta names; they are not in the bundle.

        Raises:
            BundleError: BUNDLE_MIXED, BASE_ABSENT, MANIFEST_VOLUMES, CONTAINER_UNLISTED.
        """
        self._check_header(manifest)
        if manifest.base is not None and not base_chunks:
            raise BundleError(
                "BASE_ABSENT",
                f"the bundle holds only what changed since the model {manifest.base[:12]}.., which is not here; "
                "import that one first, or carry in the whole bundle",
            )
        absent = base_chunks if manifest.base is not None else frozenset()
        digests = (digest for file in manifest.files for digest in file.chunks)
        self._carried = frozenset(digest for digest in digests if digest not in absent)
        chunks = sum(digest in self._carried for file in manifest.files for digest in file.chunks)
        plan = manifest.volumes or (Volume(index=1, chunks=chunks),)
        if sum(volume.chunks for volume in plan) != chunks:
            raise BundleError(
                "MANIFEST_VOLUMES", f"the volumes do not carry {chunks} chunks, which the base lacks"
            )
        self._manifest, self._plan = manifest, plan
        self._ends = tuple(accumulate(volume.chunks for volume in plan))
        self._listed = FIXED | {document.member for document in manifest.documents}
        self._arrange([document.member for document in manifest.documents], 1)

    def expect_documents(self, manifest: Manifest) -> None:
        """Take a manifest, verified or not, to read the documents and nothing behind them; a delta needs no base.

        Raises:
            BundleError: BUNDLE_MIXED.
        """
        self._check_header(manifest)
        self._manifest = manifest
        self._listed = FIXED | {document.member for document in manifest.documents}
        names = (document.member for document in manifest.documents)
        self._ahead = self._source.arrange(names, self._ahead, all_of=False)

    def carries(self, digest: str) -> bool:
        """Whether a chunk of the manifest is in the bundle, and not left to the base."""
        return digest in self._carried

    def read_document(self, document: Document) -> bytes:
        """An attestation or licence, verified.

        Raises:
            BundleError: DOCUMENT_DIGEST, the CONTAINER codes.
        """
        self._open(document.member, document.size)
        content = self._source.read(document.size)
        if hashlib.sha256(content).hexdigest() != document.sha256:
            raise BundleError("DOCUMENT_DIGEST", f"{document.member} is not the document that the manifest names")
        return content

    def open_chunk(self, digest: str, length: int) -> None:
        """Step to a chunk, in the volume that has it; its bytes come from `read_into`.

        Raises:
            BundleError: the CONTAINER and VOLUME codes, and what the next volume's opening raises.
        """
        volume = self._volume_of_next()
        if volume != self._volume:
            self._enter(volume)
            for skipped in self._unopened:
                self._open_chunk(*skipped)
                self._source.skip()
            self._unopened.clear()
        self._open_chunk(digest, length)
        self._next += 1

    def read_into(self, buffer: memoryview) -> int:
        """Fill `buffer` from the chunk; how many bytes it got, fewer only at the chunk's end.

        Raises:
            BundleError: CONTAINER_TRUNCATED, SOURCE_CHANGED, SOURCE_UNREADABLE.
        """
        return self._source.read_into(buffer)

    def skip_chunk(self, digest: str, length: int) -> None:
        """Step over a chunk that is not needed any more; its bytes are not read, nor its volume opened for it.

        Raises:
            BundleError: as `open_chunk`.
        """
        if self._volume_of_next() == self._volume:
            self.open_chunk(digest, length)
            self._source.skip()
            return
        self._unopened.append((digest, length))
        self._next += 1

    def read_end(self) -> None:
        """The last member and the end of the last volume that was opened.

        Raises:
            BundleError: BUNDLE_MIXED, VOLUME_MIXED, the CONTAINER and JSON codes.
        """
        if self._volume:
            self._end_volume()

    def _volume_of_next(self) -> int:
        """Which volume carries the next chunk."""
        volume = min(bisect_right(self._ends, self._next) + 1, len(self._plan))
        if self._next == self._begin_of(volume):
            self._unopened.clear()  # they were in a volume before, of which nothing was wanted
        return volume

    def _begin_of(self, volume: int) -> int:
        """The place of a volume's first chunk among all that are carried."""
        return self._ends[volume - 1] - self._plan[volume - 1].chunks

    def _open_chunk(self, digest: str, length: int) -> None:
        self._open(members.chunk_member(digest), length)

    def _enter(self, volume: int) -> None:
        """Close the volume that is open, once it is known to end as it must, and open this one, at its chunks."""
        if self._volume:
            self._end_volume()
        self._source.close()
        self._read_before += self._source.bytes_read
        self._source, self._volume = self._volumes(volume), volume
        self._ahead = None
        self._seen = set()
        members.check_volume(self._read(members.HEADER, MAX_HEADER), self._known, volume)
        documents = self._known.documents if volume == 1 else ()
        if volume == 1:  # its head was believed already, from where it was kept
            self._pass_head()
        self._arrange([document.member for document in documents], volume)
        for document in documents:
            self.read_document(document)

    def _pass_head(self) -> None:
        """What stands between header and documents, in its order; whoever opened the volume compared it."""
        for _ in self._roots():
            pass
        self._revocation()
        self._read(members.MANIFEST, members.MAX_ENVELOPE)
        if self._peek() == members.OMS:
            self._read(members.OMS, MAX_SIGNATURE)

    def _end_volume(self) -> None:
        expected = members.end_document(self._known, self._plan[self._volume - 1].chunks, self._volume)
        self._read_end_document(expected, "VOLUME_MIXED" if len(self._plan) > 1 else "BUNDLE_MIXED")

    def _read_end_document(self, expected: dict[str, object], code: str) -> None:
        if not members.same(strict_json.parse_object(self._read(members.END, MAX_HEADER), members.END), expected):
            raise BundleError(
                code, f"{members.END} does not belong to what is before it: parts of two bundles or volumes"
            )
        found = self._peek()
        if found is not None:
            raise self._refusal(found, _THE_END)

    def _check_header(self, manifest: Manifest) -> None:
        hints = strict_json.parse_object(self.header, members.HEADER)
        if not members.same(hints, members.header_hints(manifest)):
            raise BundleError(
                "BUNDLE_MIXED", f"{members.HEADER} and the signed manifest belong to different bundles"
            )

    def _arrange(self, documents: list[str], volume: int) -> None:
        """Tell the source which members of a volume follow."""
        carried = (d for file in self._known.files for d in file.chunks if d in self._carried)
        chunks = islice(carried, self._begin_of(volume), self._ends[volume - 1])
        names = chain(documents, map(members.chunk_member, chunks))  # a file asks for none of them
        self._ahead = self._source.arrange(names, self._ahead)

    @property
    def _known(self) -> Manifest:
        if self._manifest is None:
            raise RuntimeError("what follows the head is read after expect()")
        return self._manifest

    def _roots(self) -> Iterator[bytes]:
        previous = 0
        for _ in range(MAX_ROOTS + 1):
            name = self._peek() or ""
            version = members.root_version(name)
            if version is None:
                return
            if version <= previous:
                raise self._refusal(name, "a newer trust root")
            previous = version
            yield self._read(name, MAX_ROOT)
        raise BundleError("CONTAINER_UNLISTED", f"the bundle carries over {MAX_ROOTS} trust roots")

    def _revocation(self) -> bytes | None:
        return (
            self._read(members.REVOCATION, members.MAX_REVOCATION) if self._peek() == members.REVOCATION else None
        )

    def _peek(self) -> str | None:
        if self._ahead is None:
            self._ahead = self._source.next()
        return self._ahead.name if self._ahead else None

    def _read(self, name: str, limit: int) -> bytes:
        self._take(name)
        return self._source.read(limit)

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
        if found is None or (found == members.END and expected != _THE_END):
            return BundleError("CONTAINER_MISSING", f"the bundle ends where {expected} must be")
        if found in self._seen:
            return BundleError("CONTAINER_DUPLICATE", f"the bundle holds {found} twice")
        if found in self._listed or found.startswith("trust/") or found.removeprefix("c/") in self._carried:
            return BundleError("CONTAINER_ORDER", f"the bundle has {found} where {expected} must be")
        return BundleError("CONTAINER_UNLISTED", f"the bundle has {found}, which no manifest lists")


def open_volume(path: Path, manifest: Manifest, wanted: int) -> ContainerReader | FolderReader:
    """Open a medium that must be volume `wanted` of this bundle, ready to be read from its beginning.

    Raises:
        BundleError: VOLUME_ORDER, VOLUME_MIXED, HEADER_FORMAT, the SOURCE, CONTAINER and JSON codes.
    """
    source = open_source(path)
    try:
        first = source.next()
        if first is None or first.name != members.HEADER:
            raise BundleError(
                "HEADER_FORMAT", f"{path} is no volume of a bundle: it does not begin with {members.HEADER}"
            )
        members.check_volume(source.read(MAX_HEADER), manifest, wanted)
        source.rewind()
    except BundleError:
        source.close()
        raise
    return source
