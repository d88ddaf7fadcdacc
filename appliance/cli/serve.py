"""`cloister serve`: runs the table of processes until SIGTERM, one line per change."""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli.config import add_flags, configuration
from appliance.cli.output import emit_line, printable
from appliance.errors import CloisterError
from appliance.logfile import LogFile
from appliance.processes import LONGEST_SOCKET_NAME, table
from appliance.supervisor import Report, Supervisor, sole_supervisor
from engine.process import Process

if TYPE_CHECKING:
    from appliance.settings import Settings

MAX_SOCKET_PATH = 107
ISOLATION = "none"


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister serve`."""
    add_flags(parser)
    parser.set_defaults(run=_serve)


def socket_room(home: Path) -> int:
    """Bytes left of the kernel's limit for the longest socket path in `home`; negative when it is too long."""
    return MAX_SOCKET_PATH - len(os.fsencode(home / "run")) - 1 - LONGEST_SOCKET_NAME


def _serve(args: argparse.Namespace) -> int:
    os.umask(0o077)
    home = args.home.resolve()
    _require_home(home)
    settings = configuration(args).settings
    (home / "logs").mkdir(exist_ok=True)
    with sole_supervisor(home):
        settings = settings.with_listen(_usable(settings.gateway.listen))
        os.environ["CLOISTER_LOG"] = settings.logs.level
        asyncio.run(_supervise(args, home, settings))
    return 0


async def _supervise(args: argparse.Namespace, home: Path, settings: "Settings") -> None:
    process = Process("serve")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, process.stop)

    def report(change: Report) -> None:
        value = {"process": change.process, "state": change.state, "pid": change.pid, "detail": change.detail}
        detail = f"  {change.detail}" if change.detail else ""
        with contextlib.suppress(OSError):  # on a full disk this line is lost, and nothing else
            emit_line(args, value, f"{change.process:<12} {change.state:<9} pid {change.pid}{detail}")

    def all_ready() -> None:
        listen = settings.gateway.listen
        value = {"state": "ready", "listen": listen, "home": str(home), "isolation": ISOLATION}
        with contextlib.suppress(OSError):
            emit_line(args, value, f"ready on {listen}  home: {printable(str(home))}  isolation: {ISOLATION}")
        process.ready()

    open_log = partial(LogFile, max_bytes=settings.logs.max_bytes, kept=settings.logs.kept)
    supervisor = Supervisor(table(settings), home, report, open_log=open_log)
    await supervisor.run(process.stopping, all_ready)


def _require_home(home: Path) -> None:
    """Refuse a home that cannot be served, before anything is started.

    Raises:
        CloisterError: NOT_INITIALISED, or PATH_TOO_LONG for a Unix socket.
    """
    if not (home / "control").is_dir() or not (home / "run").is_dir():
        raise CloisterError(
            "NOT_INITIALISED", f"{home} is no home directory of the appliance; run `cloister init`"
        )
    if socket_room(home) < 0:
        longest = MAX_SOCKET_PATH - LONGEST_SOCKET_NAME - len("/run/")
        raise CloisterError("PATH_TOO_LONG", f"{home} is longer than {longest} bytes; sockets would not fit in it")


def _usable(address: str) -> str:
    """The address, found free before anything is started, with a port in place of 0, so that a restarted gateway
    comes back where it was.

    Raises:
        CloisterError: ADDRESS_UNUSABLE.
    """
    from appliance.settings import split_address

    host, port = split_address(address)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen()
            return f"{host}:{probe.getsockname()[1]}"
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "no host of that name"
        raise CloisterError(
            "ADDRESS_UNUSABLE",
            f"cannot listen on {host}:{port}: {why}; choose another with --listen HOST:PORT or gateway.listen",
        ) from error
