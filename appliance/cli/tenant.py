"""`cloister tenant`: who may call which models, and how much at once."""

import argparse
from collections.abc import Iterable

from appliance.cli.arguments import names, positive
from appliance.cli.failure import UsageError
from appliance.cli.output import emit, plain, table
from appliance.client.admin import AdminClient
from appliance.protos import admin_pb2


def register(parser: argparse.ArgumentParser) -> None:
    """The verbs of `cloister tenant`."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    verbs.add_parser("list", help="the tenants, their limits and what they used").set_defaults(run=_list)
    add = verbs.add_parser("add", help="add a tenant; it may call the models named and no others")
    add.add_argument("name", metavar="TENANT", help="lower-case letters, digits and hyphens")
    _add_limits(add)
    add.set_defaults(run=_add)
    change = verbs.add_parser("set", help="change a tenant; what is not named stays as it is")
    change.add_argument("name", metavar="TENANT")
    _add_limits(change)
    change.set_defaults(run=_set)
    suspend = verbs.add_parser("suspend", help="refuse all requests of a tenant")
    suspend.add_argument("name", metavar="TENANT")
    suspend.add_argument("--resume", action="store_true", help="allow them again")
    suspend.set_defaults(run=_suspend)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=names, metavar="ALIAS,...", help="aliases it may call; '' for none")
    parser.add_argument(
        "--max-concurrent",
        type=positive,
        metavar="N",
        help="most requests at once; default tenants.max_concurrent",
    )
    parser.add_argument(
        "--weight", type=positive, metavar="N", help="share of a busy machine, 1 to 1000; default tenants.weight"
    )


def _list(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        tenants = admin.tenants.ListTenants(admin_pb2.ListTenantsRequest()).tenants
    _show(args, [plain(t) for t in tenants], tenants)
    return 0


def _add(args: argparse.Namespace) -> int:
    tenant = admin_pb2.Tenant(
        name=args.name, models=args.models or (), max_concurrent=args.max_concurrent or 0, weight=args.weight or 0
    )
    with AdminClient(args.home) as admin:
        added = admin.tenants.AddTenant(admin_pb2.AddTenantRequest(tenant=tenant)).tenant
    _show(args, plain(added), [added])
    return 0


def _set(args: argparse.Namespace) -> int:
    if (args.models, args.max_concurrent, args.weight) == (None, None, None):
        raise UsageError("nothing to change; name --models, --max-concurrent or --weight")
    request = admin_pb2.SetTenantRequest(
        name=args.name,
        models=args.models or (),
        set_models=args.models is not None,
        max_concurrent=args.max_concurrent,
        weight=args.weight,
    )
    with AdminClient(args.home) as admin:
        changed = admin.tenants.SetTenant(request).tenant
    _show(args, plain(changed), [changed])
    return 0


def _suspend(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        request = admin_pb2.SuspendTenantRequest(name=args.name, resume=args.resume)
        changed = admin.tenants.SuspendTenant(request).tenant
    _show(args, plain(changed), [changed])
    return 0


def _show(args: argparse.Namespace, value: object, tenants: Iterable[admin_pb2.Tenant]) -> None:
    rows = [
        (
            t.name,
            ",".join(t.models),
            t.requests_open,
            t.max_concurrent,
            t.weight,
            t.tokens_used,
            t.tokens_reserved,
            t.suspended,
        )
        for t in tenants
    ]
    header = ("tenant", "models", "open", "concurrent", "weight", "used", "reserved", "suspended")
    emit(args, value, table(header, rows) if rows else "no tenants; `cloister tenant add` makes one")
