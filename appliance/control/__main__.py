"""The process `control`: three Unix sockets, two databases, and no torch."""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import grpc

from appliance.control.home import Home
from appliance.control.limits import Limits
from appliance.control.plane import ControlPlane
from engine import process

FORBIDDEN = ("torch", "tokenizers", "jinja2")
_GRACE_S = 2.0


async def serve(
    running: process.Process, home: Home, isolation: str, limits: Limits, settings: Mapping[str, str]
) -> None:
    """Serve until told to stop, then drain."""
    plane = ControlPlane(home, isolation, limits)
    servers: list[grpc.aio.Server] = []
    try:
        await plane.recover(settings)
        servers = [control, admin] = [plane.control_server(), plane.admin_server()]
        running.listen(control, home.control_socket)
        running.listen(admin, home.admin_socket)
        await control.start()
        await admin.start()
        login = await plane.login_broker().listen(home.login_socket)
        plane.begin()
        running.ready()
        await _told_to_stop(running, plane)
        await plane.drain()
        login.close()
        home.login_socket.unlink(missing_ok=True)  # asyncio leaves it
        await admin.stop(_GRACE_S)
        await control.stop(_GRACE_S)
    finally:
        for server in servers:
            await server.stop(None)
        await plane.close()


async def _told_to_stop(running: process.Process, plane: ControlPlane) -> None:
    """Wait for it; an end of one of control's own tasks before is an error, and the process ends with it."""
    told, watching = asyncio.create_task(running.stopping.wait()), asyncio.create_task(plane.watch())
    try:
        await asyncio.wait((told, watching), return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
    finally:
        told.cancel()
        watching.cancel()


def main() -> int:
    """Run control; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m appliance.control", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--isolation", default="none", help="what separates the processes, for `status`")
    for limit in fields(Limits):
        kind = type(limit.default)
        parser.add_argument(f"--{limit.name.replace('_', '-')}", type=kind, default=limit.default)
    parser.add_argument("--settings", type=json.loads, default={}, help="what is not its default, for the record")
    args = parser.parse_args()
    limits = Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})
    os.umask(0o077)
    home = Home(args.home.absolute())
    return process.run(
        "control", lambda running: serve(running, home, args.isolation, limits, args.settings), FORBIDDEN
    )


if __name__ == "__main__":
    sys.exit(main())
