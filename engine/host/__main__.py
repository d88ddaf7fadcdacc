"""`python -m engine.host`: the inventory of devices, and every deployment's worker and text process."""

import argparse
import sys
from functools import partial
from pathlib import Path

import grpc

from engine.host.inventory import read_recorded
from engine.host.keeper import RestartPolicy
from engine.host.packing import LEAST_BYTES, Packer
from engine.host.service import HostService
from engine.process import CORES_LEFT, Process, run
from engine.protos import engine_pb2_grpc

NAME = "engine-host"
SOCKET = "engine-host.sock"
FORBIDDEN = ("torch", "sqlalchemy", "sqlite3")
_MAX_REQUEST_BYTES = 64 << 20
_WATCHERS_GRACE_S = 1.0


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM, then drain every deployment; the exit status."""
    parser = argparse.ArgumentParser(prog=NAME, description="Starts the processes of deployments.")
    parser.add_argument("--run", type=Path, required=True, help="directory of sockets")
    parser.add_argument("--store", type=Path, required=True, help="the content-addressed store")
    _add_derived(parser)
    default = RestartPolicy()
    parser.add_argument(
        "--heard-within",
        type=float,
        default=default.heard_within_s,
        metavar="SECONDS",
        help="a worker or text that gives no sign of life for longer is killed and started again (%(default)g)",
    )
    parser.add_argument(
        "--step-within",
        type=float,
        default=default.step_within_s,
        metavar="SECONDS",
        help="a worker whose engine takes longer for one step gives no more signs of life (%(default)g)",
    )
    parser.add_argument(
        "--load-within",
        type=float,
        default=default.load_limit_s,
        metavar="SECONDS",
        help="a worker or text that is not ready by then is ended for good (%(default)g)",
    )
    parser.add_argument(
        "--inventory",
        type=Path,
        metavar="FILE",
        help="recorded devices in place of this machine's; see inventory.py",
    )
    chosen = parser.parse_args(argv)
    policy = RestartPolicy(
        heard_within_s=chosen.heard_within, step_within_s=chosen.step_within, load_limit_s=chosen.load_within
    )
    return run(NAME, partial(_serve, chosen, policy), FORBIDDEN)


def _add_derived(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--derived", type=Path, help="directory of packed weights; without it none are kept")
    parser.add_argument(
        "--derive-mib",
        type=int,
        default=LEAST_BYTES >> 20,
        metavar="MIB",
        help="quantised weights of that size are packed before a worker starts, and kept (%(default)s)",
    )


async def _serve(chosen: argparse.Namespace, policy: RestartPolicy, process: Process) -> None:
    run_directory, store = chosen.run.absolute(), chosen.store.absolute()
    inventory = read_recorded(chosen.inventory.absolute()) if chosen.inventory else None
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", _MAX_REQUEST_BYTES)])
    derived = chosen.derived.absolute() if chosen.derived else None
    packer = Packer(store, derived, policy.load_limit_s, chosen.derive_mib << 20)
    service = HostService(run_directory, store, policy, inventory, partial(_tell_cores, process), packer)
    engine_pb2_grpc.add_HostServiceServicer_to_server(service, server)
    process.listen(server, run_directory / SOCKET)
    await server.start()
    process.ready()
    await process.stopping.wait()
    await service.close()
    await server.stop(_WATCHERS_GRACE_S)


def _tell_cores(process: Process, left: frozenset[int]) -> None:
    process.tell({CORES_LEFT: ",".join(map(str, sorted(left)))})


if __name__ == "__main__":
    sys.exit(main())
