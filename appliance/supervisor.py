"""Runs the table of processes: start in order, wait for READY, start again what dies or falls silent, drain in
reverse.

Each child has its own notify socket in run/ (sd_notify(3)), its own process group, so that Ctrl-C in a terminal
reaches this process alone, and its own log. Children die with this process, however it dies: `engine.process.run`
ties each of them to the one that started it.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc

from appliance.errors import CloisterError
from appliance.logfile import LogFile
from appliance.processes import ProcessSpec
from engine.process import CORES_LEFT, Silence, child_environment, run_on

_MAX_LINE = 1024 * 1024
WATCHDOG = "WATCHDOG"
"""Why a process was killed that gave no sign of life; engine-host says the same of a deployment's processes."""

_UCRED = struct.Struct("3i")  # pid, uid, gid; unix(7), SCM_CREDENTIALS


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a process that ended is started again.

    Attributes:
        first_delay: seconds before the first restart; doubled each time.
        longest_delay: seconds, at most.
        forgiven_after: seconds of service after which the delay is the first one again.
        attempts: starts in a row without READY before the supervisor gives up.
    """

    first_delay: float = 0.2
    longest_delay: float = 10.0
    forgiven_after: float = 30.0
    attempts: int = 5


@dataclass(frozen=True, slots=True)
class Report:
    """One change of one process: starting, ready, killed, ended, stopping, stopped, or unlogged."""

    process: str
    state: str
    pid: int
    detail: str = ""


@dataclass(eq=False, slots=True)
class _Child:
    process: asyncio.subprocess.Process
    silence: Silence
    log: LogFile
    log_pump: asyncio.Task[None]
    ready: asyncio.Event = field(default_factory=asyncio.Event)


class _CoresLeft:
    """Keeps the processes off the cores that engine-host has given to deployments, as it tells."""

    def __init__(self) -> None:
        self._teller = 0
        self._left: frozenset[int] = frozenset()

    def told(self, teller: int, left: str, pids: Iterable[int]) -> None:
        """The process `teller` leaves these hardware threads to the others; it keeps itself where it should be."""
        if re.fullmatch(r"\d{1,5}(,\d{1,5})*", left):
            self._teller, self._left = teller, frozenset(map(int, left.split(",")))
            for pid in pids:
                self.started(pid)

    def started(self, pid: int) -> None:
        """A process was started, which inherits what this one may run on."""
        if pid != self._teller:
            run_on(pid, self._left)

    def ended(self, pid: int, pids: Iterable[int]) -> None:
        """A process ended; with the teller, all deployments did."""
        if pid == self._teller:
            self._teller, self._left = 0, frozenset(os.sched_getaffinity(0))
            for other in pids:
                run_on(other, self._left)


class Supervisor:
    """The processes of one home directory.

    Args:
        table: in start order.
        home: absolute; run/ exists.
        report: told of every change.
        policy: when to start again.
        open_log: a process's log.
    """

    def __init__(
        self,
        table: tuple[ProcessSpec, ...],
        home: Path,
        report: Callable[[Report], None],
        policy: RestartPolicy | None = None,
        open_log: Callable[[Path], LogFile] = LogFile,
    ) -> None:
        self._table = table
        self._home = home
        self._report = report
        self._policy = policy or RestartPolicy()
        self._open_log = open_log
        self._ready: Mapping[str, asyncio.Event] = {spec.name: asyncio.Event() for spec in table}
        self._children: dict[str, _Child] = {}
        self._sockets: dict[str, socket.socket] = {}
        self._cores = _CoresLeft()

    async def run(self, stopping: asyncio.Event, all_ready: Callable[[], None]) -> None:
        """Run until `stopping` is set, then drain; `all_ready` is called once, when every process is.

        Raises:
            CloisterError: PROCESS_NOT_READY, a process failed to become ready too many times in a row.
        """
        with contextlib.ExitStack() as sockets:
            for spec in self._table:
                sockets.enter_context(self._notify_socket(spec))
            await self._run(stopping, all_ready)

    async def _run(self, stopping: asyncio.Event, all_ready: Callable[[], None]) -> None:
        keepers = [asyncio.create_task(self._keep(spec)) for spec in self._table]
        announcer = asyncio.create_task(self._announce(all_ready))
        stop = asyncio.create_task(stopping.wait())
        try:
            done, _ = await asyncio.wait((*keepers, stop), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (*keepers, announcer, stop):
                task.cancel()
            await asyncio.gather(*keepers, announcer, stop, return_exceptions=True)
            await self._drain()

    async def _announce(self, all_ready: Callable[[], None]) -> None:
        for event in self._ready.values():
            await event.wait()
        all_ready()

    async def _keep(self, spec: ProcessSpec) -> None:
        """Start `spec` again and again."""
        failures, delay = 0, self._policy.first_delay
        while True:
            for need in spec.needs:
                await self._ready[need].wait()
            served_for = await self._run_once(spec)
            failures = 0 if served_for is not None else failures + 1
            if failures >= self._policy.attempts:
                raise self._gave_up(spec)
            if served_for is not None and served_for >= self._policy.forgiven_after:
                delay = self._policy.first_delay
            await asyncio.sleep(delay)
            delay = min(2 * delay, self._policy.longest_delay)

    async def _run_once(self, spec: ProcessSpec) -> float | None:
        """One life of a process: the seconds it was ready, or None when it never was."""
        loop = asyncio.get_running_loop()
        try:
            child = await self._spawn(spec)
        except OSError as error:  # no memory, or no room for one more process
            self._report(Report(spec.name, "ended", 0, f"not started: {error.strerror}"))
            return None
        ended = asyncio.create_task(child.process.wait())
        try:
            if not await self._wait_ready(spec, child, ended):
                return None
            self._ready[spec.name].set()
            self._report(Report(spec.name, "ready", child.process.pid))
            since = loop.time()
            await self._watch(spec, child, ended)
            return loop.time() - since
        finally:
            self._ready[spec.name].clear()
            ended.cancel()
            if child.process.returncode is not None:
                await self._bury(spec, child)

    async def _watch(self, spec: ProcessSpec, child: _Child, ended: asyncio.Task[int]) -> None:
        """Wait for the end of a process that serves; one that gives no sign of life is killed."""
        silent = asyncio.create_task(child.silence.lasts_too_long())
        try:
            await asyncio.wait((ended, silent), return_when=asyncio.FIRST_COMPLETED)
        finally:
            silent.cancel()
        if not ended.done():
            detail = f"{WATCHDOG}: silent for {spec.heard_within:g} s"
            self._report(Report(spec.name, "killed", child.process.pid, detail))
            with contextlib.suppress(OSError):
                child.log.write(_log_line(f"{spec.name} killed", pid=child.process.pid, reason=detail))
            _signal(child, signal.SIGKILL)  # a stopped process is killed too, and no one can catch it
            await ended

    async def _wait_ready(self, spec: ProcessSpec, child: _Child, ended: asyncio.Task[int]) -> bool:
        ready = asyncio.create_task(child.ready.wait())
        await asyncio.wait((ready, ended), timeout=spec.ready_within, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if child.ready.is_set() and not ended.done():
            return True
        if not ended.done():
            self._report(Report(spec.name, "killed", child.process.pid, f"not ready in {spec.ready_within:g} s"))
            _signal(child, signal.SIGKILL)
            await child.process.wait()
        return False

    async def _bury(self, spec: ProcessSpec, child: _Child) -> None:
        """Report the end of a process and close its log."""
        self._children.pop(spec.name, None)
        self._cores.ended(child.process.pid, self._pids())
        asyncio.get_running_loop().remove_reader(self._sockets[spec.name])
        await _finish(child.log_pump)
        self._report(Report(spec.name, "ended", child.process.pid, _how_it_ended(child.process.returncode)))

    async def _spawn(self, spec: ProcessSpec) -> _Child:
        process = await asyncio.create_subprocess_exec(
            *spec.argv(self._home),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=_MAX_LINE,
            cwd=self._home,
            env=child_environment(self._notify_path(spec), spec.heard_within),
            process_group=0,
        )
        log = self._open_log(self._home / "logs" / f"{spec.name}.log")

        def unlogged(error: OSError) -> None:
            detail = f"{log.path}: {error.strerror}; its lines are dropped until there is room"
            self._report(Report(spec.name, "unlogged", process.pid, detail))

        silence = Silence(process.pid, spec.heard_within)
        child = _Child(process, silence, log, asyncio.create_task(_pump(process, log, unlogged)))
        self._children[spec.name] = child
        self._cores.started(process.pid)
        notify = self._sockets[spec.name]  # what it has said already waits there
        asyncio.get_running_loop().add_reader(notify, self._on_notify, notify, child)
        self._report(Report(spec.name, "starting", process.pid))
        return child

    @contextlib.contextmanager
    def _notify_socket(self, spec: ProcessSpec) -> Iterator[None]:
        """Where all lives of one process say READY, open until the last has drained."""
        path = self._notify_path(spec)
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notify:
            notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            notify.bind(str(path))
            self._sockets[spec.name] = notify
            try:
                yield
            finally:
                asyncio.get_running_loop().remove_reader(notify)
                path.unlink(missing_ok=True)

    def _notify_path(self, spec: ProcessSpec) -> Path:
        return self._home / "run" / f"notify-{spec.name}.sock"

    def _on_notify(self, notify: socket.socket, child: _Child) -> None:
        """Only the process itself counts, not what it started; the kernel vouches for the sender."""
        data, ancillary, _, _ = notify.recvmsg(4096, socket.CMSG_SPACE(_UCRED.size))
        senders = [
            _UCRED.unpack(raw[: _UCRED.size])[0] for _, kind, raw in ancillary if kind == socket.SCM_CREDENTIALS
        ]
        if senders != [child.process.pid]:
            return
        child.silence.heard()
        lines = data.decode(errors="replace").split("\n")
        if "READY=1" in lines:
            child.ready.set()
        for left in (line.partition("=")[2] for line in lines if line.startswith(f"X_{CORES_LEFT}=")):
            self._cores.told(child.process.pid, left, self._pids())

    def _pids(self) -> list[int]:
        return [child.process.pid for child in self._children.values()]

    async def _drain(self) -> None:
        """SIGTERM in reverse order, each given its time, then SIGKILL."""
        for spec in reversed(self._table):
            child = self._children.pop(spec.name, None)
            if child is None:
                continue
            self._report(Report(spec.name, "stopping", child.process.pid))
            _signal(child, signal.SIGTERM)
            try:
                await asyncio.wait_for(child.process.wait(), spec.drain_within)
            except TimeoutError:
                _signal(child, signal.SIGKILL)
                await child.process.wait()
            await _finish(child.log_pump)
            detail = _how_it_ended(child.process.returncode)
            self._report(Report(spec.name, "stopped", child.process.pid, detail))

    def _gave_up(self, spec: ProcessSpec) -> CloisterError:
        log = self._open_log(self._home / "logs" / f"{spec.name}.log")
        lines = log.last_lines(5)
        log.close()
        return CloisterError(
            "PROCESS_NOT_READY",
            f"{spec.name} did not become ready in {self._policy.attempts} starts; the end of {log.path}:\n"
            + "\n".join(f"  {line}" for line in lines),
            grpc.StatusCode.INTERNAL,
            {"process": spec.name, "log": str(log.path)},
        )


@contextlib.contextmanager
def sole_supervisor(home: Path) -> Iterator[None]:
    """Hold the home directory for this supervisor alone.

    Raises:
        CloisterError: ALREADY_RUNNING, another one holds it.
    """
    path = home / "run" / "serve.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CloisterError(
                "ALREADY_RUNNING",
                f"{home} is served already, by process {file.read().strip() or '?'}; stop that one first",
                grpc.StatusCode.ALREADY_EXISTS,
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


async def _pump(process: asyncio.subprocess.Process, log: LogFile, unlogged: Callable[[OSError], None]) -> None:
    """Copy what a process writes into its log, by lines, until nobody holds the pipe.

    The pipe is read whether or not the log can be written: a process must not stand still because a disk is full.
    What is lost is counted, `unlogged` is called once, and the number is logged when there is room again.
    """
    if process.stdout is None:
        raise RuntimeError("started without a pipe")
    lost = 0
    try:
        while chunk := await _read_line(process.stdout):
            try:
                log.write(_lost_line(lost) + chunk)
                lost = 0
            except OSError as error:
                if not lost:
                    unlogged(error)
                lost += 1
    finally:
        with contextlib.suppress(OSError):
            log.write(_lost_line(lost))
        log.close()


def _lost_line(lost: int) -> bytes:
    """A log line that says how many are missing before it; empty when none is."""
    return _log_line(f"{lost} lines lost", lost=lost) if lost else b""


def _log_line(event: str, **facts: object) -> bytes:
    """What this process itself says in a child's log."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    return (
        json.dumps({"time": time, "process": "serve", "level": "error", "event": event, **facts}).encode() + b"\n"
    )


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    """The next line, or what there is of one that is too long or not ended."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.read(error.consumed)


async def _finish(pump: asyncio.Task[None]) -> None:
    """Let the last lines arrive; a grandchild that outlives its parent must not hold the log for ever."""
    await asyncio.wait((pump,), timeout=1.0)
    pump.cancel()
    await asyncio.gather(pump, return_exceptions=True)


def _signal(child: _Child, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.process.send_signal(number)


def _how_it_ended(returncode: int | None) -> str:
    if returncode is None:
        return "unknown"
    return f"exit status {returncode}" if returncode >= 0 else f"killed by {signal.Signals(-returncode).name}"
