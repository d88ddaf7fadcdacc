"""Who may call what: one default-deny table that names every RPC of every proto in the tree.

How it is enforced:

* the gateway does not start when a method it serves has no row, or a row of its services no method
  (`check_complete`), and refuses each call whose row is neither a tenant's nor everybody's (`rule_for`);
* control checks its services likewise at start, on its admin socket each call's row and role, and the row of each
  tenant's call that the gateway asks it about;
* the other sockets of the house, control.sock among them, are guarded by file permissions alone (run/ is 0700).
  Their rows say who is meant to call; a test checks that none is missing, and no call is held against them.

Needs neither torch nor a database. The auditor's rows are its own: in a later profile a person with the auditor's
role has no other. Today the first operator, made by `init`, holds every role; the table is written so that each
role stands alone.
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

    PUBLIC = "public"
    """Whoever has a client certificate, even without a key."""
    TENANT = "tenant"
    OPERATOR = "operator"
    GATEWAY = "gateway"
    CONTROL = "control"


class Role(StrEnum):
    """What an operator may be."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    TENANT_MANAGER = "tenant-manager"
    CUSTODIAN = "custodian"
    AUDITOR = "auditor"


class AuditClass(StrEnum):
    """What a call leaves in the audit log; a refused call leaves an event, or counts in that of one like it."""

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
    """One row: for whom, for which of their roles (operators only), and what is recorded.

    `capability` is what the model must be able to answer, as ListModels names it; empty where any model will do.
    """

    audience: Audience
    audit: AuditClass
    roles: frozenset[Role] = frozenset()
    capability: str = ""


EVERY_ROLE = frozenset(Role)

_GENERATES = Rule(Audience.TENANT, AuditClass.REQUEST, capability="generate")
_CHATS = Rule(Audience.TENANT, AuditClass.REQUEST, capability="chat")
_EMBEDS = Rule(Audience.TENANT, AuditClass.REQUEST, capability="embed")
_RERANKS = Rule(Audience.TENANT, AuditClass.REQUEST, capability="rerank")
_TENANT_READ = Rule(Audience.TENANT, AuditClass.NONE)
_PUBLIC_READ = Rule(Audience.PUBLIC, AuditClass.NONE)
_GATEWAY = Rule(Audience.GATEWAY, AuditClass.NONE)
_CONTROL = Rule(Audience.CONTROL, AuditClass.NONE)
_SEE = Rule(Audience.OPERATOR, AuditClass.NONE, EVERY_ROLE)
_RUN_MODELS = Rule(Audience.OPERATOR, AuditClass.CHANGE, frozenset({Role.OPERATOR}))
_APPROVE = Rule(Audience.OPERATOR, AuditClass.CHANGE, frozenset({Role.CUSTODIAN}))
_RUN_TENANTS = Rule(Audience.OPERATOR, AuditClass.CHANGE, frozenset({Role.TENANT_MANAGER}))
_READ_AUDIT = Rule(Audience.OPERATOR, AuditClass.READ, frozenset({Role.AUDITOR}))


def _rows(service: str, **methods: Rule) -> dict[str, Rule]:
    return {f"/{service}/{name}": rule for name, rule in methods.items()}


TABLE: Mapping[str, Rule] = {
    **_rows("grpc.health.v1.Health", Check=_PUBLIC_READ, Watch=_PUBLIC_READ),
    **_rows(
        "cloister.inference.v1.InferenceService",
        Generate=_GENERATES,
        Chat=_CHATS,
        Embed=_EMBEDS,
        Rerank=_RERANKS,
        Tokenize=_TENANT_READ,
        Detokenize=_TENANT_READ,
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
    **_rows("cloister.engine.v1.TextService", Prepare=_GATEWAY, Tokenize=_GATEWAY, Detokenize=_GATEWAY),
    **_rows("cloister.engine.v1.WorkerService", Session=_GATEWAY, GetStatus=_CONTROL),
    **_rows(
        "cloister.engine.v1.HostService",
        GetInventory=_CONTROL,
        PlanDeployment=_CONTROL,
        Reconcile=_CONTROL,
        WatchDeployments=_CONTROL,
    ),
    **_rows(
        "cloister.importer.v1.ImporterService",
        ImportBundle=_CONTROL,
        OfferVolume=_CONTROL,
        ListImports=_CONTROL,
        CancelImport=_CONTROL,
        ListModelVersions=_CONTROL,
        GetModelVersion=_CONTROL,
        RemoveModelVersion=_CONTROL,
        VerifyApproval=_CONTROL,
        GetTrust=_CONTROL,
        GetStore=_CONTROL,
        ScrubStore=_CONTROL,
        ReadOutbox=_CONTROL,
        AcknowledgeOutbox=_CONTROL,
    ),
    **_rows("cloister.admin.v1.SystemService", GetStatus=_SEE),
    **_rows(
        "cloister.admin.v1.ModelService",
        ImportBundle=_RUN_MODELS,
        OfferVolume=_RUN_MODELS,
        ListImports=_SEE,
        CancelImport=_RUN_MODELS,
        ListModelVersions=_SEE,
        ApproveModelVersion=_APPROVE,
        ActivateModel=_RUN_MODELS,
        RollbackAlias=_RUN_MODELS,
        RemoveModelVersion=_RUN_MODELS,
        GetStore=_SEE,
        ScrubStore=_RUN_MODELS,
        GetTrust=_SEE,
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
    **_rows("cloister.admin.v1.DeviceService", ListDevices=_SEE, PlanModel=_SEE),
    **_rows(
        "cloister.admin.v1.AuditService", TailAudit=_READ_AUDIT, QueryAudit=_READ_AUDIT, VerifyAudit=_READ_AUDIT
    ),
}


def rule_for(method: str, *audiences: Audience) -> Rule:
    """The row of `method` (/package.Service/Method) for a caller who is of any of `audiences`.

    Raises:
        CloisterError: METHOD_NOT_ALLOWED, there is no row, or it is for somebody else.
    """
    rule = TABLE.get(method)
    if rule is None or rule.audience not in audiences:
        raise CloisterError(
            "METHOD_NOT_ALLOWED",
            f"the policy table does not allow this method to a caller of the kind {' or '.join(audiences)}",
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
