"""One deployment's place: what is wanted there, the two processes that run it, and the state they amount to."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from engine.host.child import ChildSpec, Ending
from engine.host.keeper import Keeper, RestartPolicy
from engine.host.packing import Packed, Packer, derived_message
from engine.launch import DERIVED_REFUSED
from engine.options import CPU
from engine.protos import engine_pb2

_ROLES = ("worker", "text")


class DeploymentSlot:
    """A name under which at most one deployment runs at a time.

    Args:
        name: of the deployment.
        run: directory of sockets.
        store: directory of files by digest.
        changed: called at each change of `status()`.
        policy: restarts and draining.
        complete: fills in, before a deployment starts, options that were planned for it.
        cores: chooses, before a deployment starts, the hardware threads that its worker has to itself.
        packer: packs its weights, before it starts; None: its worker does.
    """

    def __init__(
        self,
        name: str,
        run: Path,
        store: Path,
        changed: Callable[[], None],
        policy: RestartPolicy,
        complete: Callable[[engine_pb2.Deployment], engine_pb2.Deployment] = lambda deployment: deployment,
        cores: Callable[[engine_pb2.Deployment], tuple[int, ...]] = lambda deployment: (),
        packer: Packer | None = None,
    ) -> None:
        self._name = name
        self._run = run
        self._store = store
        self._changed = changed
        self._policy = policy
        self._complete = complete
        self._cores = cores
        self._packer = packer
        self._packed = Packed()
        self._wanted: engine_pb2.Deployment | None = None
        self._current = engine_pb2.Deployment(name=name)
        self._new_wish = asyncio.Event()
        self._draining = self._runs = False
        self._worker, self._text = self._keepers()

    @property
    def worker_pid(self) -> int | None:
        """The worker's process id, 0 while there is none; None when the deployment has failed and gets none."""
        return None if self._failure() is not None and not self._worker.pid else self._worker.pid

    @property
    def pids(self) -> tuple[int, int]:
        """The process ids of worker and text; 0 where there is none."""
        return self._worker.pid, self._text.pid

    def want(self, deployment: engine_pb2.Deployment | None) -> None:
        """Run this deployment, or none; the one that runs is drained first if it is another or has failed."""
        if deployment != self._wanted or self._failure() is not None:
            self._wanted = deployment
            self._new_wish.set()
            self._draining = self._runs
            self._changed()

    async def live(self) -> None:
        """Run what is wanted until nothing is, and that has drained."""
        while self._wanted is not None:
            self._new_wish.clear()
            self._current, self._draining, self._runs = self._wanted, False, True
            self._packed = Packed()
            self._worker, self._text = self._keepers()
            self._changed()
            if await self._is_packed():
                await self._run_current()

    async def _is_packed(self) -> bool:
        """Have the weights packed, and give them to the worker; False if another wish comes before."""
        if self._packer is None:
            return True
        wish = asyncio.create_task(self._new_wish.wait())
        complete = self._complete(self._current)
        packing = asyncio.create_task(self._packer.packed(complete, self._cores(complete)))
        try:
            await asyncio.wait((wish, packing), return_when=asyncio.FIRST_COMPLETED)
            if self._new_wish.is_set():
                return False
            self._packed = packing.result()
        finally:
            for task in (wish, packing):
                task.cancel()
            await asyncio.gather(wish, packing, return_exceptions=True)
        self._worker, self._text = self._keepers()
        return True

    async def _run_current(self) -> None:
        """Run both processes until another wish comes."""
        stop = asyncio.Event()
        wish = asyncio.create_task(self._new_wish.wait())
        runs = [asyncio.create_task(keeper.run(stop)) for keeper in (self._worker, self._text)]
        try:
            await asyncio.wait((wish, *runs), return_when=asyncio.FIRST_COMPLETED)
            self._changed()
            stop.set()
            await asyncio.gather(*runs)
            await wish
        finally:
            if self._packer and self._packed.derived and self._refusal():
                self._packer.refuse(self._packed.derived)
            for task in (wish, *runs):
                task.cancel()

    def status(self) -> engine_pb2.DeploymentStatus:
        """The deployment as it is."""
        state, reason, message = self._state()
        derived, refused = self._packed.derived, self._refusal()
        capabilities = self._text.facts.get("CAPABILITIES", "")
        return engine_pb2.DeploymentStatus(
            name=self._name,
            state=state,
            reason=reason,
            message=message,
            worker_socket=str(self._run / f"worker-{self._name}.sock"),
            text_socket=str(self._run / f"text-{self._name}.sock"),
            max_context_tokens=int(self._worker.facts.get("MAX_CONTEXT_TOKENS", "0")),
            capabilities=capabilities.split(",") if capabilities else [],
            restarts=self._worker.restarts + self._text.restarts,
            model_digest=self._current.files.model_digest,
            worker_pid=self._worker.pid,
            runs_as=self._worker.facts.get("RUNS_AS", ""),
            derived=derived_message(derived) if derived and not refused else None,
            refused=derived_message(derived) if derived and refused else None,
        )

    def _refusal(self) -> str:
        """Why the worker did not take the derived file that it was given: CODE: message; empty if it did."""
        return self._worker.facts.get(DERIVED_REFUSED, "") if self._packed.derived else ""

    def _state(self) -> "tuple[engine_pb2.DeploymentState.ValueType, str, str]":
        """State, reason and message; a refusal outlives the process that was stopped because of it."""
        endings = [keeper.ending for keeper in (self._worker, self._text) if keeper.ending]
        failure = self._failure()
        if self._draining:
            return engine_pb2.DEPLOYMENT_STATE_DRAINING, "", ""
        if failure is not None:
            return engine_pb2.DEPLOYMENT_STATE_FAILED, failure.code, failure.message
        if self._worker.is_ready and self._text.is_ready:
            reason, _, message = (self._refusal() or self._packed.problem).partition(": ")
            return engine_pb2.DEPLOYMENT_STATE_READY, reason, message
        if endings:
            return engine_pb2.DEPLOYMENT_STATE_RESTARTING, endings[0].code, endings[0].message
        return engine_pb2.DEPLOYMENT_STATE_LOADING, "", ""

    def _failure(self) -> Ending | None:
        return next((k.ending for k in (self._worker, self._text) if k.ending and k.ending.refused), None)

    def _keepers(self) -> tuple[Keeper, Keeper]:
        complete = self._complete(self._current)
        if self._packed.derived:
            complete.derived.CopyFrom(derived_message(self._packed.derived))
        cores, deployment = self._cores(complete), complete.SerializeToString(deterministic=True)
        limits = self._policy.heard_within_s, self._policy.step_within_s
        derived = self._packer.folder if self._packer else None
        device = "" if complete.options.device == CPU else complete.options.device
        worker, text = (
            Keeper(
                ChildSpec(role, self._name, self._run, self._store, deployment, *limits, cores, derived, device),
                self._changed,
                self._policy,
            )
            for role in _ROLES
        )
        return worker, text
