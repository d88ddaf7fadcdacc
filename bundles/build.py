"""Build a bundle from a model's folder, and sign one.

    manifest = build(Release(name="demo", version="1.0.0", sequence=1), Path("model"), Path("demo.bundle"))
    sign(Path("demo.bundle"), Signing(root=root, release_keys=(release,), publisher_key=publisher))

Building judges the folder as importing will. Signing copies the bundle and verifies every chunk on the way, so no
key ever signs for bytes that are not there.
"""

import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from bundles import sources
from bundles.content import forbidden
from bundles.content.inspector import Inspector
from bundles.content.judge import judge, model_of
from bundles.durable import replacing
from bundles.format import manifest as manifests
from bundles.format.chunks import CHUNK_SIZE, Extent, extents, read_extent
from bundles.format.container import ContainerWriter
from bundles.format.errors import BundleError
from bundles.format.manifest import File, Manifest, Resources, Statement
from bundles.format.members import (
    END,
    HEADER,
    MANIFEST,
    OMS,
    encode_hints,
    end_document,
    header_hints,
    root_member,
)
from bundles.format.paths import check_paths
from bundles.format.source import beside
from bundles.pipeline import Progress, Report, State, stream_payload
from bundles.reader import BundleReader
from bundles.trust import dsse, oms
from bundles.trust.policy import ENGINE_VERSION, Head
from bundles.trust.publishers import verify_model
from bundles.trust.roots import Root, parse
from bundles.trust.signers import Signer


@dataclass(frozen=True)
class Release:
    """What a release states about a model beyond its files.

    Attributes:
        name: the model's name: lower case, digits, '.', '_', '-'.
        version: free text without spaces, shown to people.
        sequence: grows with every release of this name; an appliance never goes back.
        licence: SPDX expression; where empty, the one that the folder's model card states.
        licence_files: its text, where the folder has no LICENSE file.
        attestations: provenance, bill of materials, scan reports; carried as they are.
        targets: appliances it is for; any where empty.
        expires: when it stops being importable.
        issued_at: now where not given.
        chunk_size: bytes; smaller in tests only.
    """

    name: str
    version: str
    sequence: int
    licence: str = ""
    licence_files: tuple[Path, ...] = ()
    attestations: tuple[Path, ...] = ()
    targets: tuple[str, ...] = ()
    expires: datetime | None = None
    issued_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    chunk_size: int = CHUNK_SIZE


@dataclass(frozen=True)
class Signing:
    """Who signs.

    Attributes:
        root: the trust root whose keys these are; it travels in the bundle.
        release_keys: sign the manifest; more may be added in later rounds until the role's threshold is met.
        publisher_key: signs the model (ECDSA).
        oms: a publisher's existing OMS signature, kept byte for byte, instead of `publisher_key`.
    """

    root: Root
    release_keys: tuple[Signer, ...] = ()
    publisher_key: Signer | None = None
    oms: bytes | None = None


def _silent(_: Progress) -> None:
    """Report nothing."""


def build(
    release: Release, model: Path, out: Path, *, inspector: Inspector | None = None, report: Report = _silent
) -> Manifest:
    """Write an unsigned bundle of the files in `model`; its manifest, of kind model.

    Hidden files are left out. `canaries.json` becomes the manifest's canaries and `model.sig` the publisher's
    signature; neither is a file of the model.

    Raises:
        BundleError: RELEASE_INVALID; the folder or its files are refused.
    """
    _check_release(release)
    with sources.opened(model) as files:
        forbidden.check_names(files)
        check_paths(files)
        verdict = judge({path: (fd, os.fstat(fd).st_size) for path, fd in files.items()}, inspector or Inspector())
        listed = tuple(sources.describe(path, fd, release.chunk_size) for path, fd in files.items())
        licences = sources.licences(model, release.licence_files, release.licence)
        attestations = sources.documents("attest", release.attestations)
        published = sources.read_optional(model / sources.PUBLISHED_SIGNATURE)
        manifest = _manifest(
            release,
            files=listed,
            model=model_of(verdict, {file.path: file.sha256 for file in listed}),
            oms_sha256=hashlib.sha256(published).hexdigest() if published else None,
            attestations=tuple(document for document, _ in attestations),
            licences=tuple(licence for licence, _ in licences),
            canary=sources.canaries(model / sources.CANARIES),
        )
        documents = [content for _, content in (*attestations, *licences)]
        _write(out, manifest, published, documents, files, report)
    return manifest


def _check_release(release: Release) -> None:
    """Refuse what no manifest may state, before any file is read."""
    try:
        Statement(
            name=release.name,
            version=release.version,
            sequence=release.sequence,
            targets=release.targets,
            spdx=release.licence or "NOASSERTION",
        )
    except ValidationError as error:
        raise BundleError("RELEASE_INVALID", _first(error)) from None


def sign(path: Path, signing: Signing, *, report: Report = _silent) -> tuple[str, ...]:
    """Sign a bundle, in place; the key ids that have signed its manifest now.

    The publisher signs first: the manifest names that signature, so a new one would void every release signature.

    Raises:
        BundleError: ALREADY_SIGNED, KEY_NOT_IN_ROLE, OMS_MISSING, OMS_FILES_DIFFER, or the bundle itself is
            refused.
    """
    _check_roles(signing)
    reader = BundleReader(beside(path))
    try:
        head = reader.read_head()
        envelope = dsse.parse(head.envelope, "the signed manifest")
        manifest = manifests.parse(envelope.payload)
        if envelope.signatures and signing.publisher_key is not None:
            raise _already_signed(len(envelope.signatures))
        oms_raw = _publisher_signature(manifest, head, signing)
        digest = hashlib.sha256(oms_raw).hexdigest()
        if digest != manifest.oms_sha256:
            if envelope.signatures:
                raise _already_signed(len(envelope.signatures))
            manifest = manifest.model_copy(update={"oms_sha256": digest})
            envelope = dsse.Envelope(manifest.encode(), manifests.PAYLOAD_TYPE)
        for signer in signing.release_keys:
            envelope = envelope.signed_by(signer)
        signed = replace(head, roots=_roots(head, signing.root), envelope=envelope.encode(), oms=oms_raw)
        _copy(reader, manifest, signed, path, report)
    finally:
        reader.close()
    return tuple(signature.keyid for signature in envelope.signatures)


def _already_signed(signatures: int) -> BundleError:
    return BundleError(
        "ALREADY_SIGNED",
        f"{signatures} release signature(s) hold with the publisher's signature that is there; give a release key "
        "alone, or build the bundle again",
    )


def _check_roles(signing: Signing) -> None:
    held = [("release", signer) for signer in signing.release_keys]
    held += [("publisher", signing.publisher_key)] if signing.publisher_key else []
    for role, signer in held:
        if signer.key.keyid not in signing.root.roles[role].keyids:
            raise BundleError("KEY_NOT_IN_ROLE", f"the {role} key is not one of the trust root's {role} keys")


def _publisher_signature(manifest: Manifest, head: Head, signing: Signing) -> bytes:
    resources = [oms.Resource(file.path, file.sha256) for file in manifest.files]
    if signing.publisher_key is not None:
        raw: bytes | None = oms.sign_model(manifest.name, resources, signing.publisher_key)
    else:
        raw = signing.oms if signing.oms is not None else head.oms
    if raw is None:
        raise BundleError("OMS_MISSING", "the model has no publisher's signature yet; give a publisher key")
    signed = verify_model(raw, signing.root, datetime.now(UTC))
    oms.check_files(signed.resources, {resource.name: resource.digest for resource in resources})
    return raw


def _roots(head: Head, root: Root) -> tuple[bytes, ...]:
    """The bundle's chain with `root` in it, oldest first."""
    chain = {parse(raw).version: raw for raw in head.roots} | {root.version: root.raw}
    return tuple(chain[version] for version in sorted(chain))


class _CopySink:
    """Writes verified chunks into a new container."""

    def __init__(self, writer: ContainerWriter, chunk_size: int) -> None:
        self._writer = writer
        self._chunk_size = chunk_size
        self._file: File | None = None

    def begin(self, file: File) -> None:
        """See `pipeline.Sink`."""
        self._file = file

    def write(self, offset: int, block: memoryview) -> None:
        """See `pipeline.Sink`."""
        if self._file is not None and offset % self._chunk_size == 0:
            digest = self._file.chunks[offset // self._chunk_size]
            self._writer.begin(f"c/{digest}", min(self._chunk_size, self._file.size - offset))
        self._writer.write(block)

    def end(self, file: File) -> None:
        """See `pipeline.Sink`."""

    def keep(self, digest: str, content: bytes) -> None:
        """See `pipeline.Sink`."""

    def files(self) -> Mapping[str, tuple[int, int]]:
        """See `pipeline.Sink`."""
        return {}


def _copy(reader: BundleReader, manifest: Manifest, head: Head, path: Path, report: Report) -> None:
    at = Progress(State.STREAMING, bytes_total=manifest.total_size, model_version=manifest.reference)
    with replacing(path) as stream:
        writer = ContainerWriter(stream)
        _write_head(writer, manifest, head)
        reader.expect(manifest)
        for document in manifest.documents:
            writer.add(document.member, reader.read_document(document))
        stream_payload(reader, manifest, _CopySink(writer, manifest.chunk_size), at, report)
        reader.read_end()
        writer.add(END, encode_hints(end_document(manifest, manifest.chunk_count)))
        writer.close()


def _write_head(writer: ContainerWriter, manifest: Manifest, head: Head) -> None:
    writer.add(HEADER, head.header)
    for raw in head.roots:
        writer.add(root_member(parse(raw).version), raw)
    writer.add(MANIFEST, head.envelope)
    if head.oms is not None:
        writer.add(OMS, head.oms)


def _write(
    out: Path,
    manifest: Manifest,
    published: bytes | None,
    documents: Sequence[bytes],
    files: Mapping[str, int],
    report: Report,
) -> None:
    envelope = dsse.Envelope(manifest.encode(), manifests.PAYLOAD_TYPE)
    head = Head(encode_hints(header_hints(manifest)), (), envelope.encode(), published)
    at = Progress(State.STREAMING, bytes_total=manifest.total_size, model_version=manifest.reference)
    with replacing(out) as stream:
        writer = ContainerWriter(stream)
        _write_head(writer, manifest, head)
        for document, content in zip(manifest.documents, documents, strict=True):
            writer.add(document.member, content)
        for file in manifest.files:
            for extent, digest in zip(extents(file.size, manifest.chunk_size), file.chunks, strict=True):
                _write_chunk(writer, files[file.path], extent, digest)
                at = replace(at, bytes_done=at.bytes_done + extent.length, file=file.path)
                report(at)
        writer.add(END, encode_hints(end_document(manifest, manifest.chunk_count)))
        writer.close()


def _write_chunk(writer: ContainerWriter, fd: int, extent: Extent, digest: str) -> None:
    writer.begin(f"c/{digest}", extent.length)
    chunk = hashlib.sha256()
    for block in read_extent(fd, extent):
        chunk.update(block)
        writer.write(block)
    if chunk.hexdigest() != digest:
        raise BundleError("SOURCE_CHANGED", "a file changed while the bundle was built; leave the folder alone")


def _manifest(release: Release, *, files: tuple[File, ...], **parts: object) -> Manifest:
    fields = {
        "schema": manifests.SCHEMA,
        "bundle_id": secrets.token_hex(16),
        "product": manifests.PRODUCT,
        "kind": "model",
        "name": release.name,
        "version": release.version,
        "sequence": release.sequence,
        "issued_at": manifests.format_time(release.issued_at),
        "not_before": manifests.format_time(release.issued_at),
        "expires": manifests.format_time(release.expires) if release.expires else None,
        "min_engine": ENGINE_VERSION,
        "supersedes": None,
        "base": None,
        "targets": release.targets,
        "requires": (),
        "resources": Resources(gpu_memory=0, gpus=0),
        "chunk_size": release.chunk_size,
        "files": files,
        "total_size": sum(file.size for file in files),
        "volumes": (),
        "canary_pass_percent": 100,
        "critical": (),
        **parts,
    }
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        raise BundleError("MANIFEST_SCHEMA", _first(error)) from None
    return manifests.parse(manifest.encode())


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where} cannot be {first['input']!a}: {first['msg']}"
