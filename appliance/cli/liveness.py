"""Which processes of a home do their work: each is asked something, and has a few seconds to answer.

A socket that can be connected to proves nothing: the kernel accepts for a process that stands still.
"""

from pathlib import Path

import grpc

from appliance.cli.finding import Finding
from appliance.client.admin import AdminClient
from appliance.errors import CloisterError
from appliance.protos import admin_pb2
from bundles.protos import importer_pb2, importer_pb2_grpc
from engine.protos import engine_pb2, engine_pb2_grpc

_CHECK = "processes"
_ANSWER_S = 3.0
_ABSENT = "not running"
_LOGIN, _IMPORTER, _ENGINE_HOST = "login.sock", "importer.sock", "engine-host.sock"
_STOPPED = Finding(_CHECK, "WARN", "none answers: the appliance is not running", "start it: `cloister serve`")
_WELL = {"ready", "loading", "draining"}


def check(home: Path) -> Finding:
    """Control, importer and engine-host are asked; of the gateway and deployments, control says what it knows."""
    run = home / "run"
    if not any((run / name).exists() for name in (_LOGIN, _IMPORTER, _ENGINE_HOST)):
        return _STOPPED
    silent = {name: why for name, why in (("importer", _importer(run)), ("engine-host", _engine_host(run))) if why}
    answered = [name for name in ("importer", "engine-host") if name not in silent]
    try:
        with AdminClient(home) as admin:
            status = admin.system.GetStatus(admin_pb2.GetStatusRequest(), timeout=_ANSWER_S)
    except CloisterError as error:
        if error.status in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return _finding(home, [*answered, "control"], silent, [f"gateway, deployments ({error.code})"])
        if error.code == "NOT_RUNNING" and set(silent.values()) == {_ABSENT}:
            return Finding(
                _CHECK, "WARN", "none answers: the appliance is not running", "start it: `cloister serve`"
            )
        silent["control"] = "does not answer"
        return _finding(home, answered, silent, ["gateway", "deployments"])
    if not status.gateway_address:
        silent["gateway"] = "has not been heard by control for 5 s"
    silent |= {f"deployment {d.name}": d.state for d in status.deployments if d.state not in _WELL}
    answered += ["control", *(["gateway heard by control"] if status.gateway_address else [])]
    answered += [f"deployment {d.name} {d.state}" for d in status.deployments if d.state in _WELL]
    return _finding(home, answered, silent, [])


def _finding(home: Path, answered: list[str], silent: dict[str, str], unchecked: list[str]) -> Finding:
    """What is well, what is not and what nobody could say."""
    parts = [f"{name}: {why}" for name, why in silent.items()]
    parts += [f"answered: {', '.join(answered)}"] if answered else []
    parts += [f"not checked: {', '.join(unchecked)}"] if unchecked else []
    if silent:
        return Finding(_CHECK, "FAIL", "; ".join(parts), f"read the logs in {home / 'logs'}")
    if unchecked:
        return Finding(_CHECK, "WARN", "; ".join(parts), "run this as an operator")
    return Finding(_CHECK, "OK", "; ".join(parts))


def _importer(run: Path) -> str:
    """Why the importer is not well; empty when it is."""
    with grpc.insecure_channel(f"unix:{run / _IMPORTER}") as channel:
        stub = importer_pb2_grpc.ImporterServiceStub(channel)
        try:
            stub.ListModelVersions(importer_pb2.ListModelVersionsRequest(), timeout=_ANSWER_S)
        except grpc.RpcError as error:
            return _why(error)
    return ""


def _engine_host(run: Path) -> str:
    """The same of engine-host."""
    with grpc.insecure_channel(f"unix:{run / _ENGINE_HOST}") as channel:
        stub = engine_pb2_grpc.HostServiceStub(channel)
        try:
            stub.GetInventory(engine_pb2.GetInventoryRequest(), timeout=_ANSWER_S)
        except grpc.RpcError as error:
            return _why(error)
    return ""


def _why(error: grpc.RpcError) -> str:
    status: grpc.StatusCode = error.code()
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"does not answer within {_ANSWER_S:g} s"
    return _ABSENT if status is grpc.StatusCode.UNAVAILABLE else f"answers {status.name}"
