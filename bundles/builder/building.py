"""A bundle from a model's folder: judged as importing will judge it, hashed, described, written."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

from pydantic import ValidationError

from bundles.attest.card import Card
from bundles.attest.facts import Facts
from bundles.attest.mlbom import bill_of_materials
from bundles.attest.slsa import provenance
from bundles.builder import sources
from bundles.builder.release import Output, Release
from bundles.builder.sources import ModelFolder
from bundles.builder.volumes import member_size, plan_volumes
from bundles.builder.writing import BundleWriter, writing
from bundles.content import forbidden
from bundles.content.inspector import Inspector, Verdict
from bundles.content.judge import judge, model_of
from bundles.format import manifest as manifests
from bundles.format.chunks import CHUNK_SIZE, MIN_CHUNK_SIZE, Extent, extents
from bundles.format.errors import BundleError
from bundles.format.manifest import Canary, Document, File, Licence, Manifest, Model, Resources, Statement
from bundles.format.members import MAX_HEADER, encode_hints, header_hints
from bundles.format.paths import check_paths
from bundles.format.source import beside
from bundles.pipeline import Progress, Report, State
from bundles.reader import BundleReader
from bundles.trust import dsse, oms
from bundles.trust.policy import ENGINE_VERSION, Head

SLSA, MLBOM, UPSTREAM = "attest/slsa.json", "attest/mlbom.json", "attest/upstream-model.sig"
_MOST_THREADS = 4
_BYTES_SIGNED_PER_FILE = 160  # in an OMS signature, beyond the path: digest, names of fields, base64


def _silent(_: Progress) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class _Base:
    """What a delta builds on: the digest of its manifest, its chunks, and how it cuts files."""

    digest: str | None = None
    chunks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Parts:
    """What was found in the folder and beside it."""

    files: tuple[File, ...]
    model: Model
    details: dict[str, str]
    licences: list[tuple[Licence, bytes]]
    canaries: tuple[tuple[Canary, ...], int]
    card: Card
    signature: bytes | None
    upstream: bytes | None
    given: list[tuple[Document, bytes]]


def build(
    release: Release,
    model: Path,
    out: Path,
    *,
    output: Output | None = None,
    inspector: Inspector | None = None,
    report: Report = _silent,
) -> Manifest:
    """Write an unsigned bundle of the files in `model`; its manifest. The same input gives the same bytes.

    Hidden files are left out. `canaries.json` becomes the manifest's canaries and `model.sig` the publisher's
    signature, or provenance where the site signs itself; neither is a file of the model. Statements of provenance
    and the bill of materials are made here. The first volume, or the bundle, is `volume_paths(out, ..)`.

    Raises:
        BundleError: RELEASE_INVALID, OUTPUT_EXISTS; the folder, its files or the base are refused.
    """
    output = output or Output()
    _check_release(release, output)
    base = _read_base(release, output)
    with sources.opened(model) as files:
        parts = _look(release, model, files, inspector or Inspector(), report)
        attestations = [*_statements(release, output, base, parts), *parts.given]
        manifest = _manifest(release, output, base, parts, [document for document, _ in attestations])
        documents = {document.member: content for document, content in (*attestations, *parts.licences)}
        _write(out, manifest, parts.signature, documents, files, base, output, report)
    return manifest


def _check_release(release: Release, output: Output) -> None:
    """Refuse what no manifest may state, before any file is read."""
    try:
        Statement(
            name=release.name,
            version=release.version,
            sequence=release.sequence,
            targets=release.targets,
            spdx=release.licence or "NOASSERTION",
        )
        Resources(gpu_memory=release.gpu_memory, gpus=release.gpus)
    except ValidationError as error:
        raise BundleError("RELEASE_INVALID", _first(error)) from None
    if (release.kind == "model") == bool(release.requires):
        need = "needs no other" if release.requires else "needs one: name it with --requires"
        raise BundleError("RELEASE_INVALID", f"the kind {release.kind} {need}")
    if release.chunk_size % MIN_CHUNK_SIZE or not MIN_CHUNK_SIZE <= release.chunk_size <= CHUNK_SIZE:
        raise BundleError(
            "RELEASE_INVALID", f"chunks have {MIN_CHUNK_SIZE} to {CHUNK_SIZE} bytes, in steps of {MIN_CHUNK_SIZE}"
        )
    if output.directory and output.volume_size is not None:
        raise BundleError("RELEASE_INVALID", "a folder is not split into volumes")


def _read_base(release: Release, output: Output) -> _Base:
    if output.base is None:
        return _Base()
    with closing(BundleReader(beside(output.base))) as reader:
        envelope = dsse.parse(reader.read_head().envelope, "the base's manifest")
    manifest = manifests.parse(envelope.payload)
    if not envelope.signatures:
        raise BundleError("RELEASE_INVALID", f"{output.base} is not signed yet; signing changes what it is")
    if manifest.chunk_size != release.chunk_size:
        raise BundleError("RELEASE_INVALID", f"{output.base} cuts its files into chunks of another size")
    digest = hashlib.sha256(envelope.payload).hexdigest()
    return _Base(digest, frozenset(chunk for file in manifest.files for chunk in file.chunks))


def _look(release: Release, model: Path, files: ModelFolder, inspector: Inspector, report: Report) -> _Parts:
    forbidden.check_names(files.sizes)
    check_paths(files.sizes)
    licences = sources.licences(model, release.licence_files, release.licence, accept=release.accept_licence)
    canaries = sources.canaries(model / sources.CANARIES)
    given = sources.documents("attest", release.attestations)
    published = sources.read_optional(model / sources.PUBLISHED_SIGNATURE)
    if published is not None:
        oms.read(published)
    verdict = judge(files, inspector, release.kind)
    listed = _describe_all(files, release.chunk_size, report)
    return _Parts(
        files=listed,
        model=model_of(verdict, {file.path: file.sha256 for file in listed}),
        details=_details(verdict),
        licences=licences,
        canaries=canaries,
        card=sources.card(model),
        signature=None if release.site_publisher else published,
        upstream=published if release.site_publisher else None,
        given=given,
    )


def _details(verdict: Verdict) -> dict[str, str]:
    return {name[:64]: value[:256] for name, value in sorted(verdict.facts.items())[:32]}


def _describe_all(files: ModelFolder, chunk_size: int, report: Report) -> tuple[File, ...]:
    """Every file's entry, several files at a time; hashing is the first half of the progress."""
    lock = Lock()
    at = Progress(State.STREAMING, bytes_total=2 * sum(files.sizes.values()))

    def describe(path: str) -> File:
        def told(count: int) -> None:
            nonlocal at
            with lock:
                at = replace(at, bytes_done=at.bytes_done + count, file=path)
                report(at)

        return sources.describe(files, path, chunk_size, told)

    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="build-hash") as pool:
        try:
            return tuple(pool.map(describe, files.sizes))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _statements(release: Release, output: Output, base: _Base, parts: _Parts) -> list[tuple[Document, bytes]]:
    """The attestations made here."""
    facts = Facts(
        name=release.name,
        version=release.version,
        sequence=release.sequence,
        kind=release.kind,
        issued_at=manifests.format_time(release.issued_at),
        tool_version=ENGINE_VERSION,
        files=parts.files,
        model=parts.model,
        details=parts.details,
        licences=tuple(licence for licence, _ in parts.licences),
        card=parts.card,
        requires=release.requires,
        base=base.digest,
        upstream=_upstream(parts),
        parameters={
            "targets": release.targets,
            "acceptLicence": release.accept_licence,
            "sitePublisher": release.site_publisher,
            "chunkSize": release.chunk_size,
            "volumeSize": output.volume_size,
            "canaries": len(parts.canaries[0]),
            "gpuMemory": release.gpu_memory,
            "gpus": release.gpus,
        },
    )
    made = [(SLSA, provenance(facts)), (MLBOM, bill_of_materials(facts))]
    made += [(UPSTREAM, parts.upstream)] if parts.upstream is not None else []
    return [sources.document(member, content) for member, content in made]


def _upstream(parts: _Parts) -> tuple[str, bool] | None:
    """The digest of the source's own signature, and whether it is over these very files."""
    if parts.upstream is None:
        return None
    theirs: dict[str, str] = {}
    with suppress(BundleError):  # one of another profile is kept, and compared with nothing
        theirs = dict(oms.read_statement(oms.read(parts.upstream).envelope.payload).resources)
    same = theirs == {file.path: file.sha256 for file in parts.files}
    return hashlib.sha256(parts.upstream).hexdigest(), same


def _manifest(
    release: Release, output: Output, base: _Base, parts: _Parts, attestations: list[Document]
) -> Manifest:
    fields: dict[str, object] = {
        "schema": manifests.SCHEMA,
        "bundle_id": "0" * 32,
        "product": manifests.PRODUCT,
        "kind": release.kind,
        "name": release.name,
        "version": release.version,
        "sequence": release.sequence,
        "issued_at": manifests.format_time(release.issued_at),
        "not_before": manifests.format_time(release.issued_at),
        "expires": manifests.format_time(release.expires) if release.expires else None,
        "min_engine": ENGINE_VERSION,
        "supersedes": None,
        "base": base.digest,
        "targets": release.targets,
        "requires": release.requires,
        "model": parts.model,
        "resources": Resources(gpu_memory=release.gpu_memory, gpus=release.gpus),
        "chunk_size": release.chunk_size,
        "files": parts.files,
        "total_size": sum(file.size for file in parts.files),
        "volumes": (),
        "oms_sha256": hashlib.sha256(parts.signature).hexdigest() if parts.signature else None,
        "attestations": tuple(attestations),
        "licences": tuple(licence for licence, _ in parts.licences),
        "canary": parts.canaries[0],
        "canary_pass_percent": parts.canaries[1],
        "critical": (),
    }
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        raise BundleError("MANIFEST_SCHEMA", _first(error)) from None
    if output.volume_size is not None:
        head = _head_size(manifest, parts.signature, output.signature_room)
        lengths = [length for _, length in carried_chunks(manifest, base.chunks)]
        manifest = manifest.model_copy(update={"volumes": plan_volumes(lengths, head, output.volume_size)})
    # What it is decides its name: equal bundles have equal ids, and no other bundle has this one.
    named = manifest.model_copy(update={"bundle_id": hashlib.sha256(manifest.encode()).hexdigest()[:32]})
    return manifests.parse(named.encode())


def _head_size(manifest: Manifest, signature: bytes | None, room: int) -> int:
    """Bytes before the chunks, with room for roots and signatures, among them one over every file."""
    signed = len(signature or b"") or sum(len(file.path) * 2 + _BYTES_SIGNED_PER_FILE for file in manifest.files)
    envelope = len(dsse.Envelope(manifest.encode(), manifests.PAYLOAD_TYPE).encode())
    members = [MAX_HEADER, envelope, signed, *(document.size for document in manifest.documents)]
    return sum(map(member_size, members)) + room


def carried_chunks(manifest: Manifest, left_out: frozenset[str]) -> list[tuple[str, int]]:
    """Digest and length of every chunk that is in the bundle, in order."""
    return [
        (digest, extent.length)
        for file in manifest.files
        for extent, digest in zip(extents(file.size, manifest.chunk_size), file.chunks, strict=True)
        if digest not in left_out
    ]


def _write(
    out: Path,
    manifest: Manifest,
    signature: bytes | None,
    documents: dict[str, bytes],
    files: ModelFolder,
    base: _Base,
    output: Output,
    report: Report,
) -> None:
    envelope = dsse.Envelope(manifest.encode(), manifests.PAYLOAD_TYPE)
    head = Head(encode_hints(header_hints(manifest)), (), envelope.encode(), signature)
    at = Progress(State.STREAMING, manifest.total_size, 2 * manifest.total_size, model_version=manifest.reference)
    carried = len(carried_chunks(manifest, base.chunks))
    with writing(out, manifest, carried, directory=output.directory) as writer:
        writer.write_head(head, documents)
        for file in manifest.files:
            fd = files.open(file.path)
            try:
                for extent, digest in zip(extents(file.size, manifest.chunk_size), file.chunks, strict=True):
                    if digest not in base.chunks:
                        _write_chunk(writer, fd, file.path, extent, digest)
                    at = replace(at, bytes_done=at.bytes_done + extent.length, file=file.path)
                    report(at)
            finally:
                os.close(fd)


def _write_chunk(writer: BundleWriter, fd: int, path: str, extent: Extent, digest: str) -> None:
    writer.begin_chunk(digest, extent.length)
    chunk = hashlib.sha256()
    for block in sources.blocks(fd, path, extent.offset, extent.length):
        chunk.update(block)
        writer.write(block)
    if chunk.hexdigest() != digest:
        raise BundleError("SOURCE_CHANGED", f"{path} changed while the bundle was built; repeat")


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where} cannot be {first['input']!a}: {first['msg']}"
