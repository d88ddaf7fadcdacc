"""`cloister serve`: runs the table of processes until SIGTERM, one line per change."""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path

from appliance.cli.output import emit_line, printable
from appliance.errors import CloisterError
from appliance.processes import DEFAULT_LISTEN, LONGEST_SOCKET_NAME, TABLE
from appliance.supervisor import Report, Supervisor, sole_supervisor
from engine.process import Process

MAX_SOCKET_PATH = 107
ISOLATION = "none"


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister serve`."""
    parser.add_argument(
        "--listen",
        default=DEFAULT_LISTEN,
        type=_address,
        metavar="HOST:PORT",
        help=f"where clients connect; port 0 takes a free one (default {DEFAULT_LISTEN})",
    )
    parser.set_defaults(run=_serve)


def socket_room(home: Path) -> int:
    """Bytes left of the kernel's limit for the longest socket path in `home`; negative when it is too long."""
    return MAX_SOCKET_PATH - len(os.fsencode(home / "run")) - 1 - LONGEST_SOCKET_NAME


def _serve(args: argparse.Namespace) -> int:
    os.umask(0o077)
    home = args.home.resolve()
    _require_home(home)
    (home / "logs").mkdir(exist_ok=True)
    with sole_supervisor(home):
        asyncio.run(_supervise(args, home, _usable(*args.listen)))
    return 0


async def _supervise(args: argparse.Namespace, home: Path, listen: str) -> None:
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
        value = {"state": "ready", "listen": listen, "home": str(home), "isolation": ISOLATION}
        emit_line(args, value, f"ready on {listen}  home: {printable(str(home))}  isolation: {ISOLATION}")
        process.ready()

    await Supervisor(TABLE, home, listen, report).run(process.stopping, all_ready)


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


def _address(text: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 host in brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host, int(port)


def _usable(host: str, port: int) -> str:
    """The address, found free before anything is started, with a port in place of 0, so that a restarted gateway
    comes back where it was.

    Raises:
        CloisterError: ADDRESS_UNUSABLE.
    """
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
            "ADDRESS_UNUSABLE", f"cannot listen on {host}:{port}: {why}; choose another with --listen HOST:PORT"
        ) from error
