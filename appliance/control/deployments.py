"""Desired and running deployments: control tells engine-host the first and hears from it about the second.

Desired deployments lie in control.db. Whenever engine-host is reached again, and at every change, it is told all
of them; its watch then says how each one is. While it is not reached, nothing counts as ready.

So engine-host is heard before it is told: what it runs that is wanted no more, as after a control that was killed
in an activation, frees its memory before anything takes its place; and a deployment whose version was revoked is
kept while it answers, as a revocation is no outage by itself, but never started again.
"""

import asyncio
import contextlib
import logging
from datetime import timedelta
from pathlib import Path

import grpc
from sqlalchemy import select
from sqlalchemy.orm import Session

from appliance.control import derived
from appliance.control.db.database import Database
from appliance.control.db.models import Deployment
from appliance.errors import CloisterError
from bundles.protos import importer_pb2
from engine.protos import engine_pb2, engine_pb2_grpc

WAITING = "waiting for engine-host"
_TELL_LIMIT_S = 5.0
_ASK_LIMIT_S = 5.0
_DEVICES_LIMIT_S = 30.0  # a driver that sleeps takes 1 to 3 s for each device
_REACH_LIMIT_S = 2.0
_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
"""Between two tries of what fails for a reason that control does not know."""
_READY = engine_pb2.DEPLOYMENT_STATE_READY
_LONGEST_ANSWER = 64 << 20  # a model version of 100,000 files
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", _LONGEST_ANSWER),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
)

log = logging.getLogger(__name__)


class Deployments:
    """The reconciler. `run` it as a task; the rest answers from memory.

    Args:
        database: control.db.
        socket: engine-host's.

    Attributes:
        loading: held from a plan until engine-host is told of what was planned, so that it knows what one load is
            promised before it plans the next.
    """

    def __init__(self, database: Database, socket: Path) -> None:
        self.loading = asyncio.Lock()
        self._database = database
        self._derived = derived.DerivedFiles(database)
        self._socket = socket
        self._desired: dict[str, str] = {}
        self._revoked: dict[str, str] = {}
        self._withheld: frozenset[str] = frozenset()
        self._leaving: frozenset[str] = frozenset()
        self._running: dict[str, engine_pb2.DeploymentStatus] = {}
        self._host: engine_pb2_grpc.HostServiceAsyncStub | None = None
        self._reached = asyncio.Event()
        self._telling = asyncio.Lock()
        self._told = False
        self._changing: set[str] = set()
        self._heard = asyncio.Event()

    @property
    def connected(self) -> bool:
        """engine-host is reached."""
        return self._host is not None

    def status(self, name: str) -> engine_pb2.DeploymentStatus:
        """How a deployment is, as engine-host said last; LOADING until it has said anything about this version."""
        if name in self._withheld:
            return engine_pb2.DeploymentStatus(
                name=name,
                state=engine_pb2.DEPLOYMENT_STATE_FAILED,
                reason="MODEL_REVOKED",
                message=f"its version is no longer vouched for ({self._revoked[name]}) and is not started again",
            )
        status = self._running.get(name)
        if name in self._changing or status is None or status.model_digest not in ("", self._desired.get(name)):
            return engine_pb2.DeploymentStatus(name=name, state=engine_pb2.DEPLOYMENT_STATE_LOADING)
        return status

    def state(self, name: str) -> str:
        """Its state in words."""
        if not self.connected:
            return WAITING
        return engine_pb2.DeploymentState.Name(self.status(name).state).removeprefix("DEPLOYMENT_STATE_").lower()

    def is_running(self, name: str) -> bool:
        """engine-host has something of it, be it on its way out."""
        return name in self._running

    async def next_word(self, limit_s: float) -> None:
        """Wait until engine-host says something or goes away, `limit_s` seconds at the most."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._heard.wait(), limit_s)

    def _wake(self) -> None:
        self._heard.set()
        self._heard = asyncio.Event()

    def is_ready(self, name: str) -> bool:
        """It answers requests."""
        return self.connected and self.status(name).state == _READY

    def ready(self, name: str) -> engine_pb2.DeploymentStatus:
        """The status of a deployment that answers.

        Raises:
            CloisterError: MODEL_NOT_READY.
        """
        if not self.is_ready(name):
            raise CloisterError(
                "MODEL_NOT_READY",
                f"the model is not ready ({self.state(name)}); try again in a moment",
                grpc.StatusCode.UNAVAILABLE,
                {"state": self.state(name)},
                retry_after=timedelta(seconds=1),
            )
        return self.status(name)

    def worker_socket(self, name: str) -> str:
        """Where its worker listens; empty while there is none that does."""
        status = self.status(name) if self.connected else engine_pb2.DeploymentStatus()
        return status.worker_socket if status.state in (_READY, engine_pb2.DEPLOYMENT_STATE_DRAINING) else ""

    async def inventory(self) -> engine_pb2.GetInventoryResponse:
        """The devices, as engine-host finds them now.

        Raises:
            CloisterError: ENGINE_HOST_UNAVAILABLE.
        """
        host = await self._reachable()
        try:
            return await host.GetInventory(engine_pb2.GetInventoryRequest(), timeout=_DEVICES_LIMIT_S)
        except grpc.aio.AioRpcError as error:
            raise _refusal(error) from error

    async def plan(self, deployment: engine_pb2.Deployment, device: str = "") -> engine_pb2.MemoryPlan:
        """What a deployment would take, as engine-host computes it from the model's files.

        Raises:
            CloisterError: ENGINE_HOST_UNAVAILABLE, or engine-host's reason.
        """
        host = await self._reachable()
        request = engine_pb2.PlanDeploymentRequest(deployment=deployment, device=device)
        try:
            return (await host.PlanDeployment(request, timeout=_ASK_LIMIT_S)).plan
        except grpc.aio.AioRpcError as error:
            raise _refusal(error) from error

    async def _reachable(self) -> "engine_pb2_grpc.HostServiceAsyncStub":
        """engine-host, waited for a moment as it may just be starting."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._reached.wait(), _REACH_LIMIT_S)
        if self._host is None:
            raise _unavailable()
        return self._host

    async def changed(self, name: str | None = None) -> None:
        """Tell engine-host what is desired now, `name` having changed; or as soon as it is reached."""
        if name is not None:
            self._changing.add(name)
        try:
            async with self._telling:
                await self._tell()
        finally:
            self._changing.discard(name or "")

    async def sweep(self) -> None:
        """Tell again what engine-host would not hear before."""
        if self.connected and not self._told:
            await self.changed()

    async def run(self) -> None:
        """Keep in touch with engine-host until cancelled."""
        pause = _PAUSE_S
        while True:
            try:
                async with grpc.aio.insecure_channel(f"unix:{self._socket}", options=CHANNEL_OPTIONS) as channel:
                    await channel.channel_ready()
                    await self._follow(engine_pb2_grpc.HostServiceStub(channel))
            except grpc.aio.AioRpcError as error:
                log.warning("engine-host is gone", extra={"status": error.code().name})
                pause = _PAUSE_S
            except Exception:  # whatever it was, deployments must not stay as they were heard last
                log.exception("engine-host is not followed")
                pause = min(2 * pause, LONGEST_PAUSE_S)
            finally:
                self._host, self._running, self._leaving = None, {}, frozenset()
                self._reached.clear()
                self._wake()
            await asyncio.sleep(pause)

    async def _follow(self, host: "engine_pb2_grpc.HostServiceAsyncStub") -> None:
        """Hear what runs, tell all, then listen until the stream breaks."""
        log.info("engine-host is reached")
        async for update in host.WatchDeployments(engine_pb2.WatchDeploymentsRequest()):
            self._running = {status.name: status for status in update.deployments}
            await self._derived.hear(update.deployments)
            if self._host is None:
                self._leaving = frozenset(
                    self._running.keys() - {row.name for row in await self._database.run(_all)}
                )
                self._host = host
                self._reached.set()
                await self.changed()
            elif self._is_to_be_told():
                await self.changed()
            self._wake()

    def _is_to_be_told(self) -> bool:
        """There is room now for what waited; or a revoked version has stopped, and is not to be started again."""
        waited, self._leaving = self._leaving, self._leaving & self._running.keys()
        ceased = any(name not in self._withheld and not self._answers(name) for name in self._revoked)
        return ceased or (bool(waited) and not self._leaving)

    def _answers(self, name: str) -> bool:
        """engine-host runs a deployment, in the version that is wanted."""
        status = self._running.get(name)
        return status is not None and status.state == _READY and status.model_digest == self._desired.get(name)

    async def _tell(self) -> None:
        rows, on_record = await self._database.run(lambda s: (_all(s), derived.in_use(s)))
        self._desired = {row.name: row.model_digest for row in rows}
        self._revoked = {row.name: row.revoked for row in rows if row.revoked}
        self._told = False
        if self._host is None:
            return
        self._withheld = frozenset(name for name in self._revoked if not self._answers(name))
        self._leaving -= self._desired.keys()
        waits = self._desired.keys() - self._running.keys() if self._leaving else frozenset()
        told = [row for row in rows if row.name not in self._withheld | waits]
        try:
            await self._host.Reconcile(_reconcile_request(told, on_record), timeout=_TELL_LIMIT_S)
            self._told = True
        except grpc.aio.AioRpcError as error:
            log.warning("engine-host was not told", extra={"status": error.code().name})


def _unavailable() -> CloisterError:
    return CloisterError(
        "ENGINE_HOST_UNAVAILABLE",
        "engine-host is not reached, and it alone knows devices and memory; try again, then look at its log",
        grpc.StatusCode.UNAVAILABLE,
        retry_after=timedelta(seconds=1),
    )


def _refusal(error: grpc.aio.AioRpcError) -> CloisterError:
    """engine-host's own refusal, which begins with its code; its absence by name."""
    code, colon, message = (error.details() or "").partition(": ")
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION and colon and code.replace("_", "").isupper():
        return CloisterError(code, message, grpc.StatusCode.FAILED_PRECONDITION)
    log.warning("engine-host did not answer", extra={"status": error.code().name})
    return _unavailable()


def _all(session: Session) -> list[Deployment]:
    return list(session.scalars(select(Deployment).where(Deployment.parked.is_(False)).order_by(Deployment.name)))


def _reconcile_request(rows: list[Deployment], on_record: list[engine_pb2.Derived]) -> engine_pb2.ReconcileRequest:
    return engine_pb2.ReconcileRequest(deployments=map(as_engine_has_it, rows), derived=on_record)


def as_engine_has_it(row: Deployment) -> engine_pb2.Deployment:
    """A desired deployment in the engine's words."""
    return engine_pb2.Deployment(
        name=row.name,
        files=engine_pb2.FileSet.FromString(row.files),
        options=engine_pb2.DeploymentOptions.FromString(row.options),
    )


def files_of(version: importer_pb2.ModelVersion) -> engine_pb2.FileSet:
    """The files of a version as the engine has them."""
    files = [engine_pb2.File(path=f.path, size=f.size, sha256=f.sha256) for f in version.files]
    return engine_pb2.FileSet(model_digest=version.model_digest, files=files)


def require_fit(plan: engine_pb2.MemoryPlan) -> None:
    """Refuse a plan that does not fit.

    Raises:
        CloisterError: OUT_OF_MEMORY, with the numbers.
    """
    if not plan.fits:
        raise CloisterError(
            "OUT_OF_MEMORY",
            f"{plan.summary}; {plan.advice}",
            grpc.StatusCode.FAILED_PRECONDITION,
            {"total_bytes": str(plan.total_bytes), "available_bytes": str(plan.available_bytes)},
            field="options",
        )
