"""TenantService: tenants, their limits, and the keys of their applications."""

import time
from datetime import timedelta
from typing import Any

import grpc
from cryptography.hazmat.primitives import serialization
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from appliance.control.admin import gate
from appliance.control.admin.views import key_view, tenant_view, timestamp
from appliance.control.admission.leases import LeaseBook
from appliance.control.db.database import Database
from appliance.control.db.models import ApiKey, Grant, Tenant
from appliance.control.identity import api_keys
from appliance.control.identity.authority import Authority, identity_of
from appliance.control.identity.secret_keys import SecretKeys
from appliance.control.limits import Limits
from appliance.control.names import SYSTEM_TENANT, check_name, check_names
from appliance.errors import CloisterError
from appliance.protos import admin_pb2, admin_pb2_grpc

_MOST_CONCURRENT = 4096
_MOST_WEIGHT = 1000
_MOST_VALID_DAYS = 825
_MOST_MODELS = 100
_DAY_NS = 86_400 * 10**9

# grpc.aio gives servicers a context whose type the generated stubs keep private.
Context = Any


class TenantService(admin_pb2_grpc.TenantServiceServicer):
    """Tenants and keys, behind the gate.

    Args:
        database: control.db.
        keys: the pepper of API keys.
        authority: signs client certificates.
        leases: knows where the gateway listens.
        site: trust domain of identities.
        limits: what a tenant or key gets for which nothing else is said.
    """

    def __init__(
        self,
        database: Database,
        keys: SecretKeys,
        authority: Authority,
        leases: LeaseBook,
        site: str,
        limits: Limits,
    ) -> None:
        self._database = database
        self._keys = keys
        self._authority = authority
        self._leases = leases
        self._site = site
        self._limits = limits

    async def AddTenant(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.AddTenantRequest, context: Context
    ) -> admin_pb2.AddTenantResponse:
        """Adds a tenant; 0 takes the default of a limit."""
        tenant = await self._database.run(lambda s: _add(s, request.tenant, self._limits))
        return admin_pb2.AddTenantResponse(tenant=tenant)

    async def SetTenant(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.SetTenantRequest, context: Context
    ) -> admin_pb2.SetTenantResponse:
        """Changes what the request names."""
        tenant = await self._database.run(lambda s: _set(s, request))
        return admin_pb2.SetTenantResponse(tenant=tenant)

    async def SuspendTenant(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.SuspendTenantRequest, context: Context
    ) -> admin_pb2.SuspendTenantResponse:
        """No request is admitted from now on, or again."""
        tenant = await self._database.run(lambda s: _suspend(s, request.name, not request.resume))
        return admin_pb2.SuspendTenantResponse(tenant=tenant)

    async def ListTenants(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.ListTenantsRequest, context: Context
    ) -> admin_pb2.ListTenantsResponse:
        """All, by name."""
        return admin_pb2.ListTenantsResponse(tenants=await self._database.run(_tenants))

    async def IssueKey(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.IssueKeyRequest, context: Context
    ) -> admin_pb2.IssueKeyResponse:
        """A certificate for the request's key and an API key, shown this once."""
        tenant = _own(check_name(request.tenant, "tenant"))
        application = check_name(request.application, "application")
        days = _within(request.valid_days or self._limits.key_days, "valid_days", _MOST_VALID_DAYS)
        identity = identity_of(self._site, tenant, application)
        certificate = self._authority.issue_client(request.csr_pem, identity, timedelta(days=days))
        drawn = api_keys.draw(self._keys)
        row = drawn.row(tenant, application, certificate, timedelta(days=days))
        await self._database.run(lambda s: _keep_key(s, row))
        gate.note(key_id=drawn.key_id, certificate_sha256=row.certificate_sha256.hex(), identity=identity)
        return admin_pb2.IssueKeyResponse(
            key_id=drawn.key_id,
            api_key=drawn.text,
            certificate_pem=certificate.public_bytes(serialization.Encoding.PEM),
            ca_pem=self._authority.certificate_pem,
            gateway_address=self._leases.gateway_address,
            expires_at=timestamp(row.expires_ns),
        )

    async def ListKeys(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.ListKeysRequest, context: Context
    ) -> admin_pb2.ListKeysResponse:
        """Oldest first, of one tenant or of all."""
        return admin_pb2.ListKeysResponse(keys=await self._database.run(lambda s: _keys(s, request.tenant)))

    async def RevokeKey(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.RevokeKeyRequest, context: Context
    ) -> admin_pb2.RevokeKeyResponse:
        """The key and its certificate are refused from now on."""
        await self._database.run(lambda s: _revoke(s, request.key_id))
        return admin_pb2.RevokeKeyResponse()


def _add(session: Session, wanted: admin_pb2.Tenant, limits: Limits) -> admin_pb2.Tenant:
    name = _own(check_name(wanted.name, "tenant.name"))
    if session.get(Tenant, name) is not None:
        raise CloisterError(
            "TENANT_EXISTS",
            f"there is a tenant {name}; change it with `cloister tenant set`",
            grpc.StatusCode.ALREADY_EXISTS,
            field="tenant.name",
        )
    tenant = Tenant(
        name=name,
        max_concurrent=_within(wanted.max_concurrent or limits.max_concurrent, "max_concurrent", _MOST_CONCURRENT),
        weight=_within(wanted.weight or limits.weight, "weight", _MOST_WEIGHT),
        suspended=wanted.suspended,
        created_ns=time.time_ns(),
        tokens_used=0,
    )
    session.add(tenant)
    session.flush()
    _grant(session, name, list(wanted.models))
    return tenant_view(session, tenant)


def _set(session: Session, request: admin_pb2.SetTenantRequest) -> admin_pb2.Tenant:
    tenant = _tenant(session, _own(request.name))
    if request.HasField("max_concurrent"):
        tenant.max_concurrent = _within(request.max_concurrent, "max_concurrent", _MOST_CONCURRENT)
    if request.HasField("weight"):
        tenant.weight = _within(request.weight, "weight", _MOST_WEIGHT)
    if request.set_models:
        _grant(session, tenant.name, list(request.models))
    return tenant_view(session, tenant)


def _suspend(session: Session, name: str, suspended: bool) -> admin_pb2.Tenant:
    tenant = _tenant(session, _own(name))
    tenant.suspended = suspended
    return tenant_view(session, tenant)


def _tenants(session: Session) -> list[admin_pb2.Tenant]:
    return [tenant_view(session, row) for row in session.scalars(select(Tenant).order_by(Tenant.name))]


def _grant(session: Session, tenant: str, models: list[str]) -> None:
    """Make the grants of a tenant these. An alias may be granted before it is set."""
    if len(models) > _MOST_MODELS:
        raise CloisterError("TOO_MANY_MODELS", f"at most {_MOST_MODELS} models a tenant", field="models")
    session.execute(delete(Grant).where(Grant.tenant == tenant))
    session.add_all(Grant(tenant=tenant, alias=alias) for alias in check_names(models, "models"))
    session.flush()


def _keep_key(session: Session, row: ApiKey) -> None:
    _tenant(session, row.tenant)
    session.add(row)


def _keys(session: Session, tenant: str) -> list[admin_pb2.Key]:
    wanted = select(ApiKey).order_by(ApiKey.created_ns, ApiKey.key_id)
    if tenant:
        wanted = wanted.where(ApiKey.tenant == _tenant(session, tenant).name)
    return [key_view(row, time.time_ns()) for row in session.scalars(wanted)]


def _revoke(session: Session, key_id: str) -> None:
    key = session.get(ApiKey, key_id)
    if key is None:
        raise CloisterError(
            "KEY_NOT_FOUND",
            "no key has this id; `cloister key list` names them",
            grpc.StatusCode.NOT_FOUND,
            field="key_id",
        )
    if key.revoked_ns is None:
        key.revoked_ns = time.time_ns()


def _tenant(session: Session, name: str) -> Tenant:
    tenant = session.get(Tenant, name)
    if tenant is None:
        raise CloisterError(
            "TENANT_NOT_FOUND",
            "no tenant has this name; `cloister tenant list` names them",
            grpc.StatusCode.NOT_FOUND,
            field="tenant",
        )
    return tenant


def _own(name: str) -> str:
    """`name`, unless it is the appliance's own tenant, which tries new models and is nobody else's to change."""
    if name == SYSTEM_TENANT:
        raise CloisterError(
            "TENANT_RESERVED",
            f"{name} is the appliance itself, which tries new models; choose another name",
            grpc.StatusCode.FAILED_PRECONDITION,
            field="tenant",
        )
    return name


def _within(value: int, field: str, most: int) -> int:
    if not 1 <= value <= most:
        raise CloisterError("INVALID_LIMIT", f"{field} must be 1 to {most}", field=field)
    return value
