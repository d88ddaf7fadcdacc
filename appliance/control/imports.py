"""The importer as control sees it: imports, versions, and its outbox copied into the audit log.

Every state change of an import stands in the importer's outbox until it is acknowledged. A crash may fall between
the copy and the acknowledgement, so the log is asked before each copy whether it has it already.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import grpc

from appliance import errors
from appliance.control import records
from appliance.control.deployments import CHANNEL_OPTIONS, LONGEST_PAUSE_S
from appliance.control.journal import Journal
from appliance.errors import CloisterError
from bundles.protos import importer_pb2, importer_pb2_grpc

_CALL_LIMIT_S = 10.0
_PAUSE_S = 0.5

log = logging.getLogger(__name__)


class Imports:
    """A client of the importer. `run` it as a task to copy the outbox.

    Args:
        journal: the audit log.
        socket: the importer's.
    """

    def __init__(self, journal: Journal, socket: Path) -> None:
        self._journal = journal
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

    async def versions(self) -> list[importer_pb2.ModelVersion]:
        """The committed versions, oldest first.

        Raises:
            CloisterError: IMPORTER_UNAVAILABLE.
        """
        try:
            answer = await self._importer.ListModelVersions(
                importer_pb2.ListModelVersionsRequest(), timeout=_CALL_LIMIT_S
            )
        except grpc.aio.AioRpcError as error:
            _raise(error)
        return list(answer.versions)

    async def version(self, reference: str) -> importer_pb2.ModelVersion:
        """One version with its files; `reference` is name@version, a name for its newest, or a digest.

        Raises:
            CloisterError: VERSION_NOT_FOUND, IMPORTER_UNAVAILABLE.
        """
        try:
            answer = await self._importer.GetModelVersion(
                importer_pb2.GetModelVersionRequest(reference=reference), timeout=_CALL_LIMIT_S
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise CloisterError(
                    "VERSION_NOT_FOUND",
                    "no such model version is in the store; `cloister bundle list` names those that are",
                    grpc.StatusCode.NOT_FOUND,
                    field="model_version",
                ) from error
            _raise(error)
        return answer.version

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
        """Record one state change, unless it is recorded."""
        record = records.bundle_state(entry)
        if not await asyncio.to_thread(self._journal.log.has, record.kind, record.request_id):
            await self._journal.record(record)


def _raise(error: grpc.aio.AioRpcError) -> NoReturn:
    """The importer's own refusal as it is; its absence by name."""
    refusal = errors.from_rpc_error(error)
    if refusal.code == grpc.StatusCode.UNAVAILABLE.name:
        raise CloisterError(
            "IMPORTER_UNAVAILABLE",
            "the importer is not reached; try again, then look at its log",
            grpc.StatusCode.UNAVAILABLE,
            retry_after=timedelta(seconds=1),
        ) from error
    raise refusal from error
