"""Plans of deployments against what is left of the memory once every deployment has all that it was promised.

The kernel's figure of available memory is too high while a deployment loads, and stays so afterwards, as KV pages
cost nothing until they are written. So what a deployment was planned to take and does not hold yet is taken off.

A CUDA device tells how much of it is taken, and not for certain by which process: what is taken there counts as
held by the deployments on it, up to what they were promised.
"""

import dataclasses
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import NamedTuple

from engine.cores import engine_cores
from engine.errors import EngineError
from engine.host.inventory import Inventory, find_device, measure
from engine.host.nvml import CUDA
from engine.launch import Launch
from engine.memory import own_bytes
from engine.memory_plan import MemoryPlan, plan_memory, read_model
from engine.options import CPU, EngineOptions
from engine.protos import engine_pb2

_CAPABILITY = re.compile(r"\d{1,3}\.\d{1,3}")
_LEAST_CAPABILITY = (8, 0)
_FLOAT8_CAPABILITY = (8, 9)


class _Promise(NamedTuple):
    deployment: engine_pb2.Deployment  # as asked for
    plan: engine_pb2.MemoryPlan  # empty when its files tell nothing


class Planner:
    """Knows the devices, and what of them is promised.

    Args:
        store: directory of files by digest.
        inventory: the devices; measured at each question when None.
        held: bytes that the worker of a deployment holds now, by its process id.
    """

    def __init__(
        self, store: Path, inventory: Inventory | None = None, held: Callable[[str], int] = own_bytes
    ) -> None:
        self._store = store
        self._recorded = inventory
        self._held = held
        self._promised: dict[str, _Promise] = {}

    def inventory(self, workers: Mapping[str, int]) -> Inventory:
        """The devices; what each has left is what a new deployment could take.

        Args:
            workers: process ids by the names of deployments.
        """
        now = self._recorded or measure()
        return dataclasses.replace(now, devices=tuple(self._left(device, workers) for device in now.devices))

    def plan(
        self, deployment: engine_pb2.Deployment, workers: Mapping[str, int], device: str = ""
    ) -> engine_pb2.MemoryPlan:
        """What a deployment would take; one of the same name is counted as gone.

        Raises:
            EngineError: DEVICE_NOT_FOUND, DEVICE_UNSUPPORTED, OPTIONS_INVALID, or why its files tell nothing.
        """
        asked = device or deployment.options.device
        others = {name: pid for name, pid in workers.items() if name != deployment.name}
        host = self._left(find_device(CPU, self._recorded), others)
        replaced = workers.get(deployment.name, 0)
        of_host = host.memory_available_bytes + (self._held(str(replaced)) if replaced else 0)
        if asked in ("", CPU):
            made = self._plan(deployment, "", of_host, of_host, host.cores)
        else:
            found = engine_pb2.Device()
            found.CopyFrom(find_device(asked, self._recorded))
            _require_usable(found, deployment.options)
            if replaced:
                found.memory_available_bytes += min(_taken(found), self._promised_on(asked, {deployment.name}))
            left = self._left(found, others).memory_available_bytes
            made = self._plan(deployment, asked, left, of_host, host.cores)
        return plan_message(made, self._recorded.recorded_from if self._recorded else "")

    def promise(self, deployments: Mapping[str, engine_pb2.Deployment], workers: Mapping[str, int]) -> None:
        """From now on these deployments, and no others, have a right to what they are planned to take.

        One whose files tell nothing is promised nothing: its worker says what is wrong with it.
        """
        self._promised = {
            name: kept
            for name, kept in self._promised.items()
            if name in deployments and kept.deployment == deployments[name]
        }
        known = dict.fromkeys(deployments, 0) | dict(workers)
        for name, deployment in deployments.items():
            if name not in self._promised:
                try:
                    plan = self.plan(deployment, known)
                except EngineError:
                    plan = engine_pb2.MemoryPlan()
                self._promised[name] = _Promise(deployment, plan)

    def complete(self, deployment: engine_pb2.Deployment) -> engine_pb2.Deployment:
        """The deployment with as many KV pages and threads as were planned, so that its worker takes no more.

        Nothing is filled in from a recorded inventory: the worker runs on this machine.
        """
        promise = self._promised.get(deployment.name)
        done = engine_pb2.Deployment()
        done.CopyFrom(deployment)
        if promise is not None and promise.deployment == deployment and self._recorded is None:
            done.options.kv_blocks = deployment.options.kv_blocks or promise.plan.options.kv_blocks
            done.options.threads = deployment.options.threads or promise.plan.options.threads
        return done

    def _left(self, device: engine_pb2.Device, workers: Mapping[str, int]) -> engine_pb2.Device:
        """A device without what is promised of it."""
        left = engine_pb2.Device()
        left.CopyFrom(device)
        if device.kind == CUDA:
            left.memory_available_bytes = _left_of_cuda(device, self._promised_on(device.id, workers))
        else:
            left.memory_available_bytes = max(0, device.memory_available_bytes - self._owed(workers))
        return left

    def _owed(self, workers: Mapping[str, int]) -> int:
        """Bytes of the host promised to deployments that they do not hold yet."""
        return sum(
            max(0, _of_host(promise.plan) - (self._held(str(workers[name])) if workers[name] else 0))
            for name, promise in tuple(self._promised.items())  # another thread may be promising
            if name in workers
        )

    def _promised_on(self, device: str, names: Container[str]) -> int:
        """Bytes of a CUDA device promised to these deployments."""
        plans = [promise.plan for name, promise in tuple(self._promised.items()) if name in names]
        return sum(plan.total_bytes for plan in plans if plan.device == device)

    def _plan(
        self, deployment: engine_pb2.Deployment, device: str, available: int, of_host: int, cores: int
    ) -> MemoryPlan:
        launch = Launch(deployment, self._store, Path())
        try:
            model = read_model(launch.files, launch.open_file)
        except OSError as error:
            raise EngineError("FILE_MISSING", f"the model's files cannot be read: {error.strerror}") from error
        options = dataclasses.replace(engine_options(deployment.options), device=device)
        return plan_memory(model, options, available, engine_cores(cores), host_available=of_host)


def _left_of_cuda(device: engine_pb2.Device, promised: int) -> int:
    """What of a device neither is taken nor was promised to deployments that do not hold it yet."""
    return max(0, device.memory_available_bytes - max(0, promised - _taken(device)))


def _taken(device: engine_pb2.Device) -> int:
    """What processes hold of a device."""
    return max(0, device.memory_bytes - device.memory_available_bytes)


def _of_host(plan: engine_pb2.MemoryPlan) -> int:
    """What a deployment takes of the host's memory."""
    return plan.total_bytes if plan.device in ("", CPU) else plan.host_total_bytes


def _require_usable(device: engine_pb2.Device, options: engine_pb2.DeploymentOptions) -> None:
    """Refuse a device that the kernels do not run on.

    Raises:
        EngineError: DEVICE_UNSUPPORTED.
    """
    told = device.compute_capability or "0.0"
    capability = tuple(int(part) for part in told.split(".")) if _CAPABILITY.fullmatch(told) else (0, 0)
    name, least = f"{device.name} ({device.id})", ".".join(map(str, _LEAST_CAPABILITY))
    if device.memory_available_bytes == 0 and not device.slice_of:
        raise EngineError("DEVICE_UNSUPPORTED", f"{name} has no memory left, or belongs to its slices: name one")
    if (0, 0) < capability < _LEAST_CAPABILITY:
        raise EngineError(
            "DEVICE_UNSUPPORTED", f"{name} has compute capability {told}; the kernels need {least} or later"
        )
    if options.kv_dtype == "float8" and (0, 0) < capability < _FLOAT8_CAPABILITY:
        raise EngineError(
            "DEVICE_UNSUPPORTED", f"{name} has compute capability {told}, which has no float8; take int8"
        )


def engine_options(options: engine_pb2.DeploymentOptions) -> EngineOptions:
    """The options as the engine takes them."""
    fields = (field.name for field in dataclasses.fields(EngineOptions))
    return EngineOptions(**{name: getattr(options, name) for name in fields})


def plan_message(plan: MemoryPlan, recorded_from: str) -> engine_pb2.MemoryPlan:
    """The plan as the protocol has it."""
    return engine_pb2.MemoryPlan(
        device=plan.device,
        weights_bytes=plan.weights,
        kv_bytes=plan.kv,
        activation_bytes=plan.activations,
        loading_bytes=plan.loading,
        total_bytes=plan.total,
        available_bytes=max(0, plan.available),
        fits=plan.fits,
        kv_block_bytes=plan.kv_block,
        full_contexts=plan.full_contexts,
        options=engine_pb2.DeploymentOptions(**dataclasses.asdict(plan.options)),
        advice=plan.advice,
        parameters=plan.parameters,
        process_bytes=plan.process,
        recorded_from=recorded_from,
        summary=plan.summary,
        host_total_bytes=plan.host.total if plan.host else 0,
        host_available_bytes=max(0, plan.host.available) if plan.host else 0,
    )
