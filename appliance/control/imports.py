"""The importer as control sees it: imports, versions, the store's care, and its outbox copied into the audit log.

Whatever changes in the importer stands in its outbox until it is acknowledged. A crash may fall between the copy
and the acknowledgement, so the log is asked before each copy whether it has it already.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import grpc

from appliance.control import records
from appliance.control.audit import Record
from appliance.control.deployments import CHANNEL_OPTIONS, LONGEST_PAUSE_S
from appliance.control.journal import Journal
from appliance.errors import CloisterError
from bundles.protos import importer_pb2, importer_pb2_grpc

_CALL_LIMIT_S = 10.0
_MEDIUM_LIMIT_S = 60.0  # a medium that was just put in spins up first
_REMOVAL_LIMIT_S = 600.0  # deleting files of many gigabytes takes its time
_PAUSE_S = 0.5
_COMMITTED = importer_pb2.IMPORT_STATE_COMMITTED
_REMOVAL = "removal"

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


class Imports:
    """A client of the importer. `run` it as a task to copy the outbox.

    Args:
        journal: the audit log.
        socket: the importer's.
        removed: told the digest of each version that is in the store no more.
        trust_changed: told of each change of roots or revocations, once it is in force.
    """

    def __init__(
        self,
        journal: Journal,
        socket: Path,
        removed: Callable[[str], Awaitable[None]],
        trust_changed: Callable[[], Awaitable[None]],
    ) -> None:
        self._journal = journal
        self._removed = removed
        self._trust_changed = trust_changed
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS)
        self._importer: importer_pb2_grpc.ImporterServiceAsyncStub = importer_pb2_grpc.ImporterServiceStub(
            self._channel
        )

    @property
    def connected(self) -> bool:
        """The importer is reached."""
        return self._channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def import_bundle(self, path: str) -> AsyncIterator[importer_pb2.ImportBundleResponse]:
        """Progress of an import, as the importer tells it.

        Raises:
            CloisterError: the importer's refusal, or IMPORTER_UNAVAILABLE.
        """
        try:
            async for progress in self._importer.ImportBundle(importer_pb2.ImportBundleRequest(path=path)):
                yield progress
        except grpc.aio.AioRpcError as error:
            _raise(error)

    async def offer_volume(self, import_id: str, path: str) -> None:
        """Hand the next volume to an import that waits for it.

        Raises:
            CloisterError: the importer's refusal, or IMPORTER_UNAVAILABLE.
        """
        request = importer_pb2.OfferVolumeRequest(import_id=import_id, path=path)
        await _told(self._importer.OfferVolume(request, timeout=_MEDIUM_LIMIT_S))

    async def imports(self) -> list[importer_pb2.Import]:
        """The imports that run or wait, and the last ones that ended, newest first."""
        request = importer_pb2.ListImportsRequest()
        return list((await _told(self._importer.ListImports(request, timeout=_CALL_LIMIT_S))).imports)

    async def cancel(self, import_id: str) -> None:
        """End a running import.

        Raises:
            CloisterError: the importer's refusal, or IMPORTER_UNAVAILABLE.
        """
        request = importer_pb2.CancelImportRequest(import_id=import_id)
        await _told(self._importer.CancelImport(request, timeout=_MEDIUM_LIMIT_S))

    async def versions(self) -> list[importer_pb2.ModelVersion]:
        """The committed versions, oldest first.

        Raises:
            CloisterError: IMPORTER_UNAVAILABLE.
        """
        request = importer_pb2.ListModelVersionsRequest()
        return list((await _told(self._importer.ListModelVersions(request, timeout=_CALL_LIMIT_S))).versions)

    async def version(self, reference: str) -> importer_pb2.ModelVersion:
        """One version with its files; `reference` is name@version, a name for its newest, or a digest.

        Raises:
            CloisterError: VERSION_NOT_FOUND, IMPORTER_UNAVAILABLE.
        """
        request = importer_pb2.GetModelVersionRequest(reference=reference)
        return (await _of_version(self._importer.GetModelVersion(request, timeout=_CALL_LIMIT_S))).version

    async def remove(self, model_digest: str) -> importer_pb2.RemoveModelVersionResponse:
        """Forget a version; files that no other one has are deleted.

        Raises:
            CloisterError: VERSION_NOT_FOUND, the importer's refusal, or IMPORTER_UNAVAILABLE.
        """
        request = importer_pb2.RemoveModelVersionRequest(reference=model_digest)
        return await _of_version(self._importer.RemoveModelVersion(request, timeout=_REMOVAL_LIMIT_S))

    async def verify_approval(self, envelope: bytes) -> importer_pb2.VerifyApprovalResponse:
        """Who approved what, as the trust in force has it.

        Raises:
            CloisterError: the importer's refusal, or IMPORTER_UNAVAILABLE.
        """
        request = importer_pb2.VerifyApprovalRequest(envelope=envelope)
        return await _told(self._importer.VerifyApproval(request, timeout=_CALL_LIMIT_S))

    async def trust(self) -> importer_pb2.GetTrustResponse:
        """The trust root, revocations and floors in force."""
        return await _told(self._importer.GetTrust(importer_pb2.GetTrustRequest(), timeout=_CALL_LIMIT_S))

    async def store(self) -> importer_pb2.GetStoreResponse:
        """What the store holds, and what its last scrub found."""
        return await _told(self._importer.GetStore(importer_pb2.GetStoreRequest(), timeout=_CALL_LIMIT_S))

    async def scrub(self) -> AsyncIterator[importer_pb2.ScrubStoreResponse]:
        """How far a scrub is that runs on by itself.

        Raises:
            CloisterError: the importer's refusal, or IMPORTER_UNAVAILABLE.
        """
        try:
            async for progress in self._importer.ScrubStore(importer_pb2.ScrubStoreRequest()):
                yield progress
        except grpc.aio.AioRpcError as error:
            _raise(error)

    async def run(self) -> None:
        """Copy the outbox into the audit log until cancelled."""
        pause = _PAUSE_S
        while True:
            try:
                await self._copy_outbox()
                pause = _PAUSE_S
            except grpc.aio.AioRpcError as error:
                log.info("the importer's outbox is not read", extra={"status": error.code().name})
            except CloisterError as error:
                log.warning("the importer's outbox is not copied", extra={"code": error.code})
            except Exception:  # whatever it was, a later import must not go unrecorded
                log.exception("the importer's outbox is not copied")
                pause = min(2 * pause, LONGEST_PAUSE_S)
            await asyncio.sleep(pause)

    async def _copy_outbox(self) -> None:
        outbox = self._importer.ReadOutbox(importer_pb2.ReadOutboxRequest(), wait_for_ready=True)
        try:
            async for entry in outbox:
                await self._copy(entry)
                await self._importer.AcknowledgeOutbox(
                    importer_pb2.AcknowledgeOutboxRequest(sequence=entry.sequence), timeout=_CALL_LIMIT_S
                )
        finally:
            outbox.cancel()

    async def _copy(self, entry: importer_pb2.ReadOutboxResponse) -> None:
        """Record one change, unless it is recorded, with what follows from it."""
        if entry.event == _REMOVAL:
            await self._removed(entry.model_digest)
        await self._record(records.importer_event(entry))
        if entry.event == records.TRUST:
            await self._trust_changed()
        if entry.event in ("", records.IMPORT) and entry.state == _COMMITTED and entry.model_digest:
            await self._record_if_approved(entry)

    async def _record_if_approved(self, entry: importer_pb2.ReadOutboxResponse) -> None:
        """A version that no custodian must approve is approved once it is committed; the record says why."""
        try:
            version = await self.version(entry.model_digest)
        except CloisterError as refusal:
            if refusal.status is not grpc.StatusCode.NOT_FOUND:
                raise
            return  # a trust bundle, or a version removed since
        if not version.approvals_required:
            await self._record(records.approved_by_root(version))

    async def _record(self, record: Record) -> None:
        if not await asyncio.to_thread(self._journal.log.has, record.kind, record.request_id):
            await self._journal.record(record)


async def _of_version(call: Awaitable[Answer]) -> Answer:
    """The importer's answer about one version.

    Raises:
        CloisterError: VERSION_NOT_FOUND, and as `_told`.
    """
    try:
        return await _told(call)
    except CloisterError as refusal:
        if refusal.status is not grpc.StatusCode.NOT_FOUND:
            raise
        raise CloisterError(
            "VERSION_NOT_FOUND",
            "no such model version is in the store; `cloister bundle list` names those that are",
            grpc.StatusCode.NOT_FOUND,
            field="model_version",
        ) from refusal


async def _told(call: Awaitable[Answer]) -> Answer:
    """The importer's answer.

    Raises:
        CloisterError: its refusal, or IMPORTER_UNAVAILABLE.
    """
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        _raise(error)


def _raise(error: grpc.aio.AioRpcError) -> NoReturn:
    """The importer's own refusal, which begins with its code; its absence by name."""
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        raise CloisterError(
            "IMPORTER_UNAVAILABLE",
            "the importer is not reached; try again, then look at its log",
            grpc.StatusCode.UNAVAILABLE,
            retry_after=timedelta(seconds=1),
        ) from error
    code, colon, message = (error.details() or "").partition(": ")
    if colon and code.isascii() and code.replace("_", "").isalnum() and code.isupper():
        raise CloisterError(code, message, error.code()) from error
    raise CloisterError(
        error.code().name, error.details() or "the importer did not answer", error.code()
    ) from error
