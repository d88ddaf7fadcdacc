"""The host service: the desired set of deployments made real, and watched."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc

from engine.errors import EngineError
from engine.host.inventory import Inventory
from engine.host.keeper import RestartPolicy
from engine.host.packing import Packer
from engine.host.places import Places, own_cores
from engine.host.planning import Planner
from engine.host.slot import DeploymentSlot
from engine.protos import engine_pb2, engine_pb2_grpc

# A name becomes part of a socket's path, of which the kernel allows 107 bytes.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")


class HostService(engine_pb2_grpc.HostServiceServicer):
    """`cloister.engine.v1.HostService`.

    Args:
        run: directory of sockets.
        store: directory of files by digest.
        policy: restarts and draining.
        inventory: recorded devices; measured when None.
        cores_left: told at each change which hardware threads are left to processes that are not of deployments.
        packer: of weights, before workers start; each worker packs by itself when None.
    """

    def __init__(
        self,
        run: Path,
        store: Path,
        policy: RestartPolicy | None = None,
        inventory: Inventory | None = None,
        cores_left: Callable[[frozenset[int]], None] = lambda left: None,
        packer: Packer | None = None,
    ) -> None:
        self._run = run
        self._store = store
        self._policy = policy or RestartPolicy()
        self._planner = Planner(store, inventory)
        self._planning = asyncio.Lock()
        self._asking = ThreadPoolExecutor(1, "inventory")  # one call of a driver that hangs holds one thread
        self._slots: dict[str, DeploymentSlot] = {}
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._version = 0
        self._news = asyncio.Event()
        self._closing = self._closed = False
        self._places = Places(own_cores(), cores_left)
        self._packer = packer

    async def GetInventory(  # noqa: N802  # the method's name in the proto
        self,
        request: engine_pb2.GetInventoryRequest,
        context: grpc.aio.ServicerContext[engine_pb2.GetInventoryRequest, engine_pb2.GetInventoryResponse],
    ) -> engine_pb2.GetInventoryResponse:
        """The devices of this machine, or those of the recorded inventory; no plan waits for a slow driver."""
        work = partial(self._planner.inventory, self._workers())
        now = await asyncio.get_running_loop().run_in_executor(self._asking, work)
        return engine_pb2.GetInventoryResponse(devices=now.devices, recorded_from=now.recorded_from, nvml=now.nvml)

    async def PlanDeployment(  # noqa: N802
        self,
        request: engine_pb2.PlanDeploymentRequest,
        context: grpc.aio.ServicerContext[engine_pb2.PlanDeploymentRequest, engine_pb2.PlanDeploymentResponse],
    ) -> engine_pb2.PlanDeploymentResponse:
        """What a deployment would take, beside those that are promised their memory already."""
        try:
            async with self._planning:
                plan = await asyncio.to_thread(
                    self._planner.plan, request.deployment, self._workers(), request.device
                )
        except EngineError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return engine_pb2.PlanDeploymentResponse(plan=plan)

    async def Reconcile(  # noqa: N802
        self,
        request: engine_pb2.ReconcileRequest,
        context: grpc.aio.ServicerContext[engine_pb2.ReconcileRequest, engine_pb2.ReconcileResponse],
    ) -> engine_pb2.ReconcileResponse:
        """Start, keep and stop until what runs is what is asked; a failed deployment is tried again."""
        desired = {deployment.name: deployment for deployment in request.deployments}
        bad = next((name for name in desired if not _NAME.fullmatch(name)), None)
        if bad is not None or len(desired) != len(request.deployments):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"INVALID_DEPLOYMENT: {bad!r} is no deployment's name"
                if bad is not None
                else "INVALID_DEPLOYMENT: two deployments have the same name",
            )
        if self._closing:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "HOST_DRAINING: engine-host is stopping")
        async with self._planning:
            await asyncio.to_thread(self._planner.promise, desired, self._workers())
            if self._packer is not None:
                self._packer.hear(request.derived, {wanted.files.model_digest for wanted in desired.values()})
            self._want(desired)
        return engine_pb2.ReconcileResponse()

    async def WatchDeployments(  # noqa: N802
        self,
        request: engine_pb2.WatchDeploymentsRequest,
        context: grpc.aio.ServicerContext[engine_pb2.WatchDeploymentsRequest, engine_pb2.WatchDeploymentsResponse],
    ) -> AsyncIterator[engine_pb2.WatchDeploymentsResponse]:
        """The whole list now and at each change; a slow reader gets the latest and not all between."""
        seen = -1
        while not (self._closed and seen == self._version):
            while seen == self._version:
                await self._news.wait()
            seen = self._version
            statuses = [slot.status() for _, slot in sorted(self._slots.items())]
            yield engine_pb2.WatchDeploymentsResponse(deployments=statuses)

    async def close(self) -> None:
        """Drain every deployment; watchers see the end and are let go."""
        self._closing = True
        self._want({})
        await asyncio.gather(*self._lives.values())
        self._closed = True
        self._changed()

    def _workers(self) -> dict[str, int]:
        """Process ids of the workers by deployment; 0 where there is none yet. What has failed is left out."""
        pids = {name: slot.worker_pid for name, slot in self._slots.items()}
        return {name: pid for name, pid in pids.items() if pid is not None}

    def _want(self, desired: dict[str, engine_pb2.Deployment]) -> None:
        for name, slot in self._slots.items():
            slot.want(desired.get(name))
        for name in desired.keys() - self._slots.keys():
            places = self._run, self._store
            slot = DeploymentSlot(
                name, *places, self._changed, self._policy, self._planner.complete, self._places.take, self._packer
            )
            slot.want(desired[name])
            self._slots[name] = slot
            self._lives[name] = asyncio.create_task(self._live(name, slot))

    async def _live(self, name: str, slot: DeploymentSlot) -> None:
        try:
            await slot.live()
        finally:
            del self._slots[name], self._lives[name]
            self._changed()

    def _changed(self) -> None:
        """Wake every watcher, and put every process in its place."""
        self._places.settle({name: slot.pids for name, slot in self._slots.items() if slot.worker_pid is not None})
        self._version += 1
        self._news.set()
        self._news = asyncio.Event()
