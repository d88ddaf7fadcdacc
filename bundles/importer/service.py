"""The importer's gRPC service: translates between its protocol and the queue, the store, the trust and the outbox.

A refusal is a gRPC status whose details are "CODE: what was wrong and what to do".
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc

from bundles.format.errors import BundleError
from bundles.importer import views
from bundles.importer.jobs import Jobs
from bundles.importer.records import ModelVersion
from bundles.importer.removal import remove_version
from bundles.importer.scrubbing import Scrubber
from bundles.importer.standing import Standing, standing
from bundles.importer.workplace import Workplace
from bundles.protos import importer_pb2 as pb
from bundles.protos import importer_pb2_grpc
from bundles.trust.approval import Approval, verify_approval

LOOKING_S = 5.0
Context = grpc.aio.ServicerContext[Any, Any]
Found = TypeVar("Found")
_STATUS = {
    "PATH_NOT_ABSOLUTE": grpc.StatusCode.INVALID_ARGUMENT,
    "IMPORTS_TOO_MANY": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "STOPPING": grpc.StatusCode.UNAVAILABLE,
    "SCRUB_FAILED": grpc.StatusCode.INTERNAL,
}


class ImporterService(importer_pb2_grpc.ImporterServiceServicer):
    """See importer.proto.

    Args:
        jobs: the queue.
        place: store, ledger and trust.
        scrubber: the store's.
        stopping: ends the streams.
    """

    def __init__(self, jobs: Jobs, place: Workplace, scrubber: Scrubber, stopping: asyncio.Event) -> None:
        self._jobs = jobs
        self._place = place
        self._scrubber = scrubber
        self._stopping = stopping
        self._scrub_changed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def changed() -> None:
            loop.call_soon_threadsafe(self._scrubbed)

        scrubber.changed = changed

    async def ImportBundle(  # noqa: N802  # named by the protocol
        self, request: pb.ImportBundleRequest, context: Context
    ) -> AsyncIterator[pb.ImportBundleResponse]:
        """Progress of one import until its end; INVALID_ARGUMENT for a relative path, UNAVAILABLE on a stop."""
        try:
            path = _absolute(request.path)
            if self._stopping.is_set():
                raise BundleError("STOPPING", "the importer is stopping")
            job = self._jobs.start(path)
            looking = asyncio.ensure_future(self._jobs.look_again(job))
            await asyncio.wait({looking}, timeout=LOOKING_S)  # a medium may hang; it is looked at all the same
            async for progress in job.watch():
                yield views.progress_view(job.import_id, progress)
        except BundleError as error:
            await _refuse(context, error)

    async def OfferVolume(  # noqa: N802  # named by the protocol
        self, request: pb.OfferVolumeRequest, context: Context
    ) -> pb.OfferVolumeResponse:
        """Take the volume that an import waits for."""
        try:
            await self._jobs.offer(request.import_id, _absolute(request.path))
        except BundleError as error:
            await _refuse(context, error)
        return pb.OfferVolumeResponse()

    async def ListImports(  # noqa: N802  # named by the protocol
        self, request: pb.ListImportsRequest, context: Context
    ) -> pb.ListImportsResponse:
        """Those that run or wait, then those that ended, newest first."""
        running = self._jobs.running()
        ended = await asyncio.to_thread(self._place.ledger.ended)
        known = {held.import_id for held in running}
        held = [*running, *(past for past in ended if past.import_id not in known)]
        return pb.ListImportsResponse(imports=map(views.import_view, held))

    async def CancelImport(  # noqa: N802  # named by the protocol
        self, request: pb.CancelImportRequest, context: Context
    ) -> pb.CancelImportResponse:
        """End an import; its staging stays."""
        try:
            await self._jobs.cancel(request.import_id)
        except BundleError as error:
            await _refuse(context, error)
        return pb.CancelImportResponse()

    async def ListModelVersions(  # noqa: N802  # named by the protocol
        self, request: pb.ListModelVersionsRequest, context: Context
    ) -> pb.ListModelVersionsResponse:
        """The committed versions, oldest first, without their files."""

        def look() -> pb.ListModelVersionsResponse:
            trust, damaged = self._trust(), self._place.ledger.damaged()
            versions = self._place.ledger.versions()
            listed = [views.version_view(version, trust, damaged, whole=False) for version in versions]
            return pb.ListModelVersionsResponse(versions=listed)

        return await asyncio.to_thread(look)

    async def GetModelVersion(  # noqa: N802  # named by the protocol
        self, request: pb.GetModelVersionRequest, context: Context
    ) -> pb.GetModelVersionResponse:
        """One committed version with its files; NOT_FOUND when there is none."""

        def look() -> pb.GetModelVersionResponse:
            version = self._version(request.reference)
            view = views.version_view(version, self._trust(), self._place.ledger.damaged(), whole=True)
            return pb.GetModelVersionResponse(version=view)

        return await _answer(context, look)

    async def RemoveModelVersion(  # noqa: N802  # named by the protocol
        self, request: pb.RemoveModelVersionRequest, context: Context
    ) -> pb.RemoveModelVersionResponse:
        """Forget a version, and delete what no other has."""
        reference, freed = await _answer(context, lambda: remove_version(self._place, request.reference))
        self._jobs.wake()
        return pb.RemoveModelVersionResponse(model_version=reference, freed_bytes=freed)

    async def VerifyApproval(  # noqa: N802  # named by the protocol
        self, request: pb.VerifyApprovalRequest, context: Context
    ) -> pb.VerifyApprovalResponse:
        """Who of the custodians approved what, on this appliance."""

        def look() -> Approval:
            trust = standing(self._place)
            return verify_approval(request.envelope, trust.root, trust.revocations, self._place.appliance)

        approval = await _answer(context, look)
        return pb.VerifyApprovalResponse(
            model_digest=approval.model_digest, custodians=approval.custodians, threshold=approval.threshold
        )

    async def GetTrust(  # noqa: N802  # named by the protocol
        self, request: pb.GetTrustRequest, context: Context
    ) -> pb.GetTrustResponse:
        """The trust in force."""
        return views.trust_view(await _answer(context, lambda: standing(self._place)))

    async def GetStore(  # noqa: N802  # named by the protocol
        self, request: pb.GetStoreRequest, context: Context
    ) -> pb.GetStoreResponse:
        """What the store holds."""
        return await asyncio.to_thread(views.store_view, self._place)

    async def ScrubStore(  # noqa: N802  # named by the protocol
        self, request: pb.ScrubStoreRequest, context: Context
    ) -> AsyncIterator[pb.ScrubStoreResponse]:
        """How far a scrub is, which this starts unless one runs, until its end; INTERNAL if that is early."""
        last = self._scrubber.ask()
        while not self._stopping.is_set():
            further = self._scrub_changed
            sweep = self._scrubber.sweep(last)
            if sweep.failed:
                reason = "the scrub ended early; look at the importer's log, then ask again"
                await _refuse(context, BundleError("SCRUB_FAILED", reason))
            damaged = await asyncio.to_thread(views.damage_view, self._place.ledger, sweep.damaged)
            yield pb.ScrubStoreResponse(
                bytes_done=sweep.bytes_done, bytes_total=sweep.bytes_total, damaged=damaged, ended=sweep.ended
            )
            if sweep.ended:
                return
            await self._either(further)

    async def ReadOutbox(  # noqa: N802  # named by the protocol
        self, request: pb.ReadOutboxRequest, context: Context
    ) -> AsyncIterator[pb.ReadOutboxResponse]:
        """Unacknowledged events as they come, until the importer stops."""
        after = 0
        while not self._stopping.is_set():
            grew = self._jobs.outbox_grew
            entries = await asyncio.to_thread(self._place.ledger.outbox, after)
            for entry in entries:
                after = entry.sequence
                yield views.outbox_view(entry)
            if not entries:
                await self._either(grew)

    async def AcknowledgeOutbox(  # noqa: N802  # named by the protocol
        self, request: pb.AcknowledgeOutboxRequest, context: Context
    ) -> pb.AcknowledgeOutboxResponse:
        """Forget events that are in the audit log."""
        await asyncio.to_thread(self._place.ledger.acknowledge, request.sequence)
        return pb.AcknowledgeOutboxResponse()

    def _scrubbed(self) -> None:
        """The scrub is further, and may have found something."""
        self._scrub_changed.set()
        self._scrub_changed = asyncio.Event()
        self._jobs.wake()

    def _version(self, reference: str) -> ModelVersion:
        version = self._place.ledger.find(reference)
        if version is None:
            raise BundleError("MODEL_VERSION_NOT_FOUND", "no such version was imported")
        return version

    def _trust(self) -> Standing | str:
        """The trust in force, or the code of why there is none: then it vouches for nothing."""
        try:
            return standing(self._place)
        except BundleError as error:
            return error.code

    async def _either(self, event: asyncio.Event) -> None:
        """Wait for `event` or the end."""
        waits = [asyncio.ensure_future(e.wait()) for e in (event, self._stopping)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


def _absolute(path: str) -> Path:
    if not Path(path).is_absolute() or "\0" in path:
        raise BundleError("PATH_NOT_ABSOLUTE", "name the bundle or volume absolutely")
    return Path(path)


async def _answer(context: Context, look: Callable[[], Found]) -> Found:
    """What `look` finds, off the event loop."""
    try:
        return await asyncio.to_thread(look)
    except BundleError as error:
        await _refuse(context, error)


async def _refuse(context: Context, error: BundleError) -> NoReturn:
    status = _STATUS.get(error.code, grpc.StatusCode.FAILED_PRECONDITION)
    if error.code.endswith("_NOT_FOUND"):
        status = grpc.StatusCode.NOT_FOUND
    await context.abort(status, str(error))
    raise AssertionError("context.abort returned")
