"""A caller, checked: the certificate and the API key belong to the same application and both are in force.

Whoever does not hold the secret learns only API_KEY_INVALID, whether the key's id exists or not; what is wrong
with a key (expired, revoked, another application's certificate) is told only to somebody who has it.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from sqlalchemy import Row, bindparam, select
from sqlalchemy.orm import Session

from appliance.control.db.models import ApiKey, Tenant
from appliance.control.identity.api_keys import PresentedKey
from appliance.control.identity.authority import identity_of
from appliance.control.identity.secret_keys import SecretKeys
from appliance.errors import CloisterError
from appliance.protos import control_pb2

_IDENTITY = re.compile(r"spiffe://[a-z0-9.-]{1,253}/tenant/([a-z0-9-]{1,63})/app/([a-z0-9-]{1,63})")

# On the way of every request, so built once and without the ORM.
_KEY, _TENANT = ApiKey.__table__.c, Tenant.__table__.c
_BY_ID = (
    select(
        _KEY.tenant,
        _KEY.application,
        _KEY.secret_hmac,
        _KEY.expires_ns,
        _KEY.revoked_ns,
        _TENANT.suspended,
        _TENANT.max_concurrent,
    )
    .join_from(ApiKey.__table__, Tenant.__table__, _TENANT.name == _KEY.tenant)
    .where(_KEY.key_id == bindparam("key_id"))
)
_OWN_CERTIFICATE = select(_KEY.expires_ns, _KEY.revoked_ns).where(
    _KEY.tenant == bindparam("tenant"),
    _KEY.application == bindparam("application"),
    _KEY.certificate_sha256 == bindparam("certificate"),
)


@dataclass(frozen=True)
class Principal:
    """A caller who is who they say, and how many requests their tenant may have at once."""

    tenant: str
    application: str
    key_id: str
    certificate_sha256: bytes
    max_concurrent: int


@dataclass(frozen=True)
class CallerCheck:
    """What callers are checked against.

    Attributes:
        site: the trust domain of identities.
        keys: for the HMAC of secrets.
        now_ns: the clock, nanoseconds since the epoch.
    """

    site: str
    keys: SecretKeys
    now_ns: Callable[[], int] = time.time_ns

    def identity(self, principal: Principal) -> str:
        """The URI SAN of a caller."""
        return identity_of(self.site, principal.tenant, principal.application)

    def principal(self, session: Session, caller: control_pb2.Caller) -> Principal:
        """Who `caller` is.

        Raises:
            CloisterError: why this is nobody we know.
        """
        _require(caller)
        presented = PresentedKey.parse(caller.api_key)
        key = session.execute(_BY_ID, {"key_id": presented.key_id}).one_or_none()
        if not presented.matches(key.secret_hmac if key else None, self.keys) or key is None:
            _refuse("API_KEY_INVALID", "the API key is not one of this appliance; check that it was copied whole")
        self._check_in_force(key, "KEY", "API key")
        self._check_certificate(session, key, caller)
        if key.suspended:
            _forbid("TENANT_SUSPENDED", "the tenant is suspended; ask the operator of the appliance")
        return Principal(
            key.tenant, key.application, presented.key_id, caller.certificate_sha256, key.max_concurrent
        )

    def _check_certificate(
        self, session: Session, key: "Row[*tuple[Any, ...]]", caller: control_pb2.Caller
    ) -> None:
        own = {"tenant": key.tenant, "application": key.application, "certificate": caller.certificate_sha256}
        issued = session.execute(_OWN_CERTIFICATE, own).first()
        if issued is None or caller.identity != identity_of(self.site, key.tenant, key.application):
            _forbid(
                "KEY_CERTIFICATE_MISMATCH",
                "API key and client certificate belong to different applications; use the pair issued together",
            )
        self._check_in_force(issued, "CERTIFICATE", "client certificate")

    def _check_in_force(self, key: "Row[*tuple[Any, ...]]", what: str, spoken: str) -> None:
        if key.revoked_ns is not None:
            _refuse(f"{what}_REVOKED", f"the {spoken} was revoked; ask the operator for a new one")
        if key.expires_ns <= self.now_ns():
            _refuse(f"{what}_EXPIRED", f"the {spoken} has expired; ask the operator for a new one")


def claimed_tenant(identity: str) -> str | None:
    """The tenant that a certificate names; for records, it proves nothing about the key."""
    match = _IDENTITY.fullmatch(identity)
    return match[1] if match else None


def _require(caller: control_pb2.Caller) -> None:
    if claimed_tenant(caller.identity) is None or len(caller.certificate_sha256) != 32:
        _refuse("IDENTITY_INVALID", "the client certificate names no application of a tenant")
    if not caller.api_key:
        _refuse("API_KEY_MISSING", "send the API key as metadata `authorization: Bearer KEY`")


def _refuse(code: str, message: str) -> NoReturn:
    raise CloisterError(code, message, grpc.StatusCode.UNAUTHENTICATED)


def _forbid(code: str, message: str) -> NoReturn:
    raise CloisterError(code, message, grpc.StatusCode.PERMISSION_DENIED)
