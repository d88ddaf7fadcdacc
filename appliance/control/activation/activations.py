"""Activations and rollbacks under way: planned, loaded, tried, switched; or returned to where the alias was.

An activation is a task of control, not of the call that began it: the caller may leave and come back. Whatever
ends it other than success, the alias is where it was and what was loaded for it is gone; the reason is a stable
code.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

import grpc
from sqlalchemy.orm import Session

from appliance.control.activation import canaries, trial
from appliance.control.activation.canaries import Verdict
from appliance.control.activation.system_tenant import Issuer
from appliance.control.activation.trial import Place, Trial, Wanted
from appliance.control.db.database import Database
from appliance.control.db.models import Deployment
from appliance.control.deployments import Deployments, as_engine_has_it, files_of, require_fit
from appliance.control.journal import Journal
from appliance.control.untold import UntoldEvents
from appliance.control.versions import Versions
from appliance.errors import CloisterError
from appliance.protos import admin_pb2

_LOOK_AGAIN_S = 1.0
_HOST_AWAY_S = 60.0
_GONE_WITHIN_S = 120.0
_MOST_RESTARTS = 3
_TRY_AGAIN_S = 1.0

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Running:
    """One activation, for those who watch it.

    Args:
        wanted: what is being put behind which alias.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        version = f"{wanted.version.name}@{wanted.version.version}"
        self.now = admin_pb2.Activation(model_version=version, canaries_total=len(wanted.canaries))
        self.refusal: CloisterError | None = None
        self.ended = False
        self._told: list[admin_pb2.Activation] = []
        self._changed = asyncio.Event()

    def tell(self, stage: str, message: str, **facts: str | int) -> None:
        """Something has happened; `facts` are further fields."""
        told = admin_pb2.Activation()
        told.CopyFrom(self.now)
        told.MergeFrom(admin_pb2.Activation(stage=stage, message=message, **facts))  # type: ignore[arg-type]  # by name
        self.now = told
        self._told.append(told)
        self._wake()

    def end(self, refusal: CloisterError | None = None) -> None:
        """Nothing happens any more; a refusal came before anything was changed."""
        self.refusal, self.ended = refusal, True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self) -> AsyncIterator[admin_pb2.Activation]:
        """How it is now and every change from here, the last one included.

        Raises:
            CloisterError: why nothing was tried at all.
        """
        shown = max(0, len(self._told) - 1)
        while True:
            changed, ended = self._changed, self.ended
            for told in self._told[shown:]:
                shown += 1
                yield told
            if ended:
                break
            await changed.wait()
        if self.refusal is not None:
            raise self.refusal


@dataclass(frozen=True)
class Parts:
    """What activations work with.

    Attributes:
        database: control.db.
        deployments: engine-host.
        issuer: makes the canaries' client.
        versions: knows whether a version may still run when its trial is over.
        journal: the audit log; while it takes nothing, nothing is switched.
        untold: tells it what changed.
        canary_seconds: how long the answer to a canary may take.
    """

    database: Database
    deployments: Deployments
    issuer: Issuer
    versions: Versions
    journal: Journal
    untold: UntoldEvents
    canary_seconds: float = 120.0


class Activations:
    """Begins activations and rollbacks, one at a time, and remembers the one that runs.

    Args:
        parts: what they work with.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._running: Running | None = None
        self._task: asyncio.Task[None] | None = None

    def begin(self, wanted: Wanted) -> Running:
        """Begin, or join the one that runs if it does the same.

        Raises:
            CloisterError: ACTIVATION_RUNNING, it does something else.
        """
        running = self._running
        if running is not None and not running.ended:
            if _same(running.wanted, wanted):
                return running
            raise trial.running()
        self._running = running = Running(wanted)
        self._task = asyncio.create_task(_Attempt(self._parts, running).carry_out())
        return running

    async def close(self) -> None:
        """Let go of what runs; the next start of control returns from it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


class _Attempt:
    """One activation from its plan to its end."""

    def __init__(self, parts: Parts, running: Running) -> None:
        self._parts = parts
        self._running = running
        self._wanted = running.wanted
        self._verdict = Verdict(len(running.wanted.canaries))

    async def carry_out(self) -> None:
        """All of it; never raises but when control stops."""
        try:
            begun, deployment, parked = await self._begin()
        except Exception as error:
            self._running.end(_as_refusal(error))
            return
        try:
            await self._try(begun, deployment, parked)
        except Exception as error:
            await self._return(begun, _as_refusal(error), parked)
        self._running.end()

    async def _begin(self) -> tuple[Trial, Deployment, bool]:
        """Plan, and record the trial.

        Raises:
            CloisterError: OUT_OF_MEMORY, ACTIVATION_RUNNING, ALIAS_CHANGED, engine-host's reason; no alias was
                touched.
        """
        files = files_of(self._wanted.version).SerializeToString()
        async with self._parts.deployments.loading:
            where = await self._run(lambda s: trial.place(s, self._wanted, files))
            park = where.made and not await self._make_room(where)
            self._parts.journal.check()
            begun = await self._run(lambda s: trial.begin(s, self._wanted, where, park))
        self._running.tell(trial.PLANNED, _how(begun, where, park), deployment=begun.deployment)
        return begun, where.row, park

    async def _make_room(self, where: Place) -> bool:
        """Whether the new deployment fits beside all others; those kept for a rollback give way if it does not.

        Raises:
            CloisterError: OUT_OF_MEMORY, it fits in place of the present one neither.
        """
        plan = await self._parts.deployments.plan(as_engine_has_it(where.row))
        if not plan.fits and where.idle:
            await self._run(lambda s: trial.drop_idle(s, where.idle))
            await self._parts.deployments.changed()
            await self._gone(where.idle)
            plan = await self._parts.deployments.plan(as_engine_has_it(where.row))
        if plan.fits:
            return True
        if where.previous is None or where.previous_is_shared:
            require_fit(plan)
        else:
            instead = as_engine_has_it(where.row)
            instead.name = where.previous.name
            require_fit(await self._parts.deployments.plan(instead))
        return False

    async def _try(self, begun: Trial, deployment: Deployment, parked: bool) -> None:
        await self._parts.deployments.changed(None if parked else begun.deployment)
        if parked:
            await self._gone([begun.previous])
            async with self._parts.deployments.loading:
                await self._run(lambda s: trial.switch(s, begun, deployment))
                await self._parts.deployments.changed(begun.deployment)
            self._running.tell(trial.SWITCHED, f"{self._wanted.alias} points at {begun.deployment}, on trial")
        self._running.tell(trial.LOADING, f"waits for {begun.deployment} to be ready")
        await self._ready(begun.deployment)
        if self._wanted.canaries:
            await self._try_canaries(begun)
        self._parts.journal.check()
        async with self._parts.deployments.loading:  # a revocation comes before it, or finds the version active
            await self._parts.versions.check(self._wanted.version.model_digest)
            gone = await self._run(lambda s: trial.mark_good(s, begun, self._verdict))
        if gone:
            await self._parts.deployments.changed()
        alias = self._wanted.alias
        if not parked:
            self._running.tell(trial.SWITCHED, f"{alias} points at {begun.deployment}")
        await self._settled()
        self._running.tell(trial.ACTIVE, f"{alias} answers with {self._running.now.model_version}")

    async def _try_canaries(self, begun: Trial) -> None:
        """Ask them all, through the gateway.

        Raises:
            CloisterError: CANARY_FAILED, CANARY_TIMEOUT, GATEWAY_UNAVAILABLE, or why the deployment failed.
        """
        self._running.tell(trial.CANARIES, "the release's canaries are asked through the gateway")
        model, limit_s = trial.trial_alias(begun.deployment), self._parts.canary_seconds
        async with (
            self._parts.issuer.client() as client,
            aclosing(canaries.run(client, model, self._wanted.canaries, limit_s)) as verdicts,
        ):
            async for verdict in verdicts:
                self._verdict = verdict
                self._running.tell(
                    trial.CANARIES,
                    f"{verdict.passed} of {verdict.done} passed",
                    canaries_done=verdict.done,
                    canaries_passed=verdict.passed,
                )
                self._check_alive(begun.deployment)
        self._verdict.check(self._wanted.version.canary_pass_percent)

    async def _ready(self, name: str) -> None:
        """Until a deployment answers.

        Raises:
            CloisterError: why it will not; ENGINE_HOST_UNAVAILABLE when engine-host stays away.
        """
        heard = time.monotonic()
        while not self._parts.deployments.is_ready(name):
            self._check_alive(name)
            if self._parts.deployments.connected:
                heard = time.monotonic()
            elif time.monotonic() - heard > _HOST_AWAY_S:
                raise CloisterError(
                    "ENGINE_HOST_UNAVAILABLE",
                    f"engine-host was not reached for {_HOST_AWAY_S:.0f} s; look at its log",
                    grpc.StatusCode.UNAVAILABLE,
                )
            await self._parts.deployments.next_word(_LOOK_AGAIN_S)

    def _check_alive(self, name: str) -> None:
        """Refuse a deployment that failed, or that dies again and again."""
        status, state = self._parts.deployments.status(name), self._parts.deployments.state(name)
        if state == "failed" or (state == "restarting" and status.restarts >= _MOST_RESTARTS):
            raise CloisterError(
                status.reason or "MODEL_FAILED",
                status.message or f"{name} does not run; look at engine-host's log",
                grpc.StatusCode.FAILED_PRECONDITION,
            )

    async def _gone(self, names: Sequence[str]) -> None:
        """Until engine-host runs none of these any more, so that their memory is free; or long enough."""
        end = time.monotonic() + _GONE_WITHIN_S
        while any(self._parts.deployments.is_running(name) for name in names) and time.monotonic() < end:
            await self._parts.deployments.next_word(_LOOK_AGAIN_S)

    async def _return(self, begun: Trial, refusal: CloisterError, parked: bool) -> None:
        """Bring everything back; the database may take several tries, and the alias is not left in between."""
        log.warning("an activation returns", extra={"alias": self._wanted.alias, "code": refusal.code})
        await self._surely(lambda s: trial.withdraw(s, begun))
        await self._parts.deployments.changed()
        if parked:
            await self._gone([begun.deployment])
        await self._surely(lambda s: trial.give_back(s, begun, refusal.code, self._verdict))
        await self._parts.deployments.changed()
        await self._settled()
        self._running.tell(trial.RETURNED, refusal.message, reason=refusal.code)

    async def _surely(self, work: Callable[[Session], None]) -> None:
        while True:
            try:
                return await self._run(work)
            except Exception:
                log.exception("a return is tried again")
                await asyncio.sleep(_TRY_AGAIN_S)

    async def _settled(self) -> None:
        await self._parts.untold.tell()

    async def _run(self, work: Callable[[Session], Result]) -> Result:
        return await self._parts.database.run(work)


def _how(begun: Trial, where: Place, park: bool) -> str:
    """What is about to be done, in words."""
    if not begun.made:
        return f"{begun.deployment} runs it already"
    if where.previous is None:
        return f"loads as {begun.deployment}, the first one behind this alias"
    place = "in place of the present one, as memory holds one alone" if park else "beside the present one"
    return f"loads as {begun.deployment}, {place}"


def _same(one: Wanted, other: Wanted) -> bool:
    """Whoever asked: it is the same version, with the same options, on the same way."""
    first, second = ((w.kind, w.alias, w.version.model_digest, w.options) for w in (one, other))
    return first == second


def _as_refusal(error: Exception) -> CloisterError:
    if isinstance(error, CloisterError):
        return error
    log.error("an activation failed", exc_info=error)
    return CloisterError("INTERNAL", "a defect of control; its log has it", grpc.StatusCode.INTERNAL)
