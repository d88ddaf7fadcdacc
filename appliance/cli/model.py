"""`cloister model`: model versions approved, made to run as deployments, and put behind aliases."""

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

import grpc

from appliance.cli import model_activate
from appliance.cli.bundle_store import notes_of
from appliance.cli.deployment_options import add_options, options, plan_line
from appliance.cli.output import emit, plain, printable, table
from appliance.cli.progress import ProgressBar
from appliance.client.admin import AdminClient
from appliance.errors import CloisterError
from appliance.protos import admin_pb2

_POLL_S = 0.1


def register(parser: argparse.ArgumentParser) -> None:
    """The verbs of `cloister model`."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    verbs.add_parser("list", help="the deployments and versions, and their states").set_defaults(run=_list)
    model_activate.register_verbs(verbs)
    approve = verbs.add_parser("approve", help="bring in custodians' approval of a model version")
    approve.add_argument("file", type=Path, metavar="FILE", help="as `cloister trust approve` wrote it")
    approve.set_defaults(run=_approve)
    load = verbs.add_parser("load", help="make a deployment of a model version and wait until it is ready")
    load.add_argument("version", metavar="MODEL", help="name@version, a name for its newest version, or a digest")
    load.add_argument("--as", dest="name", required=True, metavar="NAME", help="name of the deployment")
    add_options(load)
    model_activate.add_acceptance(load)
    load.add_argument("--no-wait", action="store_true", help="return once the deployment is recorded")
    load.set_defaults(run=_load)
    unload = verbs.add_parser("unload", help="end a deployment")
    unload.add_argument("name", metavar="NAME")
    unload.set_defaults(run=_unload)


def deployments_table(deployments: Iterable[admin_pb2.Deployment]) -> str:
    """The deployments for people; why one failed stands under the table."""
    found = list(deployments)
    if not found:
        return "no deployments; `cloister model load` makes one"
    rows = [(d.name, d.model_version, d.state, d.runs_as, d.max_context_tokens, d.restarts) for d in found]
    reasons = [printable(f"{d.name}: {d.reason}: {d.message}") for d in found if d.reason]
    return "\n".join([table(("deployment", "model", "state", "runs as", "context", "restarts"), rows), *reasons])


def _list(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        found = admin.models.ListDeployments(admin_pb2.ListDeploymentsRequest()).deployments
        text = deployments_table(found) if args.json else f"{deployments_table(found)}\n\n{_versions(admin)}"
    emit(args, [plain(d) for d in found], text)
    return 0


def _versions(admin: AdminClient) -> str:
    """The versions for people, and what needs attention; only that much, when the importer is not reached."""
    try:
        found = admin.models.ListModelVersions(admin_pb2.ListModelVersionsRequest()).versions
    except CloisterError as error:
        return printable(f"versions: {error}")
    rows = [(f"{v.name}@{v.version}", v.state, ", ".join(v.aliases), _approvals(v)) for v in found]
    notes = [note for v in found if v.revoked or v.damaged or v.state == "committed" for note in notes_of(v)]
    if not rows:
        return "no model versions; `cloister bundle import` brings one in"
    return "\n".join([table(("version", "state", "answers", "approved by"), rows), *notes])


def _approvals(version: admin_pb2.ModelVersion) -> str:
    return f"{len(version.approvals)} of {version.approvals_required}" if version.approvals_required else ""


def _approve(args: argparse.Namespace) -> int:
    envelope = args.file.read_bytes()
    with AdminClient(args.home) as admin:
        request = admin_pb2.ApproveModelVersionRequest(envelope=envelope)
        version = admin.models.ApproveModelVersion(request).version
    by = "".join(f"\n  {keyid}" for keyid in version.approvals)
    approvals = f", approved by {_approvals(version)}" if version.approvals_required else ""
    text = f"{printable(version.name)}@{printable(version.version)}: {version.state}{approvals}{by}"
    emit(args, plain(version), text)
    return 0


def _load(args: argparse.Namespace) -> int:
    request = admin_pb2.LoadModelRequest(
        model_version=args.version, name=args.name, options=options(args), accept_licence=args.accept_licence
    )
    with AdminClient(args.home) as admin:
        answer = admin.models.LoadModel(request)
        deployment = answer.deployment
        if not args.no_wait:
            deployment = _wait(admin, args.name)
    value = plain(deployment) | {"plan": plain(answer.plan)}
    emit(args, value, f"memory: {printable(plan_line(answer.plan))}\n{deployments_table([deployment])}")
    return 0


def _wait(admin: AdminClient, name: str) -> admin_pb2.Deployment:
    """The deployment once it is ready; a busy or absent engine-host is waited for.

    Raises:
        CloisterError: the deployment's own reason, when it failed; DEPLOYMENT_GONE, when somebody unloaded it.
    """
    bar = ProgressBar()
    try:
        while True:
            deployment = _deployment(admin, name)
            if deployment.state == "ready":
                return deployment
            if deployment.state == "failed":
                code = deployment.reason or "MODEL_FAILED"
                raise CloisterError(code, deployment.message, grpc.StatusCode.FAILED_PRECONDITION)
            bar.update(deployment.state)
            time.sleep(_POLL_S)
    finally:
        bar.close()


def _deployment(admin: AdminClient, name: str) -> admin_pb2.Deployment:
    found: Iterable[admin_pb2.Deployment]
    found = admin.models.ListDeployments(admin_pb2.ListDeploymentsRequest()).deployments
    for deployment in found:
        if deployment.name == name:
            return deployment
    raise CloisterError("DEPLOYMENT_GONE", f"{name} was unloaded meanwhile", grpc.StatusCode.ABORTED)


def _unload(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        admin.models.UnloadModel(admin_pb2.UnloadModelRequest(name=args.name))
    emit(args, {"unloaded": args.name}, f"{args.name} unloaded")
    return 0
