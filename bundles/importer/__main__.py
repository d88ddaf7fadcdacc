"""`python -m bundles.importer --home DIR`: the importer process."""

import argparse
import asyncio
import os
from pathlib import Path

import grpc

from bundles.importer.jobs import Jobs
from bundles.importer.scrubbing import Pace, Scrubber
from bundles.importer.service import ImporterService
from bundles.importer.workplace import Allowed, Workplace
from bundles.protos import importer_pb2_grpc
from engine.process import Process, run

FORBIDDEN = ("torch", "tokenizers", "jinja2")
GRACE = 5.0


async def serve(process: Process, home: Path, allowed: Allowed, pace: Pace) -> None:
    """Serve on `run/importer.sock` until the process is told to stop."""
    place = Workplace.open(home, allowed=allowed)
    jobs = Jobs(place, process.stop)
    scrubber = Scrubber(place, pace)
    server = grpc.aio.server()
    service = ImporterService(jobs, place, scrubber, process.stopping)
    importer_pb2_grpc.add_ImporterServiceServicer_to_server(service, server)
    process.listen(server, home / "run" / "importer.sock")
    ready = asyncio.Event()
    jobs.take_up(ready)
    await server.start()
    process.ready()
    ready.set()
    scrubber.start()
    await process.stopping.wait()
    await jobs.stop()
    await asyncio.to_thread(scrubber.stop)
    await server.stop(GRACE)
    place.ledger.close()


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="bundles.importer", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="home directory of the appliance")
    parser.add_argument(
        "--quota-bytes", type=int, default=0, help="most bytes the store may hold; 0 for no such limit"
    )
    parser.add_argument(
        "--licence", nargs="*", action="extend", metavar="SPDX", help="licences that may be imported; else any"
    )
    parser.add_argument(
        "--scrub-bytes-per-second",
        type=int,
        default=Pace.bytes_per_second,
        help="most that a scrub reads; 0 for no limit",
    )
    parser.add_argument(
        "--scrub-days", type=int, default=Pace.days, help="days from one scrub to the next; 0 for none by itself"
    )
    given = parser.parse_args()
    home: Path = given.home.resolve()
    allowed = Allowed(None if given.licence is None else frozenset(given.licence), given.quota_bytes)
    pace = Pace(given.scrub_bytes_per_second, given.scrub_days)
    os.umask(0o077)
    return run("importer", lambda process: serve(process, home, allowed, pace), forbidden=FORBIDDEN)


if __name__ == "__main__":
    raise SystemExit(main())
