"""How every process of the house lives: it listens on a Unix socket, says READY, drains on SIGTERM and exits 0.

This file knows neither models nor tenants; each process's `__main__` calls `run` with what it serves. READY is
systemd's notify protocol (a datagram to $NOTIFY_SOCKET), so `cloister serve` and a systemd unit wait for the same
thing. Sockets are made with mode 0600 inside a directory that only the appliance's user may enter.

Source: sd_notify(3); prctl(2), PR_SET_PDEATHSIG.
"""

import asyncio
import ctypes
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import grpc

_PR_SET_PDEATHSIG = 1
_MAX_UNIX_PATH = 107
_RESERVED = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}

log = logging.getLogger(__name__)


class ForbiddenModuleError(Exception):
    """The process holds a module that its privileges exclude; it must not become ready."""

    code = "FORBIDDEN_MODULE"


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

    def stop(self) -> None:
        """Begin to drain, as SIGTERM does."""
        if not self.stopping.is_set():
            self.stopping.set()
            _notify("STOPPING=1")


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
            _notify("")  # fails when the parent died before it could be tied to
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


def child_environment(notify: Path) -> dict[str, str]:
    """What a process of the house is started with: this process's variables, and where to report READY.

    gRPC's C core writes lines of its own form to standard error, and reads what to write before any of our code
    runs; the logs are JSON lines only.
    """
    return {"GRPC_VERBOSITY": "NONE", **os.environ, "NOTIFY_SOCKET": str(notify)}


def _notify(state: str) -> None:
    """Send `state` to $NOTIFY_SOCKET, unless it is empty; nothing when nobody is named there.

    Raises:
        OSError: the one named there is gone.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        if state:
            sock.send(state.encode())


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
