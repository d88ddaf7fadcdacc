"""How every process of the house lives: it listens on a Unix socket, says READY, drains on SIGTERM and exits 0.

This file knows neither models nor tenants; each process's `__main__` calls `run` with what it serves. READY is
systemd's notify protocol (a datagram to $NOTIFY_SOCKET), so `cloister serve` and a systemd unit wait for the same
thing. Sockets are made with mode 0600 inside a directory that only the appliance's user may enter. From READY on,
where $WATCHDOG_USEC asks for it, the event loop tells the same socket that it turns (WATCHDOG=1); `Silence` is the
other end: it judges when a process that it hears no more has to be killed.

Source: sd_notify(3); sd_watchdog_enabled(3); prctl(2), PR_SET_PDEATHSIG; sched_setaffinity(2).
"""

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import grpc

_PR_SET_PDEATHSIG = 1
_MAX_UNIX_PATH = 107
_SIGNS_PER_LIMIT = 4  # sd_watchdog_enabled(3) recommends two; four leave room on a busy machine
_PARENT_VARIABLE = "CLOISTER_PARENT"
CORES_LEFT = "CORES_LEFT"
"""The fact by which engine-host tells the hardware threads, with commas, that are not a deployment's."""
_RESERVED = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}

log = logging.getLogger(__name__)


class ForbiddenModuleError(Exception):
    """The process holds a module that its privileges exclude; it must not become ready."""

    code = "FORBIDDEN_MODULE"


class OrphanedError(Exception):
    """Whoever started this process is gone, and nothing could be tied to it any more."""

    code = "ORPHANED"


class Process:
    """One process of the house, from start to SIGTERM.

    Args:
        name: as the process table has it, for logs.
        forbidden: top-level modules that must not be loaded when the process reports READY.
    """

    def __init__(self, name: str, forbidden: Iterable[str] = ()) -> None:
        self.name = name
        self.stopping = asyncio.Event()
        self._forbidden = frozenset(forbidden)
        self._stuck: Callable[[], str] = lambda: ""

    def feed_unless(self, stuck: Callable[[], str]) -> None:
        """Give no sign of life while `stuck` names what does not get on; the event loop alone is watched before.

        A process that is stuck for as long as its watchdog allows is killed and started again.
        """
        self._stuck = stuck

    def listen(self, server: grpc.aio.Server, path: Path) -> None:
        """Bind `server` to the Unix socket `path`, replacing what a dead predecessor left there.

        Raises:
            ValueError: the path is longer than the kernel allows (107 bytes).
        """
        if len(os.fsencode(path)) > _MAX_UNIX_PATH:
            raise ValueError(
                f"socket path longer than {_MAX_UNIX_PATH} bytes: {path}; use a shorter home directory"
            )
        path.unlink(missing_ok=True)
        previous = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{path}")
        finally:
            os.umask(previous)

    def ready(self, facts: Mapping[str, str] | None = None) -> None:
        """Tell whoever started this process that it serves, and `facts` about how.

        Facts travel in the same datagram as X_NAME=VALUE; service managers ignore names that begin with X_.

        Raises:
            ForbiddenModuleError: a forbidden module is loaded.
        """
        loaded = sorted(self._forbidden & {module.partition(".")[0] for module in sys.modules})
        if loaded:
            raise ForbiddenModuleError(f"{self.name} must never load {', '.join(loaded)}")
        _notify("\n".join(["READY=1", *(f"X_{name}={value}" for name, value in (facts or {}).items())]))
        log.info("ready", extra={"pid": os.getpid()})
        limit = _watchdog_limit()
        if limit:
            self._feed(asyncio.get_running_loop(), _connected(), limit / _SIGNS_PER_LIMIT, "")

    def tell(self, facts: Mapping[str, str]) -> None:
        """Tell whoever started this process something more, which they need not know."""
        with contextlib.suppress(OSError):  # it stands still itself, or is gone
            _notify("\n".join(f"X_{name}={value}" for name, value in facts.items()), socket.MSG_DONTWAIT)

    def _feed(self, loop: asyncio.AbstractEventLoop, notify: socket.socket, every: float, before: str) -> None:
        """Send a sign of life now and every so many seconds; never wait for a watcher that does not read."""
        stuck = self._stuck()
        if not stuck:
            with contextlib.suppress(OSError):  # it stands still itself, or is gone and this process ends with it
                notify.send(b"WATCHDOG=1")
        elif not before:
            log.error("stuck", extra={"reason": stuck})
        loop.call_later(every, self._feed, loop, notify, every, stuck)

    def stop(self) -> None:
        """Begin to drain, as SIGTERM does."""
        if not self.stopping.is_set():
            self.stopping.set()
            with contextlib.suppress(OSError):  # who listened for READY may be gone, or stand still itself
                _notify("STOPPING=1", socket.MSG_DONTWAIT)


def run(name: str, main: Callable[[Process], Awaitable[None]], forbidden: Iterable[str] = ()) -> int:
    """Run `main` until it returns; the exit status: 0, or 1 after an error, which is logged.

    `main` gets the `Process`, calls `ready()` once it serves, and returns after `stopping` is set and what was
    running has ended. A process whose READY is waited for dies with the one that started it.
    """
    configure_logging(name)
    process = Process(name, forbidden)
    try:
        if os.environ.get("NOTIFY_SOCKET"):
            die_with_parent()
            _require_parent()
        asyncio.run(_supervised(process, main))
    except Exception:
        log.exception("failed")
        return 1
    return 0


async def _supervised(process: Process, main: Callable[[Process], Awaitable[None]]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, process.stop)
    await main(process)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel to signal this process when the one that started it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _require_parent() -> None:
    """Refuse to live on when the parent died before this process could be tied to it.

    Its socket tells, unless a successor listens there already; then the process id that it left here does.

    Raises:
        OSError: nobody listens for READY.
        OrphanedError: the parent is another process.
    """
    _notify("")
    parent = os.environ.get(_PARENT_VARIABLE, "")
    if parent and parent != str(os.getppid()):
        raise OrphanedError(f"process {parent}, which started this one, is gone")


def child_environment(notify: Path, heard_within: float = 0.0) -> dict[str, str]:
    """What a process of the house is started with: this process's variables and id, where to report READY, and
    within how many seconds to give signs of life after that, where somebody watches for them.

    gRPC's C core writes lines of its own form to standard error, and reads what to write before any of our code
    runs; the logs are JSON lines only.
    """
    told = {
        "NOTIFY_SOCKET": str(notify),
        "WATCHDOG_USEC": str(int(heard_within * 1e6)),
        _PARENT_VARIABLE: str(os.getpid()),
    }
    inherited = {name: value for name, value in os.environ.items() if name != "WATCHDOG_PID"}
    return {"GRPC_VERBOSITY": "NONE", **inherited, **told}


class Silence:
    """How long a process has given no sign of life, counted in the watcher's own waking time.

    A watcher that did not run itself (the machine slept, a debugger held it, others had the processors) could not
    have heard anything: such time is nobody's silence, and after more than the limit of it a new period begins. A
    process that a debugger holds is not silent either.

    Args:
        pid: whose silence.
        limit: seconds that are too long.
        clock: seconds, monotonic.
    """

    def __init__(self, pid: int, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._pid = pid
        self._clock = clock
        self._tick = limit / 10
        self._looked = clock()
        self._silent = 0.0

    def heard(self) -> None:
        """It gave a sign of life."""
        self._silent = 0.0

    def is_too_long(self) -> bool:
        """Whether the limit has passed; asked about ten times within the limit."""
        now = self._clock()
        gap, self._looked = now - self._looked, now
        if gap > self.limit:
            self._silent = 0.0
        else:
            self._silent += min(gap, 2 * self._tick)
        if self._silent > self.limit and _is_traced(self._pid):
            self._silent = 0.0
        return self._silent > self.limit

    async def lasts_too_long(self) -> None:
        """Return once it does; from now on, whatever was before."""
        self._looked, self._silent = self._clock(), 0.0
        while not self.is_too_long():  # noqa: ASYNC110  # what is looked at is the clock
            await asyncio.sleep(self._tick)


def _is_traced(pid: int) -> bool:
    """Whether a debugger holds the process; proc(5), TracerPid."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in status.splitlines())


def _watchdog_limit() -> float:
    """Seconds within which this process has to give signs of life; 0 when nobody watches."""
    try:
        limit = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        meant = int(os.environ.get("WATCHDOG_PID", "0"))
    except ValueError:
        return 0.0
    return limit if os.environ.get("NOTIFY_SOCKET") and meant in (0, os.getpid()) else 0.0


def _connected() -> socket.socket:
    """A socket to $NOTIFY_SOCKET that is kept, so that a process out of file descriptors is not taken for dead."""
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    notify.connect(_address(os.environ["NOTIFY_SOCKET"]))
    return notify


def _address(name: str) -> str:
    return "\0" + name[1:] if name.startswith("@") else name


def _notify(state: str, flags: int = 0) -> None:
    """Send `state` to $NOTIFY_SOCKET, unless it is empty; nothing when nobody is named there.

    Raises:
        OSError: the one named there is gone, or reads nothing and `flags` say not to wait.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(_address(address))
        if state:
            sock.send(state.encode(), flags)


def run_on(pid: int, threads: Collection[int], but: Collection[int] = ()) -> None:
    """Let all of a process run on these hardware threads alone; what cannot be moved, or has ended, stays.

    Args:
        pid: of the process.
        threads: by the kernel's numbers; nothing happens where there are none.
        but: threads of the process that keep to some of these are left where they are.
    """
    kept = frozenset(but)
    for _ in range(2 if threads else 0):  # once more for those that others of them started meanwhile
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/task"):
                _move(int(name), threads, kept)


def _move(thread: int, to: Collection[int], kept: frozenset[int]) -> None:
    with contextlib.suppress(OSError):
        if not os.sched_getaffinity(thread) <= kept:
            os.sched_setaffinity(thread, to)


class _JsonLines(logging.Formatter):
    """One JSON object a line. Callers pass facts in `extra`; a prompt or a secret is never one of them."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "process": self._process,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line.update({key: value for key, value in record.__dict__.items() if key not in _RESERVED})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def configure_logging(process: str) -> None:
    """Log JSON lines to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines(process))
    logging.basicConfig(level=os.environ.get("CLOISTER_LOG", "INFO"), handlers=[handler], force=True)
