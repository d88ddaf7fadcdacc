"""The gateway process: `python -m appliance.gateway --home DIR --listen HOST:PORT`."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from appliance.gateway.limits import Limits
from appliance.gateway.server import Gateway
from engine.process import Process, run

FORBIDDEN = ("torch", "sqlalchemy", "sqlite3", "tokenizers", "jinja2")


def main() -> int:
    """Run until SIGTERM; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m appliance.gateway", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="the appliance's home directory")
    parser.add_argument("--listen", default="127.0.0.1:8443", help="HOST:PORT; port 0 takes a free one")
    parser.add_argument("--advertise", help="the host that clients are told, when it is not the one listened on")
    for limit in fields(Limits):
        kind = type(limit.default)
        parser.add_argument(f"--{limit.name.replace('_', '-')}", type=kind, default=limit.default)
    args = parser.parse_args()
    limits = Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})

    async def serve(process: Process) -> None:
        await Gateway(args.home, args.listen, args.advertise, limits).serve(process)

    return run("gateway", serve, FORBIDDEN)


if __name__ == "__main__":
    sys.exit(main())
