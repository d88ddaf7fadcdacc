"""Tokens from text: the gateway's calls to the engine-text of a deployment, and what its refusals mean."""

import logging
import re
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import grpc

from appliance.errors import CloisterError
from appliance.gateway.places import Places
from appliance.gateway.unix import open_channel
from engine.protos import engine_pb2, engine_pb2_grpc

PREPARE_S = 10.0
# engine-text ends itself over a prompt that takes longer than this and is then gone for everybody: a call that was
# waiting so long when it went may be the one, and must not be sent again by itself.
SUSPECT_S = 1.5
# Of one tenant, at one engine-text, which does one after the other in the order in which they come: the others of
# the tenant wait here, and no other tenant behind them. Two keep it busy.
CALLS_OF_A_TENANT = 2
_CODED = re.compile(r"([A-Z][A-Z0-9_]{2,63}): (.{1,1000})", re.DOTALL)
_OWN_WORD = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,
    }
)

Request = TypeVar("Request")
Response = TypeVar("Response")

log = logging.getLogger(__name__)


class Texts:
    """The engine-texts of this appliance, each by its socket; a tenant, by its scope, has its share of each."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._places = Places(CALLS_OF_A_TENANT)

    async def tokenize(self, socket: str, scope: str, request: engine_pb2.TokenizeRequest) -> Sequence[int]:
        """The text's token ids.

        Raises:
            CloisterError: as `prepare`.
        """
        stub = engine_pb2_grpc.TextServiceStub(self._channel(socket))
        async with self._places.place((socket, scope)):
            return (await _ask(stub.Tokenize, request)).token_ids

    async def detokenize(self, socket: str, scope: str, request: engine_pb2.DetokenizeRequest) -> str:
        """The tokens' text.

        Raises:
            CloisterError: as `prepare`.
        """
        stub = engine_pb2_grpc.TextServiceStub(self._channel(socket))
        async with self._places.place((socket, scope)):
            return (await _ask(stub.Detokenize, request)).text

    async def prepare(
        self, socket: str, scope: str, request: engine_pb2.PrepareRequest
    ) -> engine_pb2.PrepareResponse:
        """The prompt's tokens, template included.

        Raises:
            CloisterError: engine-text's own refusal; PREPARE_TIMEOUT; or ENGINE_UNAVAILABLE.
        """
        stub = engine_pb2_grpc.TextServiceStub(self._channel(socket))
        async with self._places.place((socket, scope)):
            return await _ask(stub.Prepare, request)

    async def close(self) -> None:
        """Hang up."""
        for channel in self._channels.values():
            await channel.close()

    def _channel(self, socket: str) -> grpc.aio.Channel:
        if socket not in self._channels:
            self._channels[socket] = open_channel(Path(socket))
        return self._channels[socket]


def engine_unavailable() -> CloisterError:
    """The engine of the deployment is not there now; it is being started again."""
    return CloisterError(
        "ENGINE_UNAVAILABLE",
        "the model's engine does not answer at present; it is started again by itself, try again",
        grpc.StatusCode.UNAVAILABLE,
        retry_after=timedelta(seconds=1),
    )


async def _ask(method: "grpc.aio.UnaryUnaryMultiCallable[Request, Response]", request: Request) -> Response:
    started = time.monotonic()
    try:
        return await method(request, timeout=PREPARE_S)
    except grpc.aio.AioRpcError as error:
        raise _reading(error, time.monotonic() - started) from None


def _reading(error: grpc.aio.AioRpcError, waited_s: float) -> CloisterError:
    status = error.code()
    coded = _CODED.fullmatch(error.details() or "")
    if coded and status in _OWN_WORD:
        return CloisterError(coded[1], coded[2], status)
    if status is grpc.StatusCode.DEADLINE_EXCEEDED or waited_s >= SUSPECT_S:
        return CloisterError(
            "PREPARE_TIMEOUT",
            "the text was not turned into tokens, or back, in time; shorten it, or try again later",
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        )
    log.warning("engine-text does not answer", extra={"status": status.name})
    return engine_unavailable()
