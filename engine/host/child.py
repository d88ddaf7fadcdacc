"""One life of one process of a deployment: started, told what to run, ready, ended.

The process gets its Deployment on standard input and tells READY, facts about itself and then that it lives over a
notify socket of its own (sd_notify(3); the kernel vouches for the sender). It ties its life to this one by itself:
nothing may run between fork and exec here, where gRPC has threads.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.launch import CORES_VARIABLE, DEVICES_VARIABLE, REFUSED_STATUS, STEP_WITHIN_VARIABLE
from engine.process import Silence, child_environment

_UCRED = struct.Struct("3i")  # pid, uid, gid; unix(7), SCM_CREDENTIALS
_NOTICE_BYTES = 4096
_LAST_LINE_BYTES = 16384


@dataclass(frozen=True)
class ChildSpec:
    """How one process of a deployment is started.

    Attributes:
        role: worker or text.
        name: of the deployment.
        run: directory of sockets.
        store: directory of files by digest.
        deployment: serialised `cloister.engine.v1.Deployment`.
        heard_within_s: how long it may give no sign of life once it serves.
        step_within_s: how long one turn of a worker's engine may take.
        cores: hardware threads that a worker's threads have to themselves.
        derived: directory of derived files; None: there is none.
        device: id of the CUDA device that a worker computes on; no other process sees any.
    """

    role: str
    name: str
    run: Path
    store: Path
    deployment: bytes
    heard_within_s: float
    step_within_s: float
    cores: tuple[int, ...] = ()
    derived: Path | None = None
    device: str = ""

    @property
    def socket(self) -> Path:
        """Where the process listens."""
        return self.run / f"{self.role}-{self.name}.sock"

    @property
    def notify(self) -> Path:
        """Where it says READY; no longer than `socket`, whose length is bounded."""
        return self.run / f"{self.role}-{self.name}.up"

    @property
    def argv(self) -> tuple[str, ...]:
        """Its command line, with this interpreter; nothing of the current directory is imported."""
        places = ("--store", str(self.store), "--socket", str(self.socket), "--parent", str(os.getpid()))
        derived = ("--derived", str(self.derived)) if self.derived else ()
        return (sys.executable, "-P", "-m", f"engine.{self.role}", *places, *derived)

    @property
    def environment(self) -> dict[str, str]:
        """Its variables."""
        return {
            **child_environment(self.notify, self.heard_within_s),
            STEP_WITHIN_VARIABLE: f"{self.step_within_s:g}",
            CORES_VARIABLE: ",".join(map(str, self.cores)),
            DEVICES_VARIABLE: self.device if self.role == "worker" else "",
        }


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        code: the code of its refusal when its deployment cannot run, WATCHDOG when it was killed because it gave
            no sign of life, else WORKER_DIED or TEXT_DIED.
        message: what was wrong.
        refused: starting it again would not help.
    """

    code: str
    message: str
    refused: bool


class Child:
    """A running process.

    Attributes:
        facts: what it told with READY; empty before.
        ready: set once it serves.
        ended: done once it has ended.
    """

    def __init__(self, spec: ChildSpec, process: asyncio.subprocess.Process, notify: socket.socket) -> None:
        self.spec = spec
        self.facts: Mapping[str, str] = {}
        self.ready = asyncio.Event()
        self._process = process
        self._notify = notify
        self._silence = Silence(process.pid, spec.heard_within_s)
        asyncio.get_running_loop().add_reader(notify, self._on_notice)
        self.ended = asyncio.create_task(self._run_to_end())

    @classmethod
    async def start(cls, spec: ChildSpec) -> "Child":
        """A new process for `spec`.

        Raises:
            OSError: it cannot be started.
        """
        notify = _listen(spec.notify)
        try:
            process = await asyncio.create_subprocess_exec(
                *spec.argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=spec.environment,
            )
        except BaseException:
            notify.close()
            raise
        return cls(spec, process, notify)

    @property
    def pid(self) -> int:
        """Its process id; 0 once it has ended."""
        return self._process.pid if self._process.returncode is None else 0

    async def falls_silent(self) -> None:
        """Return once the process has given no sign of life for too long; from READY on."""
        await self._silence.lasts_too_long()

    async def end_silent(self) -> Ending:
        """Kill a process that has fallen silent, which works on a stopped one too; how it ended."""
        self._signal(signal.SIGKILL)
        await asyncio.wait((self.ended,))
        message = f"engine-{self.spec.role} was silent for {self.spec.heard_within_s:g} s and was killed"
        return Ending("WATCHDOG", message, refused=False)

    async def drain(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL if it has not ended within `grace_s` seconds; returns when it has ended."""
        self._signal(signal.SIGTERM)
        await asyncio.wait((self.ended,), timeout=grace_s)
        self._signal(signal.SIGKILL)
        await asyncio.wait((self.ended,))
        self.spec.socket.unlink(missing_ok=True)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _run_to_end(self) -> Ending:
        try:
            last_line = await self._converse()
            returncode = await self._process.wait()
        finally:
            asyncio.get_running_loop().remove_reader(self._notify)
            self._notify.close()
            self.spec.notify.unlink(missing_ok=True)
        return _ending(self.spec.role, returncode, last_line)

    async def _converse(self) -> bytes:
        """Hand over the Deployment and listen until the process closes its output; its last line."""
        reader, writer = self._process.stdout, self._process.stdin
        if reader is None or writer is None:
            raise RuntimeError("started without pipes")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            writer.write(self.spec.deployment)
            await writer.drain()
            writer.close()
        tail = b""
        while chunk := await reader.read(_LAST_LINE_BYTES):
            tail = (tail + chunk)[-_LAST_LINE_BYTES:]
        return tail.rstrip(b"\n").rpartition(b"\n")[2]

    def _on_notice(self) -> None:
        """Only the process itself counts."""
        data, ancillary, _, _ = self._notify.recvmsg(_NOTICE_BYTES, socket.CMSG_SPACE(_UCRED.size))
        senders = [
            _UCRED.unpack(raw[: _UCRED.size])[0] for _, kind, raw in ancillary if kind == socket.SCM_CREDENTIALS
        ]
        if senders != [self._process.pid]:
            return
        self._silence.heard()
        lines = data.decode(errors="replace").split("\n")
        if "READY=1" in lines:
            told = (line.removeprefix("X_").partition("=") for line in lines if line.startswith("X_"))
            self.facts = {name: value for name, _, value in told}
            self.ready.set()


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        notify.bind(str(path))
    except OSError:
        notify.close()
        raise
    return notify


def _ending(role: str, returncode: int, last_line: bytes) -> Ending:
    if returncode == REFUSED_STATUS:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            told = json.loads(last_line)
            return Ending(str(told["code"]), str(told["message"]), refused=True)
    how = f"exit status {returncode}" if returncode >= 0 else f"signal {signal.Signals(-returncode).name}"
    return Ending(f"{role.upper()}_DIED", f"engine-{role} ended with {how}", refused=False)
