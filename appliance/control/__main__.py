"""The process `control`: three Unix sockets, two databases, and no torch."""

import argparse
import os
import sys
from pathlib import Path

from appliance.control.home import Home
from appliance.control.plane import ControlPlane
from engine import process

FORBIDDEN = ("torch", "tokenizers", "jinja2")
_GRACE_S = 2.0


async def serve(running: process.Process, home: Home, isolation: str) -> None:
    """Serve until told to stop, then drain."""
    plane = ControlPlane(home, isolation)
    try:
        await plane.recover()
        control, admin = plane.control_server(), plane.admin_server()
        running.listen(control, home.control_socket)
        running.listen(admin, home.admin_socket)
        await control.start()
        await admin.start()
        login = await plane.login_broker().listen(home.login_socket)
        plane.begin()
        running.ready()
        await running.stopping.wait()
        await plane.drain()
        login.close()
        await admin.stop(_GRACE_S)
        await control.stop(_GRACE_S)
    finally:
        await plane.close()


def main() -> int:
    """Run control; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m appliance.control", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--isolation", default="none", help="what separates the processes, for `status`")
    args = parser.parse_args()
    os.umask(0o077)
    home = Home(args.home.absolute())
    return process.run("control", lambda running: serve(running, home, args.isolation), FORBIDDEN)


if __name__ == "__main__":
    sys.exit(main())
