"""`cloister alias`: the model names that clients call."""

import argparse

from appliance.cli.output import emit, plain, printable, table
from appliance.client.admin import AdminClient
from appliance.protos import admin_pb2


def register(parser: argparse.ArgumentParser) -> None:
    """The verbs of `cloister alias`."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    verbs.add_parser("list", help="the aliases and what answers for them").set_defaults(run=_list)
    point = verbs.add_parser("set", help="point an alias at a deployment")
    point.add_argument("name", metavar="ALIAS")
    point.add_argument("deployment", metavar="DEPLOYMENT")
    point.set_defaults(run=_set)
    remove = verbs.add_parser("remove", help="remove an alias; clients are told that the model does not exist")
    remove.add_argument("name", metavar="ALIAS")
    remove.set_defaults(run=_remove)


def _list(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        aliases = admin.models.ListAliases(admin_pb2.ListAliasesRequest()).aliases
    text = table(("alias", "deployment"), [(a.name, a.deployment) for a in aliases]) if aliases else "no aliases"
    emit(args, [plain(a) for a in aliases], text)
    return 0


def _set(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        admin.models.SetAlias(admin_pb2.SetAliasRequest(name=args.name, deployment=args.deployment))
    value = {"name": args.name, "deployment": args.deployment}
    emit(args, value, f"{printable(args.name)} -> {printable(args.deployment)}")
    return 0


def _remove(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        admin.models.RemoveAlias(admin_pb2.RemoveAliasRequest(name=args.name))
    emit(args, {"removed": args.name}, f"{printable(args.name)} removed")
    return 0
