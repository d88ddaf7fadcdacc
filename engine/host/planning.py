"""Plans of deployments against what is left of the memory once every deployment has all that it was promised.

The kernel's figure of available memory is too high while a deployment loads, and stays so afterwards, as KV pages
cost nothing until they are written. So what a deployment was planned to take and does not hold yet is taken off.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from engine.cores import engine_cores
from engine.errors import EngineError
from engine.host.inventory import CPU, Inventory, cpu_device, measure
from engine.launch import Launch
from engine.memory import own_bytes
from engine.memory_plan import MemoryPlan, plan_memory, read_model
from engine.options import EngineOptions
from engine.protos import engine_pb2


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
        """The devices; what the CPU has left is what a new deployment could take.

        Args:
            workers: process ids by the names of deployments.
        """
        now = self._recorded or measure()
        return dataclasses.replace(now, devices=(self._left(now.cpu, workers), *now.devices[1:]))

    def plan(
        self, deployment: engine_pb2.Deployment, workers: Mapping[str, int], device: str = ""
    ) -> engine_pb2.MemoryPlan:
        """What a deployment would take; one of the same name is counted as gone.

        Raises:
            EngineError: DEVICE_NOT_FOUND, DEVICE_UNSUPPORTED, OPTIONS_INVALID, or why its files tell nothing.
        """
        others = {name: pid for name, pid in workers.items() if name != deployment.name}
        if device not in ("", CPU):
            raise self._unsupported(device)
        cpu = self._left(self._recorded.cpu if self._recorded else cpu_device(), others)
        replaced = workers.get(deployment.name, 0)
        available = cpu.memory_available_bytes + (self._held(str(replaced)) if replaced else 0)
        made = self._plan(deployment, available, cpu.cores)
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

    def _left(self, cpu: engine_pb2.Device, workers: Mapping[str, int]) -> engine_pb2.Device:
        """The CPU without what is promised of it."""
        left = engine_pb2.Device()
        left.CopyFrom(cpu)
        left.memory_available_bytes = max(0, cpu.memory_available_bytes - self._owed(workers))
        return left

    def _owed(self, workers: Mapping[str, int]) -> int:
        """Bytes promised to deployments that they do not hold yet."""
        return sum(
            max(0, promise.plan.total_bytes - (self._held(str(workers[name])) if workers[name] else 0))
            for name, promise in tuple(self._promised.items())  # another thread may be promising
            if name in workers
        )

    def _plan(self, deployment: engine_pb2.Deployment, available: int, cores: int) -> MemoryPlan:
        launch = Launch(deployment, self._store, Path())
        try:
            model = read_model(launch.files, launch.open_file)
        except OSError as error:
            raise EngineError("FILE_MISSING", f"the model's files cannot be read: {error.strerror}") from error
        return plan_memory(model, engine_options(deployment.options), available, engine_cores(cores))

    def _unsupported(self, wanted: str) -> EngineError:
        """Why nothing can be planned on a device that is not the CPU."""
        now = self._recorded or measure()
        known = {device.id: device for device in now.devices}
        if wanted not in known:
            return EngineError("DEVICE_NOT_FOUND", f"there is no device {wanted}; `cloister gpu list` names them")
        return EngineError(
            "DEVICE_UNSUPPORTED",
            f"{known[wanted].name} is listed and not used: this engine has no backend for CUDA devices yet; "
            "nothing can be planned or loaded there, models run on cpu",
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
    )
