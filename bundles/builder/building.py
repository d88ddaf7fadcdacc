"""A bundle from a model's folder: judged as importing will judge it, hashed, described, written."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Lock

from pydantic import ValidationError

from bundles.builder import sources
from bundles.builder.preparing import Preparation
from bundles.builder.release import Output, Release
from bundles.builder.sources import ModelFolder
from bundles.builder.stating import (
    Base,
    Parts,
    carried_chunks,
    first_fault,
    make_manifest,
    make_statements,
)
from bundles.builder.writing import BundleWriter, check_place, writing
from bundles.content import forbidden
from bundles.content.inspector import Inspector, Verdict
from bundles.content.judge import judge, model_of
from bundles.format import manifest as manifests
from bundles.format.chunks import CHUNK_SIZE, MIN_CHUNK_SIZE, Extent, extents
from bundles.format.errors import BundleError
from bundles.format.manifest import File, Manifest, Resources, Statement
from bundles.format.members import encode_hints, header_hints
from bundles.format.paths import check_paths
from bundles.format.source import beside
from bundles.pipeline import Progress, Report, State
from bundles.reader import BundleReader
from bundles.trust import dsse, oms
from bundles.trust.policy import Head

_MOST_THREADS = 4


def _silent(_: Progress) -> None:
    """Report nothing."""


def build(
    release: Release,
    model: Path,
    out: Path,
    *,
    output: Output | None = None,
    inspector: Inspector | None = None,
    report: Report = _silent,
    preparation: Preparation | None = None,
) -> Manifest:
    """Write an unsigned bundle of the files in `model`; its manifest. The same input gives the same bytes.

    Hidden files are left out. `canaries.json` becomes the manifest's canaries and `model.sig` the publisher's
    signature, or provenance where the site signs itself; neither is a file of the model. Statements of provenance
    and the bill of materials are made here; `preparation` says what `model` was made from, and makes it the site's
    to sign. The first volume, or the bundle, is `volume_paths(out, ..)`.

    Raises:
        BundleError: RELEASE_INVALID, OUTPUT_EXISTS; the folder, its files or the base are refused.
    """
    output = output or Output()
    if preparation is not None:
        release = replace(release, site_publisher=True)
    _check_release(release, output)
    check_place(out, directory=output.directory)
    base = _read_base(release, output)
    with sources.opened(model) as files:
        parts = replace(_look(release, model, files, inspector or Inspector(), report), preparation=preparation)
        attestations = [*make_statements(release, output, base, parts), *parts.given]
        manifest = make_manifest(release, output, base, parts, [document for document, _ in attestations])
        documents = {document.member: content for document, content in (*attestations, *parts.licences)}
        _write(out, manifest, parts.signature, documents, files, base, output, report)
    return manifest


def check(release: Release, model: Path, out: Path, *, output: Output | None = None) -> None:
    """Refuse what `build` would refuse, as far as no weights are needed: before hours of converting or quantising.

    Raises:
        BundleError: as `build`.
    """
    output = output or Output()
    _check_release(release, output)
    check_place(out, directory=output.directory)
    _read_base(release, output)
    sources.documents("attest", release.attestations)
    sources.documents("licence", release.licence_files)
    if not model.is_dir():
        return  # what a GGUF file becomes is known when it is converted
    with sources.opened(model) as files:
        forbidden.check_names(files.sizes)
        check_paths(files.sizes)
    sources.licences(model, release.licence_files, release.licence)
    sources.canaries(model / sources.CANARIES)


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
        raise BundleError("RELEASE_INVALID", first_fault(error)) from None
    if (release.kind == "model") == bool(release.requires):
        need = "needs no other" if release.requires else "needs one: name it with --requires"
        raise BundleError("RELEASE_INVALID", f"the kind {release.kind} {need}")
    if release.chunk_size % MIN_CHUNK_SIZE or not MIN_CHUNK_SIZE <= release.chunk_size <= CHUNK_SIZE:
        raise BundleError(
            "RELEASE_INVALID", f"chunks have {MIN_CHUNK_SIZE} to {CHUNK_SIZE} bytes, in steps of {MIN_CHUNK_SIZE}"
        )
    if output.directory and output.volume_size is not None:
        raise BundleError("RELEASE_INVALID", "a folder is not split into volumes")


def _read_base(release: Release, output: Output) -> Base:
    if output.base is None:
        return Base()
    with closing(BundleReader(beside(output.base))) as reader:
        envelope = dsse.parse(reader.read_head().envelope, "the base's manifest")
    manifest = manifests.parse(envelope.payload)
    if not envelope.signatures:
        raise BundleError("RELEASE_INVALID", f"{output.base} is not signed yet; signing changes what it is")
    if manifest.chunk_size != release.chunk_size:
        raise BundleError("RELEASE_INVALID", f"{output.base} cuts its files into chunks of another size")
    digest = hashlib.sha256(envelope.payload).hexdigest()
    return Base(digest, frozenset(chunk for file in manifest.files for chunk in file.chunks))


def _look(release: Release, model: Path, files: ModelFolder, inspector: Inspector, report: Report) -> Parts:
    forbidden.check_names(files.sizes)
    check_paths(files.sizes)
    licences = sources.licences(model, release.licence_files, release.licence, accept=release.accept_licence)
    canaries = sources.canaries(model / sources.CANARIES)
    given = sources.documents("attest", release.attestations)
    published = sources.read_optional(model / sources.PUBLISHED_SIGNATURE)
    if published is not None and not release.site_publisher:  # as provenance any signature will do
        oms.read(published)
    verdict = judge(files, inspector, release.kind)
    if canaries[0] and release.kind == "model":
        _check_answers(verdict)
    listed = _describe_all(files, release.chunk_size, report)
    return Parts(
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


def _check_answers(verdict: Verdict) -> None:
    """Refuse canaries, which are conversations, of a model that has none: no version of it could become active."""
    if "chat" not in verdict.capabilities:
        able = ", ".join(verdict.capabilities)
        raise BundleError(
            "CANARIES_UNANSWERED",
            f"{sources.CANARIES} has conversations, and the model answers {able}; leave the file out",
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


def _write(
    out: Path,
    manifest: Manifest,
    signature: bytes | None,
    documents: dict[str, bytes],
    files: ModelFolder,
    base: Base,
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
