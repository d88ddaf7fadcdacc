"""What the importer tells of versions, imports, store and trust, as the admin protocol shows it."""

from google.protobuf.timestamp_pb2 import Timestamp

from appliance.control.admin.views import shared, timestamp
from appliance.control.versions import Standing
from appliance.protos import admin_pb2
from bundles.protos import importer_pb2


def version_view(version: importer_pb2.ModelVersion, standing: Standing) -> admin_pb2.ModelVersion:
    """A model version without its files, and where it stands."""
    digest = version.model_digest
    return admin_pb2.ModelVersion(
        name=version.name,
        version=version.version,
        sequence=version.sequence,
        model_digest=digest,
        kind=version.kind,
        imported_at=Timestamp(seconds=version.imported_at),
        signers=version.signers,
        total_size=version.total_size,
        architecture=version.architecture,
        state=standing.state(version),
        approvals=standing.approvals.get(digest, ()),
        approvals_required=version.approvals_required,
        licences=[licence.spdx for licence in version.licences],
        licence_acceptance=any(licence.accept for licence in version.licences),
        requires=[f"{r.name}@{r.model_digest}" if r.model_digest else r.name for r in version.requires],
        revoked=version.revoked,
        damaged=version.damaged,
        aliases=standing.aliases.get(digest, ()),
    )


def progress_view(progress: importer_pb2.ImportBundleResponse) -> admin_pb2.ImportBundleResponse:
    """Progress of an import."""
    told = importer_pb2.ImportBundleResponse()
    told.CopyFrom(progress)
    told.ClearField("state")
    view = shared(told, admin_pb2.ImportBundleResponse())
    view.state = import_state(progress.state)
    return view


def import_view(one: importer_pb2.Import) -> admin_pb2.Import:
    """An import that runs or ended."""
    return admin_pb2.Import(
        path=one.path,
        started_at=timestamp(one.started_ns),
        changed_at=timestamp(one.changed_ns),
        progress=progress_view(one.progress),
    )


def import_state(state: "importer_pb2.ImportState.ValueType") -> str:
    """A state in words."""
    return importer_pb2.ImportState.Name(state).removeprefix("IMPORT_STATE_").lower()


def store_view(store: importer_pb2.GetStoreResponse) -> admin_pb2.GetStoreResponse:
    """The store."""
    return admin_pb2.GetStoreResponse(
        bytes=store.bytes,
        files=store.files,
        listed_bytes=store.listed_bytes,
        free_bytes=store.free_bytes,
        quota_bytes=store.quota_bytes,
        staged_bytes=store.staged_bytes,
        scrubbed_at=_moment(store.scrubbed_at),
        damaged=map(_damaged_view, store.damaged),
    )


def scrub_view(progress: importer_pb2.ScrubStoreResponse) -> admin_pb2.ScrubStoreResponse:
    """How far a scrub is."""
    return admin_pb2.ScrubStoreResponse(
        bytes_done=progress.bytes_done,
        bytes_total=progress.bytes_total,
        damaged=map(_damaged_view, progress.damaged),
        ended=progress.ended,
    )


def trust_view(trust: importer_pb2.GetTrustResponse) -> admin_pb2.GetTrustResponse:
    """The trust in force."""
    return admin_pb2.GetTrustResponse(
        root_version=trust.root_version,
        root_expires=_moment(trust.root_expires),
        roles=[
            admin_pb2.TrustRole(name=r.name, threshold=r.threshold, keyids=r.keyids, hybrid=r.hybrid)
            for r in trust.roles
        ],
        revocation_sequence=trust.revocation_sequence,
        revocation_issued=_moment(trust.revocation_issued),
        revocation_expires=_moment(trust.revocation_expires),
        clock_floor=_moment(trust.clock_floor),
        sequence_floors=dict(trust.sequence_floors),
        warnings=trust.warnings,
    )


def _damaged_view(file: importer_pb2.DamagedFile) -> admin_pb2.DamagedFile:
    return admin_pb2.DamagedFile(sha256=file.sha256, used_by=file.used_by, finding=file.finding)


def _moment(seconds: int) -> Timestamp | None:
    """A time; None for one that has not come, which the protocol leaves out."""
    return Timestamp(seconds=seconds) if seconds else None
