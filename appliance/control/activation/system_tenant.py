"""The tenant `system`: the appliance itself as a client of its own gateway, with a key that lives in memory.

What it sends is authorized, audited and metered like anybody's. Nobody issues it a key: one is drawn for each
trial, certified by control's own authority, and revoked when the trial ends or control starts anew.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta

import grpc
from cryptography.hazmat.primitives import serialization
from sqlalchemy import update
from sqlalchemy.orm import Session

from appliance.client.aio import AsyncClient
from appliance.client.enrol import make_csr
from appliance.control.admission.leases import LeaseBook
from appliance.control.db.database import Database
from appliance.control.db.models import ApiKey, Tenant
from appliance.control.identity import api_keys
from appliance.control.identity.authority import Authority, identity_of
from appliance.control.identity.secret_keys import SecretKeys
from appliance.control.names import SYSTEM_TENANT
from appliance.errors import CloisterError

_APPLICATION = "canary"
_VALID = timedelta(days=1)
_GATEWAY_WITHIN_S = 30.0
_LOOK_AGAIN_S = 0.1
_REACH_S = 2.0
_MAX_CONCURRENT = 4
_WEIGHT = 100


@dataclass(frozen=True)
class Issuer:
    """What a client of the appliance is made from.

    Attributes:
        database: control.db.
        keys: the pepper of API keys.
        authority: signs client certificates.
        leases: knows where the gateway listens.
        site: trust domain of identities.
    """

    database: Database
    keys: SecretKeys
    authority: Authority
    leases: LeaseBook
    site: str

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        """A client of tenant `system`, over mutual TLS to the gateway's address like any other's.

        Raises:
            CloisterError: GATEWAY_UNAVAILABLE.
        """
        address = await self._address()
        private, csr = make_csr(SYSTEM_TENANT, _APPLICATION)
        identity = identity_of(self.site, SYSTEM_TENANT, _APPLICATION)
        certificate = self.authority.issue_client(csr, identity, _VALID)
        drawn = api_keys.draw(self.keys)
        row = drawn.row(SYSTEM_TENANT, _APPLICATION, certificate, _VALID)
        await self.database.run(lambda s: s.add(row))
        try:
            async with AsyncClient(
                address,
                ca=self.authority.certificate_pem,
                certificate=certificate.public_bytes(serialization.Encoding.PEM),
                key=private,
                api_key=drawn.text,
            ) as client:
                yield client
        finally:
            await self.database.run(revoke_all)

    async def _address(self) -> str:
        """Where this machine reaches the gateway: as clients are told, or else on the loopback interface."""
        end = time.monotonic() + _GATEWAY_WITHIN_S
        while time.monotonic() < end:
            told = self.leases.gateway_address
            port = told.rpartition(":")[2]
            for address in (told, f"127.0.0.1:{port}", f"[::1]:{port}") if told else ():
                if await _answers(address):
                    return address
            await asyncio.sleep(_LOOK_AGAIN_S)
        raise CloisterError(
            "GATEWAY_UNAVAILABLE",
            "canaries go through the gateway, and it is not reached at its address; look at its log",
            grpc.StatusCode.UNAVAILABLE,
        )


def ensure_tenant(session: Session) -> None:
    """Make the tenant when it is first needed."""
    if session.get(Tenant, SYSTEM_TENANT) is None:
        tenant = Tenant(
            name=SYSTEM_TENANT,
            max_concurrent=_MAX_CONCURRENT,
            weight=_WEIGHT,
            suspended=False,
            created_ns=time.time_ns(),
            tokens_used=0,
        )
        session.add(tenant)
        session.flush()


def revoke_all(session: Session) -> None:
    """No key of the tenant is in force any more; trials come one after the other."""
    session.execute(
        update(ApiKey)
        .where(ApiKey.tenant == SYSTEM_TENANT, ApiKey.revoked_ns.is_(None))
        .values(revoked_ns=time.time_ns())
    )


async def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        connecting = asyncio.open_connection(host.strip("[]"), int(port))
        _, writer = await asyncio.wait_for(connecting, _REACH_S)
    except (OSError, ValueError, TimeoutError):
        return False
    writer.close()
    return True
