"""A bundle's head beside what is staged of it: the first volume up to its first chunk, not to be shown again.

It is a copy and no more believed than the medium: whoever opens it verifies it again, against the trust and the
clock of that moment. What a power cut tore is thrown away.
"""

import hashlib
import io
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bundles.durable import Fs
from bundles.format import manifest as manifests
from bundles.format import members
from bundles.format.container import ContainerReader, ContainerWriter, open_file
from bundles.format.errors import BundleError
from bundles.format.source import Source, open_source
from bundles.reader import BundleReader
from bundles.store.files import HEAD
from bundles.trust import dsse
from bundles.trust.policy import Head
from bundles.trust.roots import parse as parse_root


def keep(fs: Fs, folder: Path, head: Head, documents: Mapping[str, bytes]) -> None:
    """Write the members of a verified head into a staging folder, durably, unless they are there.

    Args:
        fs: how it is written.
        folder: of the model, in staging.
        head: the members before the documents.
        documents: attestations and licences by member name, in their order.
    """
    stream = io.BytesIO()
    writer = ContainerWriter(stream)
    writer.add(members.HEADER, head.header)
    for root in head.roots:
        writer.add(members.root_member(parse_root(root).version), root)
    if head.revocation is not None:
        writer.add(members.REVOCATION, head.revocation)
    writer.add(members.MANIFEST, head.envelope)
    if head.oms is not None:
        writer.add(members.OMS, head.oms)
    for name, content in documents.items():
        writer.add(name, content)
    writer.close()
    path = folder / HEAD
    with suppress(FileNotFoundError):
        if path.read_bytes() == stream.getvalue():
            return
    fs.write_file(path, stream.getvalue(), 0o600)


def open_kept(fs: Fs, folder: Path, model_digest: str) -> Source | None:
    """The head kept in a staging folder, to be read from its beginning; None without one, or with a damaged one.

    Args:
        fs: removes one that is damaged.
        folder: of the model, in staging.
        model_digest: SHA-256 of the manifest that it must hold.
    """
    path = folder / HEAD
    if not path.is_file():
        return None
    try:
        source = ContainerReader(open_file(path))
        try:
            _check(source, model_digest)
        except BundleError:
            source.close()
            raise
    except (BundleError, OSError):
        with suppress(OSError):
            fs.unlink(path)
        return None
    return source


def open_first(path: Path, model_digest: str) -> Source:
    """Open a medium that must be the first volume of the bundle with this manifest, ready to be read.

    Args:
        path: of the medium.
        model_digest: SHA-256 of the manifest; empty where that is not known yet.

    Raises:
        BundleError: VOLUME_MIXED, VOLUME_ORDER, the SOURCE, HEADER, CONTAINER and JSON codes.
    """
    source = open_source(path)
    try:
        reader = BundleReader(lambda _: source)
        reader.read_header()
        if model_digest:
            _payload_of(reader, model_digest)
        source.rewind()
    except BundleError:
        source.close()
        raise
    return source


def _check(source: Source, model_digest: str) -> None:
    """Read all of a kept head, and leave it at its beginning.

    Raises:
        BundleError: it is not what was kept.
    """
    reader = BundleReader(lambda _: source)
    manifest = manifests.parse(_payload_of(reader, model_digest))
    reader.expect_documents(manifest)
    for document in manifest.documents:
        reader.read_document(document)
    if source.next() is not None:
        raise BundleError("CONTAINER_UNLISTED", "the head that was kept has more members than a head has")
    source.rewind()


def _payload_of(reader: BundleReader, model_digest: str) -> bytes:
    """The manifest that stands in a head, if it is the one with this digest; its signatures are not looked at."""
    payload = dsse.parse(reader.read_head().envelope, "the signed manifest").payload
    if hashlib.sha256(payload).hexdigest() != model_digest:
        raise BundleError(
            "VOLUME_MIXED", "this is another bundle than the one whose import waits; its first volume is wanted"
        )
    return payload
