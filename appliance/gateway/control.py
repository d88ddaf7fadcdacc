"""The gateway's questions to control, and what becomes of its refusals: they are passed on byte for byte."""

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import grpc

from appliance.errors import DETAILS_TRAILER, CloisterError, from_rpc_error
from appliance.gateway.background import Background
from appliance.gateway.unix import open_channel
from appliance.protos import control_pb2, control_pb2_grpc

# Seconds one answer may take. Admit has its own: giving up on it could leave a lease that nobody knows.
ANSWER_S = 15.0
ADMIT_S = 30.0
SETTLE_S = 10.0
RECORD_S = 2.0
_RETRY_FIRST_S, _RETRY_MOST_S, _RETRIES = 0.2, 5.0, 120

Request = TypeVar("Request")
Response = TypeVar("Response")

log = logging.getLogger(__name__)


class ControlRefusalError(CloisterError):
    """What control refused, as it said it: same status, same message, same details."""

    def __init__(self, error: grpc.aio.AioRpcError, details: bytes) -> None:
        known = from_rpc_error(error)
        super().__init__(known.code, known.message, known.status, known.metadata, known.field, known.retry_after)
        self._said = error.details() or ""
        self._details = details

    def __str__(self) -> str:
        return self._said

    def trailers(self) -> tuple[tuple[str, bytes], ...]:
        """The details, untouched."""
        return ((DETAILS_TRAILER, self._details),)


class ControlClient:
    """Asks control.

    Args:
        socket: path of control.sock.
        gateway_id: random, fixed for the life of this process.
        background: where settling goes on when its call is gone.
    """

    def __init__(self, socket: Path, gateway_id: str, background: Background) -> None:
        self._channel = open_channel(socket)
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)
        self._gateway_id = gateway_id
        self._background = background
        self._leases: set[str] = set()

    async def authorize(
        self, caller: control_pb2.Caller, method: str, model: str, request_id: str
    ) -> control_pb2.AuthorizeResponse:
        """Whether this caller may, and where it runs; charges nothing."""
        request = control_pb2.AuthorizeRequest(
            caller=caller, method=method, model=model, request_id=request_id, gateway_id=self._gateway_id
        )
        return await _ask(self._stub.Authorize, request, ANSWER_S)

    async def visible_models(
        self, caller: control_pb2.Caller, method: str
    ) -> control_pb2.ListVisibleModelsResponse:
        """The models this caller may use."""
        request = control_pb2.ListVisibleModelsRequest(caller=caller, method=method)
        return await _ask(self._stub.ListVisibleModels, request, ANSWER_S)

    async def admit(self, request: control_pb2.AdmitRequest) -> control_pb2.AdmitResponse:
        """A lease, named in each heartbeat until settled. Run it shielded: a lease given must be settled."""
        admitted = await _ask(self._stub.Admit, request, ADMIT_S)
        self._leases.add(admitted.lease)
        return admitted

    async def await_intent(self, lease: str) -> None:
        """Return once the intent of `lease` is durable."""
        await _ask(self._stub.AwaitIntent, control_pb2.AwaitIntentRequest(lease=lease), ANSWER_S)

    async def settle(self, request: control_pb2.SettleRequest) -> control_pb2.SettleResponse:
        """Close a lease. When control cannot take it now, that is raised, and tried again in the background."""
        try:
            response = await _ask(self._stub.Settle, request, SETTLE_S)
        except CloisterError as error:
            if error.status is grpc.StatusCode.UNAVAILABLE:
                self._background.spawn(self._settle_later(request))
            else:
                self._leases.discard(request.lease)
            raise
        self._leases.discard(request.lease)
        return response

    async def record_refusal(self, request: control_pb2.RecordRefusalRequest) -> bool:
        """Put a refusal of the gateway's own into the audit log, if control takes it in time; whether it did."""
        try:
            await _ask(self._stub.RecordRefusal, request, RECORD_S)
        except CloisterError as error:
            log.warning("refusal not recorded yet", extra={"reason": request.reason, "code": error.code})
            return False
        return True

    async def heartbeat(self, address: str, limit_s: float) -> Sequence[str] | None:
        """Tell control that this process lives, where it listens and which leases it has.

        Returns: those of them that control has closed; None when it did not hear.
        """
        request = control_pb2.HeartbeatRequest(
            gateway_id=self._gateway_id, address=address, leases=sorted(self._leases)
        )
        try:
            heard = await _ask(self._stub.Heartbeat, request, limit_s)
        except CloisterError:
            return None
        return heard.closed_leases

    async def close(self) -> None:
        """Hang up."""
        await self._channel.close()

    async def _settle_later(self, request: control_pb2.SettleRequest) -> None:
        """Settle again until control answers; a control that started anew has settled it itself and says so."""
        pause = _RETRY_FIRST_S
        for _ in range(_RETRIES):
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RETRY_MOST_S)
            try:
                await _ask(self._stub.Settle, request, SETTLE_S)
            except CloisterError as error:
                if error.status is grpc.StatusCode.UNAVAILABLE:
                    continue
                log.info("late settlement refused", extra={"code": error.code})
            break
        else:
            log.error("lease never settled", extra={"tries": _RETRIES})
        self._leases.discard(request.lease)


async def _ask(
    method: "grpc.aio.UnaryUnaryMultiCallable[Request, Response]", request: Request, limit_s: float
) -> Response:
    try:
        return await method(request, timeout=limit_s)
    except grpc.aio.AioRpcError as error:
        raise _reading(error, type(request).__name__) from None


def _reading(error: grpc.aio.AioRpcError, question: str) -> CloisterError:
    """A refusal with details is control's own word; without, control is gone, stuck or broken."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_TRAILER and isinstance(value, bytes):
            return ControlRefusalError(error, value)
    log.warning("control does not answer", extra={"question": question, "status": error.code().name})
    return CloisterError(
        "CONTROL_UNAVAILABLE",
        "the appliance cannot admit or record requests at present; try again, and tell its operator if it lasts",
        grpc.StatusCode.UNAVAILABLE,
        retry_after=timedelta(seconds=1),
    )
