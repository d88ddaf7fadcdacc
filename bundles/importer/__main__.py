"""`python -m bundles.importer --home DIR`: the importer process."""

import argparse
import os
from pathlib import Path

import grpc

from bundles.importer.importing import Workplace
from bundles.importer.jobs import Jobs
from bundles.importer.service import ImporterService
from bundles.protos import importer_pb2_grpc
from engine.process import Process, run

FORBIDDEN = ("torch", "tokenizers", "jinja2")
GRACE = 5.0


async def serve(process: Process, home: Path) -> None:
    """Serve on `run/importer.sock` until the process is told to stop."""
    place = Workplace.open(home)
    jobs = Jobs(place, process.stop)
    server = grpc.aio.server()
    service = ImporterService(jobs, place.ledger, process.stopping)
    importer_pb2_grpc.add_ImporterServiceServicer_to_server(service, server)
    process.listen(server, home / "run" / "importer.sock")
    await server.start()
    process.ready()
    await process.stopping.wait()
    await jobs.stop()
    await server.stop(GRACE)
    place.ledger.close()


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="bundles.importer", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="home directory of the appliance")
    home: Path = parser.parse_args().home.resolve()
    os.umask(0o077)
    return run("importer", lambda process: serve(process, home), forbidden=FORBIDDEN)


if __name__ == "__main__":
    raise SystemExit(main())
