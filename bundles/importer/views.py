"""What the importer knows, as its protocol says it."""

from collections.abc import Iterable, Mapping
from typing import Any

from bundles.importer.ledger import Ledger
from bundles.importer.records import Damage, Entry, Import, ModelVersion
from bundles.importer.standing import Standing
from bundles.importer.workplace import Workplace
from bundles.pipeline import Progress, State
from bundles.protos import importer_pb2 as pb

_STATES = {
    None: pb.IMPORT_STATE_UNSPECIFIED,
    State.QUARANTINE: pb.IMPORT_STATE_QUARANTINE,
    State.SIGNED: pb.IMPORT_STATE_SIGNED,
    State.POLICY: pb.IMPORT_STATE_POLICY,
    State.STREAMING: pb.IMPORT_STATE_STREAMING,
    State.CONTENT: pb.IMPORT_STATE_CONTENT,
    State.COMMITTED: pb.IMPORT_STATE_COMMITTED,
    State.REJECTED: pb.IMPORT_STATE_REJECTED,
}


def progress_view(import_id: str, progress: Progress) -> pb.ImportBundleResponse:
    """A moment of an import."""
    return pb.ImportBundleResponse(
        import_id=import_id,
        state=_STATES[progress.state],
        bytes_done=progress.bytes_done,
        bytes_total=progress.bytes_total,
        bytes_reused=progress.bytes_reused,
        bytes_per_second=progress.bytes_per_second,
        file=progress.file,
        kind=progress.kind,
        model_version=progress.model_version,
        model_digest=progress.model_digest,
        volumes=progress.volumes,
        volume_wanted=progress.volume_wanted,
        volume_refused=progress.volume_refused,
        reason=progress.reason,
        message=progress.message,
    )


def import_view(held: Import) -> pb.Import:
    """An import of the list."""
    return pb.Import(
        path=held.path,
        started_ns=held.started_ns,
        changed_ns=held.changed_ns,
        progress=progress_view(held.import_id, held.progress),
    )


def outbox_view(entry: Entry) -> pb.ReadOutboxResponse:
    """An event."""
    return pb.ReadOutboxResponse(
        sequence=entry.sequence,
        import_id=entry.import_id,
        state=_STATES[entry.state],
        reason=entry.reason,
        model_version=entry.model_version,
        model_digest=entry.model_digest,
        utc_ns=entry.utc_ns,
        event=entry.event,
        detail=entry.detail,
    )


def version_view(
    version: ModelVersion, trust: Standing | str, damaged: Iterable[Damage], *, whole: bool
) -> pb.ModelVersion:
    """A version.

    Args:
        version: it.
        trust: in force, or the code of why there is none, which then stands for its revocation.
        damaged: files of the store that are not what they should be.
        whole: with its files and canaries.
    """
    found = {damage.sha256 for damage in damaged}
    return pb.ModelVersion(
        name=version.name,
        version=version.version,
        sequence=version.sequence,
        model_digest=version.model_digest,
        kind=version.kind,
        imported_at=version.imported_at,
        issued_at=version.issued_at,
        signers=(*version.signers, *version.publishers),
        total_size=version.total_size,
        architecture=version.architecture,
        files=map(_file, version.files) if whole else (),
        requires=[
            pb.Requirement(name=need["name"], model_digest=need["model_digest"] or "") for need in version.requires
        ],
        licences=[pb.Licence(**given) for given in version.licences],
        canaries=map(_canary, version.canaries) if whole else (),
        canary_pass_percent=version.canary_pass_percent,
        approvals_required=0 if isinstance(trust, str) else trust.approvals_required,
        revoked=trust if isinstance(trust, str) else trust.revoked(version),
        damaged=[path for path, digest in version.paths() if digest in found],
        gpu_memory=version.gpu_memory,
        gpus=version.gpus,
    )


def _file(file: Mapping[str, Any]) -> pb.ModelFile:
    return pb.ModelFile(path=str(file["path"]), size=int(file["size"]), sha256=str(file["sha256"]))


def _canary(canary: Mapping[str, Any]) -> pb.Canary:
    return pb.Canary(
        messages=[pb.CanaryMessage(**message) for message in canary["messages"]],
        match=canary["match"],
        expected=canary["expected"],
        max_tokens=canary["max_tokens"],
    )


def trust_view(trust: Standing) -> pb.GetTrustResponse:
    """The trust in force."""
    root, revocations = trust.root, trust.revocations
    return pb.GetTrustResponse(
        root_version=root.version,
        root_expires=int(root.expires.timestamp()),
        roles=[
            pb.TrustRole(
                name=name, threshold=role.threshold, keyids=role.keyids, hybrid=name in root.extension.hybrid
            )
            for name, role in root.roles.items()
        ],
        revocation_sequence=revocations.sequence if revocations else 0,
        revocation_issued=int(revocations.issued_at.timestamp()) if revocations else 0,
        revocation_expires=int(revocations.expires.timestamp()) if revocations else 0,
        clock_floor=int(trust.clock_floor.timestamp()),
        sequence_floors={name: floor.sequence for name, floor in trust.floors.models.items()},
        warnings=trust.warnings,
    )


def store_view(place: Workplace) -> pb.GetStoreResponse:
    """The store."""
    usage, ledger = place.store.usage(), place.ledger
    return pb.GetStoreResponse(
        bytes=usage.bytes,
        files=usage.files,
        listed_bytes=sum(version.total_size for version in ledger.versions()),
        free_bytes=place.store.free_bytes(),
        quota_bytes=place.store.quota,
        staged_bytes=place.store.staged_bytes(),
        scrubbed_at=ledger.scrub().ended,
        damaged=damage_view(ledger, ledger.damaged()),
    )


def damage_view(ledger: Ledger, damaged: Iterable[Damage]) -> list[pb.DamagedFile]:
    """Damaged files, each with whoever needs it."""
    found = {damage.sha256: pb.DamagedFile(sha256=damage.sha256, finding=damage.finding) for damage in damaged}
    for version in ledger.versions() if found else ():
        for path, digest in version.paths():
            if digest in found:
                found[digest].used_by.append(f"{version.reference} {path}")
    return list(found.values())
