"""Has engine-prepare pack the weights of a deployment before its worker starts, unless that was done before.

For a deployment on a CUDA device it compiles the kernels instead: their weights are packed on the device.

A derived file is used only under the digest that control has on record for it, or that engine-prepare told this
very process; whatever else lies in the folder is not looked at, and removed. engine-prepare is a process of its
own under limits, ended when its deployment is not wanted any more; whatever becomes of it, the worker starts, and
packs in its own memory where there is no file.
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.derived.layout import kernels_layout_name, layout_name, pays
from engine.derived.location import UNFINISHED, Derived, Location
from engine.errors import EngineError
from engine.host.inventory import find_device
from engine.host.planning import engine_options
from engine.launch import CORES_VARIABLE, DEVICES_VARIABLE, Launch, derived_of
from engine.memory_plan import plan_memory, read_model
from engine.options import EngineOptions
from engine.protos import engine_pb2

LEAST_BYTES = 256 << 20
"""Of weights that are packed ahead; fewer are packed faster than a process starts."""

_LEFT_FREE = 2 << 30  # of the disk, for logs and databases
_MARGIN = 64 << 20  # more than planned, for what says what is in a file
_KERNELS_BYTES = 512 << 20  # compiled kernels of one deployment, at most
_ANSWER_BYTES = 1 << 16
_NOT_PASSED_ON = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packed:
    """What a worker is given instead of packing by itself.

    Attributes:
        derived: the file; None where there is none.
        problem: CODE: why there is none though there should be; empty when all is well.
    """

    derived: Derived | None = None
    problem: str = ""


@dataclass(frozen=True)
class _Job:
    """One derived file that a deployment wants."""

    deployment: engine_pb2.Deployment
    options: EngineOptions  # with every default filled in
    location: Location  # whose digest and size are not known yet
    nbytes: int  # that the file will have, about or at most
    most_bytes: int
    asked: Mapping[str, Any]  # what is done, and what that takes beside
    cores: tuple[int, ...] = ()


class Packer:
    """The derived files of this machine.

    Args:
        store: directory of files by digest.
        folder: of derived files, made with the first; None: nothing is packed ahead.
        limit_s: that engine-prepare may take.
        least_bytes: of weights that are packed ahead.
        device: finds a device by its id.
    """

    def __init__(
        self,
        store: Path,
        folder: Path | None,
        limit_s: float = 1800.0,
        least_bytes: int = LEAST_BYTES,
        device: Callable[[str], engine_pb2.Device] = find_device,
    ) -> None:
        self._store = store
        self._folder = folder
        self._limit_s = limit_s
        self._least_bytes = least_bytes
        self._device = device
        self._made: dict[str, Derived] = {}
        self._on_record: dict[str, Derived] = {}
        self._refused: set[Derived] = set()
        self._unsupported: set[str] = set()  # torch keeps some packed forms to itself
        self._making: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def folder(self) -> Path | None:
        """Where derived files lie."""
        return self._folder

    def hear(self, on_record: Iterable[engine_pb2.Derived], wanted: Iterable[str]) -> None:
        """What control has on record; all other files go, unless they were made here for a model that is wanted.

        Args:
            on_record: every derived file that control knows.
            wanted: digests of the models of deployments that run or should.
        """
        known = (derived_of(message) for message in on_record)
        self._on_record = {derived.name: derived for derived in known if derived.is_sound}
        models = set(wanted)
        self._made = {name: made for name, made in self._made.items() if made.model_digest in models}
        if self._folder is None:
            return
        try:
            for path in self._folder.iterdir():
                if not self._is_of_use(path.name):
                    _remove(path)
        except FileNotFoundError:
            return  # nothing was made yet
        except OSError as error:
            log.warning("derived files not listed", extra={"reason": error.strerror})

    def refuse(self, derived: Derived) -> None:
        """A worker found that a file is not what it should be: it is made again when next it is wanted."""
        self._refused.add(derived)
        if self._made.get(derived.name) == derived:
            del self._made[derived.name]

    async def packed(self, deployment: engine_pb2.Deployment, cores: tuple[int, ...] = ()) -> Packed:
        """The deployment's derived file, made on its cores if there is none; raises nothing but cancellation."""
        try:
            return await self._packed(deployment, cores)
        except Exception as error:  # whatever it was, the deployment must start
            log.exception("weights not packed", extra={"deployment": deployment.name})
            return Packed(problem=f"DERIVED_NOT_MADE: {type(error).__name__}; engine-host's log has the cause")

    async def _packed(self, deployment: engine_pb2.Deployment, cores: tuple[int, ...]) -> Packed:
        try:
            job = await asyncio.to_thread(self._job, deployment)
        except (EngineError, OSError):
            return Packed()  # its worker says what is wrong with it
        name = job.location.derived.name if job else ""
        if job is None or name in self._unsupported:
            return Packed()
        async with self._making[name]:
            found = self._made.get(name) or self._on_record.get(name)
            if found is not None and found not in self._refused and _is_there(job.location.folder, found):
                return Packed(found)
            try:
                made = await self._make(replace(job, cores=cores))
            except EngineError as error:
                if error.code == "DERIVED_UNSUPPORTED":
                    self._unsupported.add(name)
                    return Packed()
                log.warning("weights not packed", extra={"deployment": deployment.name, "reason": str(error)})
                again = "kernels are compiled" if job.options.is_cuda else "weights are packed"
                return Packed(problem=f"DERIVED_NOT_MADE: its {again} anew at each start: {error}")
        self._made[name] = made
        self._refused.discard(made)
        log.info("weights packed", extra={"deployment": deployment.name, "bytes": made.size, "derived": made.name})
        return Packed(made)

    def _is_of_use(self, file: str) -> bool:
        name = file.removesuffix(UNFINISHED)
        is_being_made = name in self._making and self._making[name].locked()
        return is_being_made or file in self._on_record or file in self._made

    def _job(self, deployment: engine_pb2.Deployment) -> _Job | None:
        """What there is to pack; None when a file would not pay."""
        if self._folder is None:
            return None
        launch = Launch(deployment, self._store, Path())
        model = read_model(launch.files, launch.open_file)
        plan = plan_memory(model, engine_options(deployment.options), available=0)
        options, size, most = plan.options, plan.weights, 2 * plan.weights + _MARGIN
        if options.is_cuda:
            device = self._device(options.device)
            told = device.name, device.compute_capability
            layout, size, most = kernels_layout_name(options, *told), _KERNELS_BYTES, _KERNELS_BYTES
            asked = {"do": "kernels", "options": asdict(options), "device": told[0], "capability": told[1]}
        elif not pays(model, options) or plan.weights < self._least_bytes:
            return None
        else:
            layout = layout_name(options)
            chosen = deployment.options.backend or "cpu"  # as its worker will choose
            asked = {"do": "pack", "backend": chosen, "dtype": options.dtype}
        derived = Derived(deployment.files.model_digest, layout, "0" * 64, 1)
        location = Location(self._folder, derived)
        return _Job(deployment, options, location, size, most, asked) if derived.is_sound else None

    async def _make(self, job: _Job) -> Derived:
        """Have the file made.

        Raises:
            EngineError: it was not.
        """
        wanted = job.location.derived
        try:
            job.location.folder.mkdir(mode=0o700, exist_ok=True)
            free = shutil.disk_usage(job.location.folder).free
            if free < job.nbytes + _MARGIN + _LEFT_FREE:
                raise EngineError("DISK_FULL", f"{free} bytes are free and {job.nbytes} are to be written")
            async with asyncio.timeout(self._limit_s):
                report = await self._ask(job)
            made = Derived(wanted.model_digest, wanted.layout, str(report["sha256"]), int(report["size"]))
        except TimeoutError as error:
            raise EngineError("PREPARE_TIMEOUT", f"engine-prepare took over {self._limit_s:g} s") from error
        except OSError as error:
            raise EngineError("PREPARE_FAILED", str(error)) from error
        except (KeyError, ValueError, TypeError) as error:
            raise EngineError("PREPARE_FAILED", "engine-prepare could not be asked") from error
        if not made.is_sound or not _is_there(job.location.folder, made):
            raise EngineError("PREPARE_FAILED", "engine-prepare made no file")
        return made

    async def _ask(self, job: _Job) -> Mapping[str, Any]:
        """Run engine-prepare; its report.

        Raises:
            EngineError: its own refusal, or PREPARE_FAILED.
            OSError: it cannot be started.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "engine.prepare"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=_environment(job.cores),
        )
        try:
            output, _ = await process.communicate(json.dumps(self._question(job)).encode())
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode != 0:
            raise EngineError("PREPARE_FAILED", f"engine-prepare ended with status {process.returncode}")
        match json.loads(output[-_ANSWER_BYTES:].rstrip(b"\n").rpartition(b"\n")[2]):
            case {"ok": True, "report": dict(report)}:
                return report
            case {"ok": False, "code": str(code), "message": str(message)}:
                raise EngineError(code, message)
        raise EngineError("PREPARE_FAILED", "engine-prepare answered in an unknown form")

    def _question(self, job: _Job) -> Mapping[str, Any]:
        files = job.deployment.files
        return {
            **job.asked,
            "model_digest": files.model_digest,
            "files": [(file.path, file.size, file.sha256) for file in files.files],
            "store": str(self._store),
            "out": str(job.location.folder),
            "layout": job.location.derived.layout,
            "threads": len(job.cores) or min(job.options.threads, len(os.sched_getaffinity(0))),
            "most_bytes": job.most_bytes,
        }


def derived_message(derived: Derived) -> engine_pb2.Derived:
    """The file as the protocol has it."""
    return engine_pb2.Derived(**asdict(derived))


def _is_there(folder: Path, derived: Derived) -> bool:
    """A file of that name and size; whoever reads it checks the rest."""
    try:
        return (folder / derived.name).lstat().st_size == derived.size
    except OSError:
        return False


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        log.warning("derived file not removed", extra={"file": path.name, "reason": error.strerror})


def _environment(cores: tuple[int, ...]) -> Mapping[str, str]:
    """Variables of engine-prepare: this process's, as a worker's are, but not whom to tell that it is ready."""
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    return inherited | {CORES_VARIABLE: ",".join(map(str, cores)), DEVICES_VARIABLE: ""}
