"""Who may call what: one default-deny table that names every RPC of the appliance.

A process that serves an RPC without a row refuses to start (`check_complete`), and a call without a row is refused
(`rule_for`). The gateway reads the tenant rows, control enforces all of them. Needs neither torch nor a database.

The auditor's rows are its own: in a later profile a person with the auditor's role has no other. Today the first
operator, made by `init`, holds every role; the table is written so that each role stands alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from appliance.errors import CloisterError

POLICY_VERSION = 1


class Audience(StrEnum):
    """Who a method is for."""

    TENANT = "tenant"
    GATEWAY = "gateway"
    OPERATOR = "operator"


class Role(StrEnum):
    """What an operator may be."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    TENANT_MANAGER = "tenant-manager"
    CUSTODIAN = "custodian"
    AUDITOR = "auditor"


class AuditClass(StrEnum):
    """What a call leaves in the audit log; a refused call always leaves an event."""

    NONE = "none"
    """Nothing: it reads what is no secret, or another row records it."""
    READ = "read"
    """An event: it reads what is sensitive."""
    CHANGE = "change"
    """An intent before it is carried out and an outcome before it is answered."""
    REQUEST = "request"
    """An intent before the first token and an outcome before OK."""


@dataclass(frozen=True)
class Rule:
    """One row: for whom, for which of their roles (operators only), and what is recorded."""

    audience: Audience
    audit: AuditClass
    roles: frozenset[Role] = frozenset()


EVERY_ROLE = frozenset(Role)

_TENANT_REQUEST = Rule(Audience.TENANT, AuditClass.REQUEST)
_TENANT_READ = Rule(Audience.TENANT, AuditClass.NONE)
_GATEWAY = Rule(Audience.GATEWAY, AuditClass.NONE)
_SEE = Rule(Audience.OPERATOR, AuditClass.NONE, EVERY_ROLE)
_RUN_MODELS = Rule(Audience.OPERATOR, AuditClass.CHANGE, frozenset({Role.OPERATOR}))
_RUN_TENANTS = Rule(Audience.OPERATOR, AuditClass.CHANGE, frozenset({Role.TENANT_MANAGER}))
_READ_AUDIT = Rule(Audience.OPERATOR, AuditClass.READ, frozenset({Role.AUDITOR}))


def _rows(service: str, **methods: Rule) -> dict[str, Rule]:
    return {f"/{service}/{name}": rule for name, rule in methods.items()}


TABLE: Mapping[str, Rule] = {
    **_rows("grpc.health.v1.Health", Check=_TENANT_READ, Watch=_TENANT_READ),
    **_rows(
        "cloister.inference.v1.InferenceService",
        Generate=_TENANT_REQUEST,
        Chat=_TENANT_REQUEST,
        ListModels=_TENANT_READ,
    ),
    **_rows(
        "cloister.control.v1.ControlService",
        Authorize=_GATEWAY,
        Admit=_GATEWAY,
        AwaitIntent=_GATEWAY,
        Settle=_GATEWAY,
        ListVisibleModels=_GATEWAY,
        Heartbeat=_GATEWAY,
        RecordRefusal=_GATEWAY,
    ),
    **_rows("cloister.admin.v1.SystemService", GetStatus=_SEE),
    **_rows(
        "cloister.admin.v1.ModelService",
        ImportBundle=_RUN_MODELS,
        ListModelVersions=_SEE,
        LoadModel=_RUN_MODELS,
        UnloadModel=_RUN_MODELS,
        ListDeployments=_SEE,
        SetAlias=_RUN_MODELS,
        RemoveAlias=_RUN_MODELS,
        ListAliases=_SEE,
    ),
    **_rows(
        "cloister.admin.v1.TenantService",
        AddTenant=_RUN_TENANTS,
        SetTenant=_RUN_TENANTS,
        SuspendTenant=_RUN_TENANTS,
        ListTenants=_SEE,
        IssueKey=_RUN_TENANTS,
        ListKeys=_SEE,
        RevokeKey=_RUN_TENANTS,
    ),
    **_rows("cloister.admin.v1.AuditService", TailAudit=_READ_AUDIT, VerifyAudit=_READ_AUDIT),
}


def rule_for(method: str, audience: Audience) -> Rule:
    """The row of `method` (/package.Service/Method) for a caller of `audience`.

    Raises:
        CloisterError: METHOD_NOT_ALLOWED, there is no row, or it is for somebody else.
    """
    rule = TABLE.get(method)
    if rule is None or rule.audience is not audience:
        raise CloisterError(
            "METHOD_NOT_ALLOWED",
            f"the policy table does not allow this method to a caller of the kind {audience}",
            grpc.StatusCode.PERMISSION_DENIED,
        )
    return rule


def check_role(rule: Rule, roles: Iterable[Role]) -> None:
    """Refuse an operator none of whose roles the row names.

    Raises:
        CloisterError: ROLE_REQUIRED.
    """
    if rule.roles.isdisjoint(roles):
        wanted = " or ".join(sorted(rule.roles))
        raise CloisterError(
            "ROLE_REQUIRED",
            f"this needs the role {wanted}; ask an operator who holds it",
            grpc.StatusCode.PERMISSION_DENIED,
        )


def check_complete(services: Iterable[ServiceDescriptor], table: Mapping[str, Rule] = TABLE) -> None:
    """Refuse to serve `services` unless each of their methods has a row and each row of theirs a method.

    Raises:
        CloisterError: POLICY_INCOMPLETE; the process must not start.
    """
    served = list(services)
    methods = {f"/{service.full_name}/{method.name}" for service in served for method in service.methods}
    names = {service.full_name for service in served}
    rows = {method for method in table if method[1:].rpartition("/")[0] in names}
    if methods != rows:
        missing, stale = sorted(methods - rows), sorted(rows - methods)
        raise CloisterError(
            "POLICY_INCOMPLETE",
            f"methods without a policy row: {missing}; rows without a method: {stale}; see appliance/policy.py",
            grpc.StatusCode.FAILED_PRECONDITION,
        )
