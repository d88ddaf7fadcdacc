"""The TLS listener: which connections and calls get as far as the service, and the way from start to drained."""

import asyncio
import logging
import secrets
import socket
from datetime import timedelta
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from appliance import policy
from appliance.errors import CloisterError
from appliance.gateway import health
from appliance.gateway.background import Background
from appliance.gateway.control import ControlClient
from appliance.gateway.gate import Gate
from appliance.gateway.limits import Limits
from appliance.gateway.neighbours import Neighbours
from appliance.gateway.refusals import Refusals
from appliance.gateway.service import SERVICE, InferenceService
from appliance.gateway.sessions import Sessions
from appliance.gateway.streams import Streams
from appliance.gateway.texts import Texts
from appliance.protos import inference_pb2, inference_pb2_grpc
from engine.process import Process

HEARTBEAT_S = 1.0
# After the grace: calls that were cut off write their status, and their leases are settled.
_LAST_WORDS_S = 3.0

# Control abandons the leases of a gateway that it has not heard for so long; their streams end here, too.
SILENCE_S = 5.0
_BEAT_ANSWER_S = 2.0

# A call beyond this many is refused by gRPC itself; the gate refuses, with details, well before.
_MAX_CALLS = 16_384
# Larger than the service's own limit, so that a request that is too large gets an error that says so.
_MAX_MESSAGE_BYTES = 16 << 20
_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    ("grpc.max_concurrent_streams", 256),
    ("grpc.max_allowed_incoming_connections", 4096),
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 3),
)

log = logging.getLogger(__name__)


class Gateway:
    """The gateway process.

    Args:
        home: the appliance's home directory.
        listen: HOST:PORT; port 0 takes a free one.
        advertise: the host that clients are told; by default the one listened on, or this machine's name when that
            is every address.
        limits: what an operator may set.

    Attributes:
        address: host:port for clients, once started.
    """

    def __init__(
        self, home: Path, listen: str, advertise: str | None = None, limits: Limits | None = None
    ) -> None:
        self.address = ""
        self._limits = limits or Limits()
        self._listen = listen
        self._advertise = advertise
        self._background = Background()
        self._control = ControlClient(home / "run" / "control.sock", secrets.token_hex(16), self._background)
        self._sessions = Sessions()
        self._texts = Texts()
        self._streams = Streams()
        near = Neighbours(
            self._control, self._texts, self._sessions, self._background, self._streams, limits=self._limits
        )
        self._refusals = Refusals(self._control)
        self._service = InferenceService(near, self._refusals)
        self._health = health.Health((SERVICE, health.SERVICE))
        self._gate = Gate(self._refusals, self._limits)
        self._server = grpc.aio.server(
            interceptors=(self._gate,), maximum_concurrent_rpcs=_MAX_CALLS, options=_OPTIONS
        )
        self._credentials = server_credentials(home / "gateway")

    async def serve(self, process: Process) -> None:
        """Serve from READY until `process` is told to stop, and then what is still running."""
        await self.start()
        beating = asyncio.create_task(self._beat())
        process.ready()
        await process.stopping.wait()
        await self.drain()
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        await self._hang_up()

    async def start(self) -> None:
        """Listen.

        Raises:
            CloisterError: LISTEN_FAILED, or POLICY_INCOMPLETE.
        """
        descriptor = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
        policy.check_complete([descriptor, health_pb2.DESCRIPTOR.services_by_name["Health"]])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            port = self._server.add_secure_port(self._listen, self._credentials)
        except RuntimeError:
            port = 0
        if not port:
            raise CloisterError(
                "LISTEN_FAILED",
                f"cannot listen on {self._listen}; is another process there, or the address not this machine's?",
                grpc.StatusCode.UNAVAILABLE,
            )
        self.address = f"{self._advertise or _dialable(self._listen.rpartition(':')[0])}:{port}"
        await self._server.start()
        log.info("listening", extra={"address": self.address})

    async def drain(self, grace_s: float | None = None) -> None:
        """Refuse what is new, finish what runs, cut off what runs after `grace_s` seconds (drain_seconds)."""
        grace_s = self._limits.drain_seconds if grace_s is None else grace_s
        self._service.draining = True
        await self._health.set(False)
        if not await self._service.wait_idle(grace_s):
            log.warning("cutting off what still runs")
            self._sessions.fail_all(_stopping())
            await self._service.wait_idle(_LAST_WORDS_S)

    async def _hang_up(self) -> None:
        await self._server.stop(1.0)
        unfinished = await self._background.finish(_LAST_WORDS_S)
        if unfinished:
            log.error("leases not settled", extra={"count": unfinished})
        await self._refusals.close()
        await self._sessions.close()
        await self._texts.close()
        await self._control.close()

    async def _beat(self) -> None:
        """Keep our leases alive, and end the streams of those that control has closed.

        Without control nothing can be answered, health says so, and what is being answered ends in time.
        """
        now = asyncio.get_running_loop().time
        heard = now()
        while True:
            sent = now()
            limit_s = max(0.1, min(_BEAT_ANSWER_S, _left(heard, sent)))
            closed = await self._control.heartbeat(self.address, limit_s)
            if closed is not None:
                heard = sent
                self._streams.cut(closed)
            elif _left(heard, now()) <= 0:
                self._streams.cut_all()
            if not self._service.draining:
                await self._health.set(closed is not None)
            pause = _left(heard, now())
            await asyncio.sleep(min(HEARTBEAT_S, pause) if pause > 0 else HEARTBEAT_S)


def server_credentials(folder: Path) -> grpc.ServerCredentials:
    """Our certificate, and the authority that a client's must come from.

    Raises:
        CloisterError: NOT_INITIALISED.
    """
    try:
        key, certificate, clients = (
            (folder / name).read_bytes() for name in ("tls.key", "tls.pem", "client-ca.pem")
        )
    except FileNotFoundError as error:
        raise CloisterError(
            "NOT_INITIALISED",
            f"{error.filename} is missing; make it with `cloister init`",
            grpc.StatusCode.FAILED_PRECONDITION,
        ) from None
    return grpc.ssl_server_credentials([(key, certificate)], clients, require_client_auth=True)


def _left(heard: float, now: float) -> float:
    """Seconds until control takes us for dead."""
    return heard + SILENCE_S - now


def _dialable(host: str) -> str:
    """The host to tell clients; every address is nowhere in particular, so then this machine's name."""
    return socket.gethostname() if host in ("", "0.0.0.0", "[::]", "::", "*") else host  # noqa: S104 - compared


def _stopping() -> CloisterError:
    return CloisterError(
        "GATEWAY_STOPPING",
        "the gateway stops before the answer is complete; send the request again under a new id",
        grpc.StatusCode.UNAVAILABLE,
        retry_after=timedelta(seconds=1),
    )
