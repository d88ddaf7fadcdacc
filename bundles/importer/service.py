"""The importer's gRPC service: translates between its protocol and the queue, the ledger and the outbox."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from bundles.importer.jobs import Jobs
from bundles.importer.ledger import Entry, Ledger, ModelVersion
from bundles.pipeline import Progress, State
from bundles.protos import importer_pb2 as pb
from bundles.protos import importer_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
_STATES = {
    State.QUARANTINE: pb.IMPORT_STATE_QUARANTINE,
    State.SIGNED: pb.IMPORT_STATE_SIGNED,
    State.POLICY: pb.IMPORT_STATE_POLICY,
    State.STREAMING: pb.IMPORT_STATE_STREAMING,
    State.CONTENT: pb.IMPORT_STATE_CONTENT,
    State.COMMITTED: pb.IMPORT_STATE_COMMITTED,
    State.REJECTED: pb.IMPORT_STATE_REJECTED,
}


class ImporterService(importer_pb2_grpc.ImporterServiceServicer):
    """See importer.proto.

    Args:
        jobs: the queue.
        ledger: store.db.
        stopping: ends the streams.
    """

    def __init__(self, jobs: Jobs, ledger: Ledger, stopping: asyncio.Event) -> None:
        self._jobs = jobs
        self._ledger = ledger
        self._stopping = stopping

    async def ImportBundle(  # noqa: N802  # named by the protocol
        self, request: pb.ImportBundleRequest, context: Context
    ) -> AsyncIterator[pb.ImportBundleResponse]:
        """Progress of one import until its end; INVALID_ARGUMENT for a relative path."""
        path = Path(request.path)
        if not path.is_absolute() or "\0" in request.path:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "PATH_NOT_ABSOLUTE: name the bundle absolutely")
        if self._stopping.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "STOPPING: the importer is stopping")
        job = self._jobs.start(path)
        async for progress in job.watch():
            yield _import_response(job.import_id, progress)

    async def ListModelVersions(  # noqa: N802  # named by the protocol
        self, request: pb.ListModelVersionsRequest, context: Context
    ) -> pb.ListModelVersionsResponse:
        """The committed versions, oldest first, without their files."""
        versions = await asyncio.to_thread(self._ledger.versions)
        return pb.ListModelVersionsResponse(versions=[_model_version(v, files=False) for v in versions])

    async def GetModelVersion(  # noqa: N802  # named by the protocol
        self, request: pb.GetModelVersionRequest, context: Context
    ) -> pb.GetModelVersionResponse:
        """One committed version with its files; NOT_FOUND when there is none."""
        version = await asyncio.to_thread(self._ledger.find, request.reference)
        if version is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "MODEL_VERSION_NOT_FOUND: no such version was imported")
        return pb.GetModelVersionResponse(version=_model_version(version, files=True))

    async def ReadOutbox(  # noqa: N802  # named by the protocol
        self, request: pb.ReadOutboxRequest, context: Context
    ) -> AsyncIterator[pb.ReadOutboxResponse]:
        """Unacknowledged state changes as they come, until the importer stops."""
        after = 0
        while not self._stopping.is_set():
            grew = self._jobs.outbox_grew
            entries = await asyncio.to_thread(self._ledger.outbox, after)
            for entry in entries:
                after = entry.sequence
                yield _outbox_response(entry)
            if not entries:
                await self._either(grew)

    async def AcknowledgeOutbox(  # noqa: N802  # named by the protocol
        self, request: pb.AcknowledgeOutboxRequest, context: Context
    ) -> pb.AcknowledgeOutboxResponse:
        """Forget state changes that are in the audit log."""
        await asyncio.to_thread(self._ledger.acknowledge, request.sequence)
        return pb.AcknowledgeOutboxResponse()

    async def _either(self, event: asyncio.Event) -> None:
        """Wait for `event` or the end."""
        waits = [asyncio.ensure_future(e.wait()) for e in (event, self._stopping)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


def _import_response(import_id: str, progress: Progress) -> pb.ImportBundleResponse:
    return pb.ImportBundleResponse(
        import_id=import_id,
        state=_STATES[progress.state],
        bytes_done=progress.bytes_done,
        bytes_total=progress.bytes_total,
        file=progress.file,
        reason=progress.reason,
        message=progress.message,
        model_version=progress.model_version,
        model_digest=progress.model_digest,
    )


def _outbox_response(entry: Entry) -> pb.ReadOutboxResponse:
    return pb.ReadOutboxResponse(
        sequence=entry.sequence,
        import_id=entry.import_id,
        state=_STATES[entry.state],
        reason=entry.reason,
        model_version=entry.model_version,
        model_digest=entry.model_digest,
        utc_ns=entry.utc_ns,
    )


def _model_version(version: ModelVersion, *, files: bool) -> pb.ModelVersion:
    listed = version.files if files else ()
    return pb.ModelVersion(
        name=version.name,
        version=version.version,
        sequence=version.sequence,
        model_digest=version.model_digest,
        kind=version.kind,
        imported_at=version.imported_at,
        signers=version.signers,
        total_size=version.total_size,
        architecture=version.architecture,
        files=[pb.ModelFile(path=str(f["path"]), size=int(f["size"]), sha256=str(f["sha256"])) for f in listed],
    )
