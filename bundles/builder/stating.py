"""What a bundle states of itself: its manifest, and the statements of provenance and materials that it names."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pydantic import ValidationError

from bundles.attest.card import Card
from bundles.attest.facts import Facts, Made, encode
from bundles.attest.mlbom import bill_of_materials
from bundles.attest.slsa import provenance
from bundles.builder import sources
from bundles.builder.preparing import Preparation
from bundles.builder.release import Output, Release
from bundles.builder.volumes import member_size, plan_volumes
from bundles.format import manifest as manifests
from bundles.format.chunks import extents
from bundles.format.errors import BundleError
from bundles.format.manifest import Canary, Document, File, Licence, Manifest, Model, Resources
from bundles.format.members import MAX_HEADER, MAX_REVOCATION
from bundles.trust import dsse, oms
from bundles.trust.policy import ENGINE_VERSION

SLSA, MLBOM, UPSTREAM = "attest/slsa.json", "attest/mlbom.json", "attest/upstream-model.sig"
PREPARATION = "attest/preparation.json"
_BYTES_SIGNED_PER_FILE = 160  # in an OMS signature, beyond the path: digest, names of fields, base64


@dataclass(frozen=True)
class Base:
    """What a delta builds on: SHA-256 of its manifest, and its chunks; nothing for a bundle that is whole."""

    digest: str | None = None
    chunks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Parts:
    """What was found in the folder and beside it.

    Attributes:
        files: every file.
        model: as it was judged.
        details: more of what engine-inspect found.
        licences: with their texts.
        canaries: and the percent of them that must pass.
        card: the model card.
        signature: the publisher's, to be kept as it is.
        upstream: the publisher's, to be kept as provenance.
        given: attestations that the caller names, with their contents.
        preparation: what the folder was made from, where it is not a person's own.
    """

    files: tuple[File, ...]
    model: Model
    details: dict[str, str]
    licences: list[tuple[Licence, bytes]]
    canaries: tuple[tuple[Canary, ...], int]
    card: Card
    signature: bytes | None
    upstream: bytes | None
    given: list[tuple[Document, bytes]]
    preparation: Preparation | None = None


def make_statements(release: Release, output: Output, base: Base, parts: Parts) -> list[tuple[Document, bytes]]:
    """The attestations made here."""
    prepared = None if parts.preparation is None else encode({"steps": parts.preparation.steps})
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
        made=_made(parts.preparation, prepared),
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
    made += [(PREPARATION, prepared)] if prepared is not None else []
    return [sources.document(member, content) for member, content in made]


def _made(preparation: Preparation | None, statement: bytes | None) -> Made | None:
    """What statements say of a preparation: its steps without the line for each matrix, its sources."""
    if preparation is None or statement is None:
        return None
    steps = tuple({key: value for key, value in step.items() if key != "matrices"} for step in preparation.steps)
    return Made(steps, preparation.sources, (PREPARATION, hashlib.sha256(statement).hexdigest()))


def _upstream(parts: Parts) -> tuple[str, bool] | None:
    """The digest of the source's own signature, and whether it is over these very files."""
    if parts.upstream is None:
        return None
    theirs: dict[str, str] = {}
    with suppress(BundleError):  # one of another profile is kept, and compared with nothing
        theirs = dict(oms.read_statement(oms.read(parts.upstream).envelope.payload).resources)
    same = theirs == {file.path: file.sha256 for file in parts.files}
    return hashlib.sha256(parts.upstream).hexdigest(), same


def make_manifest(
    release: Release, output: Output, base: Base, parts: Parts, attestations: Sequence[Document]
) -> Manifest:
    """The manifest, with its volumes where it has several.

    Raises:
        BundleError: RELEASE_INVALID, of the volumes; as `manifest.parse`.
    """
    try:
        manifest = Manifest.model_validate(_fields(release, base, parts, attestations))
    except ValidationError as error:
        raise BundleError("MANIFEST_SCHEMA", first_fault(error)) from None
    if output.volume_size is not None:
        head = _head_size(manifest, parts.signature, output.signature_room)
        lengths = [length for _, length in carried_chunks(manifest, base.chunks)]
        volumes = plan_volumes(lengths, head, output.volume_size, member_size(MAX_REVOCATION))
        manifest = manifest.model_copy(update={"volumes": volumes})
    # What it is decides its name: equal bundles have equal ids, and no other bundle has this one.
    named = manifest.model_copy(update={"bundle_id": hashlib.sha256(manifest.encode()).hexdigest()[:32]})
    return manifests.parse(named.encode())


def _fields(release: Release, base: Base, parts: Parts, attestations: Sequence[Document]) -> Mapping[str, object]:
    return {
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


def stated_volume_size(statement: bytes) -> int | None:
    """Bytes that no volume exceeds, as the provenance made here says; None where it says nothing of that."""
    try:
        stated = json.loads(statement)["predicate"]["buildDefinition"]["externalParameters"]["volumeSize"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return stated if type(stated) is int else None


def _head_size(manifest: Manifest, signature: bytes | None, room: int) -> int:
    """Bytes before the chunks, with room for roots and signatures, among them one over every file."""
    signed = len(signature or b"") or sum(
        2 * len(json.dumps(file.path)) + _BYTES_SIGNED_PER_FILE for file in manifest.files
    )
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


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong with what was given, in words."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where} cannot be {first['input']!a}: {first['msg']}"
