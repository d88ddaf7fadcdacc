"""The policy table: complete or no start, and each role may do exactly what it says."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2

from appliance import policy
from appliance.errors import CloisterError
from appliance.policy import Audience, AuditClass, Role

ROOT = Path(policy.__file__).parent.parent
PROTOS = sorted(path for path in ROOT.glob("*/protos/**/*.proto"))
STUBS = [f"{path.relative_to(ROOT).parts[0]}.protos.{path.stem}_pb2" for path in PROTOS]
FILES = (health_pb2, *map(importlib.import_module, STUBS))
SERVICES: list[ServiceDescriptor] = [s for f in FILES for s in f.DESCRIPTOR.services_by_name.values()]
ADMIN = [f"/{s.full_name}/{m.name}" for s in SERVICES if ".admin." in s.full_name for m in s.methods]

OPERATES = {
    "ImportBundle", "OfferVolume", "CancelImport", "ActivateModel", "RollbackAlias", "RemoveModelVersion",
    "ScrubStore", "LoadModel", "UnloadModel", "SetAlias", "RemoveAlias",
}  # fmt: skip
APPROVES = {"ApproveModelVersion"}
MANAGES = {"AddTenant", "SetTenant", "SuspendTenant", "IssueKey", "RevokeKey"}
AUDITS = {"TailAudit", "QueryAudit", "VerifyAudit"}


def test_every_rpc_of_every_proto_in_the_tree_has_a_row_and_every_row_an_rpc() -> None:
    policy.check_complete(SERVICES)
    names = {service.full_name for service in SERVICES}
    assert {method[1:].rpartition("/")[0] for method in policy.TABLE} == names
    declared = sum(path.read_text().count("\n  rpc ") for path in PROTOS)
    health = len(health_pb2.DESCRIPTOR.services_by_name["Health"].methods)
    assert len(policy.TABLE) == declared + health, "the descriptors are those of the protos"


def test_what_is_internal_is_for_no_tenant_and_no_operator() -> None:
    outside = {Audience.PUBLIC, Audience.TENANT, Audience.OPERATOR}
    open_to = {method.split("/")[1] for method, rule in policy.TABLE.items() if rule.audience in outside}
    assert {name.rpartition(".v1.")[0] for name in open_to} == {
        "cloister.inference", "cloister.admin", "grpc.health",
    }  # fmt: skip


@pytest.mark.parametrize("method", sorted(policy.TABLE))
def test_without_any_one_row_the_process_refuses_to_start(method: str) -> None:
    table = {name: rule for name, rule in policy.TABLE.items() if name != method}
    with pytest.raises(CloisterError, match="POLICY_INCOMPLETE") as error:
        policy.check_complete(SERVICES, table)
    assert method in error.value.message


def test_a_row_for_a_method_that_is_not_served_any_more_is_refused_too() -> None:
    table = {
        **policy.TABLE,
        "/cloister.admin.v1.SystemService/Retired": policy.Rule(Audience.OPERATOR, AuditClass.NONE),
    }
    with pytest.raises(CloisterError, match="Retired"):
        policy.check_complete(SERVICES, table)


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("method", ADMIN)
def test_each_role_may_call_what_it_is_for_and_nothing_else(role: Role, method: str) -> None:
    name = method.rpartition("/")[2]
    owner = {
        **dict.fromkeys(OPERATES, Role.OPERATOR),
        **dict.fromkeys(APPROVES, Role.CUSTODIAN),
        **dict.fromkeys(MANAGES, Role.TENANT_MANAGER),
        **dict.fromkeys(AUDITS, Role.AUDITOR),
    }.get(name)
    rule = policy.rule_for(method, Audience.OPERATOR)
    if owner in (None, role):
        policy.check_role(rule, [role])
    else:
        with pytest.raises(CloisterError, match="ROLE_REQUIRED"):
            policy.check_role(rule, [role])


def test_every_method_that_changes_something_leaves_an_intent_and_an_outcome() -> None:
    changes = {m.rpartition("/")[2] for m in ADMIN if policy.TABLE[m].audit is AuditClass.CHANGE}
    assert changes == OPERATES | APPROVES | MANAGES


@pytest.mark.parametrize("audience", list(Audience))
def test_a_method_without_a_row_or_for_somebody_else_is_denied(audience: Audience) -> None:
    for method in ("/cloister.inference.v1.InferenceService/Unknown", "", "Generate"):
        with pytest.raises(CloisterError, match="METHOD_NOT_ALLOWED"):
            policy.rule_for(method, audience)
    for method, rule in policy.TABLE.items():
        if rule.audience is not audience:
            with pytest.raises(CloisterError, match="METHOD_NOT_ALLOWED"):
                policy.rule_for(method, audience)


def test_the_table_loads_neither_torch_nor_a_database() -> None:
    code = "import sys, appliance.policy; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"torch", "sqlalchemy", "sqlite3", "cryptography"}.isdisjoint(loaded)
