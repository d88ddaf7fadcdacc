"""`cloister status`: the running appliance as control sees it."""

import argparse
import time
from pathlib import Path

import grpc

from appliance.cli.arguments import seconds
from appliance.cli.model import deployments_table
from appliance.cli.output import emit, plain, printable
from appliance.client.admin import AdminClient
from appliance.errors import CloisterError
from appliance.protos import admin_pb2

_POLL_S = 0.2


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister status`."""
    parser.add_argument(
        "--wait",
        type=seconds,
        metavar="SECONDS",
        help="wait as long as this for the gateway, the importer and engine-host to be connected",
    )
    parser.set_defaults(run=_status)


def _status(args: argparse.Namespace) -> int:
    status = _now(args.home) if args.wait is None else _connected(args.home, args.wait)
    emit(args, plain(status), _shown(status))
    return 0


def _now(home: Path) -> admin_pb2.GetStatusResponse:
    with AdminClient(home) as admin:
        return admin.system.GetStatus(admin_pb2.GetStatusRequest())


def _connected(home: Path, wait: float) -> admin_pb2.GetStatusResponse:
    """The status once every process is connected.

    Raises:
        CloisterError: NOT_READY, some were not in time; or why the appliance does not answer this user.
    """
    deadline = time.monotonic() + wait
    while True:
        try:
            status = _now(home)
            missing = [peer.name for peer in status.peers if not peer.connected]
            missing += [] if status.gateway_address else ["gateway"]
            if not missing:
                return status
        except CloisterError as error:
            if error.code != "NOT_RUNNING":
                raise
            missing = ["control"]
        if time.monotonic() >= deadline:
            message = f"after {wait:g} s not connected: {', '.join(missing)}; their logs are in {home / 'logs'}"
            raise CloisterError("NOT_READY", message, grpc.StatusCode.UNAVAILABLE)
        time.sleep(_POLL_S)


def _shown(status: admin_pb2.GetStatusResponse) -> str:
    peers = ", ".join(f"{p.name} {'connected' if p.connected else 'NOT CONNECTED'}" for p in status.peers)
    audit = f"{status.audit_size:,} records, root {status.audit_root.hex()[:16]}"
    if status.audit_blocked:
        audit += f", BLOCKED: {status.audit_blocked}"
    facts = {
        "version": status.version,
        "gateway": status.gateway_address or "not up",
        "processes": peers,
        "site": status.site,
        "isolation": status.isolation,
        "profile": status.profile,
        "operator": status.operator,
        "audit": audit,
        "requests": f"{status.open_leases:,} running, {status.reserved_tokens:,} tokens reserved",
    }
    lines = [f"{name:<10} {printable(fact)}" for name, fact in facts.items()]
    return "\n".join([*lines, "", deployments_table(status.deployments)])
