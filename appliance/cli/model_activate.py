"""`cloister model activate` and `rollback`: a version put behind an alias, watched; it goes on without us."""

import argparse
import sys
from collections.abc import Iterator

import grpc

from appliance.cli.deployment_options import add_options, options
from appliance.cli.output import emit_line, plain, printable
from appliance.client.admin import AdminClient
from appliance.errors import CloisterError
from appliance.protos import admin_pb2

Verbs = argparse._SubParsersAction  # the type of what add_subparsers returns has no public name

_INTERRUPTED = 130


def register_verbs(verbs: "Verbs[argparse.ArgumentParser]") -> None:
    """Add the two verbs to `cloister model`."""
    activate = verbs.add_parser(
        "activate",
        help="load a version beside the present one, try its canaries, and move the alias; or move nothing",
    )
    activate.add_argument(
        "version", metavar="MODEL", help="name@version, a name for its newest version, or a digest"
    )
    activate.add_argument(
        "--alias", required=True, metavar="ALIAS", help="what clients call; made where there is none"
    )
    add_acceptance(activate)
    add_options(activate)
    activate.set_defaults(run=_activate)
    rollback = verbs.add_parser("rollback", help="point an alias back at the version it had before")
    rollback.add_argument("alias", metavar="ALIAS")
    rollback.set_defaults(run=_rollback)


def add_acceptance(parser: argparse.ArgumentParser) -> None:
    """The flag that accepts a licence."""
    parser.add_argument(
        "--accept-licence",
        action="store_true",
        help="you accept the licences that ask for it; kept, with your name",
    )


def _activate(args: argparse.Namespace) -> int:
    request = admin_pb2.ActivateModelRequest(
        model_version=args.version, alias=args.alias, accept_licence=args.accept_licence
    )
    wanted = options(args)
    if wanted.ListFields():
        request.options.CopyFrom(wanted)
    with AdminClient(args.home) as admin:
        stream: Iterator[admin_pb2.ActivateModelResponse] = admin.models.ActivateModel(request)
        return _watch(args, (told.activation for told in stream))


def _rollback(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        request = admin_pb2.RollbackAliasRequest(alias=args.alias)
        stream: Iterator[admin_pb2.RollbackAliasResponse] = admin.models.RollbackAlias(request)
        return _watch(args, (told.activation for told in stream))


def _watch(args: argparse.Namespace, steps: Iterator[admin_pb2.Activation]) -> int:
    """Show each step, one line; the exit status.

    Raises:
        CloisterError: why the alias is where it was.
    """
    last = admin_pb2.Activation()
    try:
        for last in steps:
            _show(args, last)
    except KeyboardInterrupt:
        print(
            "\nit goes on, and ends by itself: the same command watches it again, `model list` shows its end",
            file=sys.stderr,
        )
        return _INTERRUPTED
    if last.stage != "active":
        raise CloisterError(
            last.reason or "ACTIVATION_INCOMPLETE",
            f"{last.message}; {args.alias} is where it was",
            grpc.StatusCode.FAILED_PRECONDITION,
        )
    return 0


def _show(args: argparse.Namespace, step: admin_pb2.Activation) -> None:
    """Every step on standard output; on the way back the error says the rest."""
    tried = f" ({step.canaries_done} of {step.canaries_total} tried)" if step.stage == "canaries" else ""
    emit_line(args, plain(step), f"{step.stage:<10}{printable(step.message)}{tried}")
