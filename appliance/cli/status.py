"""`cloister status`: the running appliance as control sees it."""

import argparse

from appliance.cli.model import deployments_table
from appliance.cli.output import emit, plain, printable
from appliance.client.admin import AdminClient
from appliance.protos import admin_pb2


def register(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cloister status`."""
    parser.set_defaults(run=_status)


def _status(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        status = admin.system.GetStatus(admin_pb2.GetStatusRequest())
    emit(args, plain(status), _shown(status))
    return 0


def _shown(status: admin_pb2.GetStatusResponse) -> str:
    peers = ", ".join(f"{p.name} {'connected' if p.connected else 'NOT CONNECTED'}" for p in status.peers)
    audit = f"{status.audit_size:,} records, root {status.audit_root.hex()[:16]}"
    if status.audit_blocked:
        audit += f", BLOCKED: {status.audit_blocked}"
    facts = {
        "version": status.version,
        "gateway": status.gateway_address or "not up",
        "processes": peers,
        "isolation": status.isolation,
        "profile": status.profile,
        "operator": status.operator,
        "audit": audit,
        "requests": f"{status.open_leases:,} running, {status.reserved_tokens:,} tokens reserved",
    }
    lines = [f"{name:<10} {printable(fact)}" for name, fact in facts.items()]
    return "\n".join([*lines, "", deployments_table(status.deployments)])
