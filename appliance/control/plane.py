"""The control plane put together: what is opened, in which order, and how it is closed."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from sqlalchemy.orm import Session

from appliance import policy
from appliance.control import records, recovery
from appliance.control.activation.activations import Activations, Parts
from appliance.control.activation.system_tenant import Issuer
from appliance.control.admin.audit_service import AuditService
from appliance.control.admin.devices import DeviceService
from appliance.control.admin.gate import Gate
from appliance.control.admin.models import ModelService
from appliance.control.admin.system import SystemService
from appliance.control.admin.tenants import TenantService
from appliance.control.admission.leases import LeaseBook
from appliance.control.admission.service import ControlService
from appliance.control.audit import AuditLog
from appliance.control.db.database import Database
from appliance.control.db.models import Meta
from appliance.control.deployments import Deployments
from appliance.control.home import Home
from appliance.control.identity.authority import Authority
from appliance.control.identity.callers import CallerCheck
from appliance.control.identity.secret_keys import SecretKeys
from appliance.control.imports import Imports
from appliance.control.init import audit_origin
from appliance.control.journal import Journal
from appliance.control.limits import Limits
from appliance.control.login import LoginBroker, Sessions
from appliance.control.untold import UntoldEvents
from appliance.control.versions import Versions
from appliance.errors import CloisterError
from appliance.protos import admin_pb2, admin_pb2_grpc, control_pb2, control_pb2_grpc

STOPPED = "CONTROL_STOPPED"
_DRAIN_S = 10.0
_SWEEP_S = 1.0

log = logging.getLogger(__name__)


class ControlPlane:
    """Everything control holds, open. Make it inside the event loop, then `recover`, serve, and `drain`.

    Args:
        home: where it lives; made by `init`.
        isolation: what separates the processes of this appliance.
        limits: what an operator may set.

    Raises:
        CloisterError: NOT_INITIALISED, DATABASE_REVISION_UNKNOWN, or the audit log was tampered with.
    """

    def __init__(self, home: Home, isolation: str = "none", limits: Limits | None = None) -> None:
        if not home.database.exists():
            raise CloisterError(
                "NOT_INITIALISED",
                f"{home.root} is no appliance; run `cloister init` first",
                grpc.StatusCode.FAILED_PRECONDITION,
            )
        self.home = home
        self.limits = limits or Limits()
        self.keys = SecretKeys.load(home.keys)
        self.authority = Authority.load(home.ca)
        self.database = Database(home.database)
        facts = self.database.submit(_facts).result()
        self.site = facts["site"]
        self.journal = Journal(
            AuditLog.open(home.audit_database, home.audit_head, home.audit_key, audit_origin(self.site)),
            self.limits.audit_wait_seconds,
        )
        self.sessions = Sessions()
        self.leases = LeaseBook(self.database, self.journal)
        self.deployments = Deployments(self.database, home.engine_host_socket)
        self.imports = Imports(self.journal, home.importer_socket, self._forget, self._follow_trust)
        self.versions = Versions(self.database, self.imports)
        self.untold = UntoldEvents(self.database, self.journal)
        issuer = Issuer(self.database, self.keys, self.authority, self.leases, self.site)
        canary_s = self.limits.canary_seconds
        self.activations = Activations(
            Parts(self.database, self.deployments, issuer, self.versions, self.journal, self.untold, canary_s)
        )
        self.callers = CallerCheck(self.site, self.keys)
        self.control = ControlService(
            self.database, self.journal, self.keys, self.callers, self.deployments, self.leases
        )
        self._profile, self._isolation = facts["profile"], isolation
        self._tasks: list[asyncio.Task[None]] = []

    async def recover(self, settings: Mapping[str, str] | None = None) -> None:
        """Take over what the control before this one left open; `settings` go on record with the start."""
        await recovery.recover(self.database, self.journal, self.leases, settings or {})

    async def _forget(self, model_digest: str) -> None:
        """A version is in the store no more."""
        await self.versions.forget(model_digest)

    async def _follow_trust(self) -> None:
        """Roots or revocations have changed; a load that was checked before that is recorded before this."""
        async with self.deployments.loading:
            changed = await self.versions.follow_trust()
        if changed:
            await self.deployments.changed()
            await self.untold.tell()

    def begin(self) -> None:
        """Start to follow engine-host and importer, and to sweep; `watch` tells when one of that ends."""
        for work in (self.deployments.run(), self.imports.run(), self._sweep()):
            self._tasks.append(asyncio.create_task(work))

    async def watch(self) -> None:
        """Wait for what `begin` started, none of which ends by itself; for a process that must not outlive it.

        Raises:
            Exception: what ended it.
        """
        ended, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
        raise RuntimeError("a task of control ended that never should")

    def control_server(self) -> grpc.aio.Server:
        """The gateway's server, not yet listening.

        Raises:
            CloisterError: POLICY_INCOMPLETE.
        """
        policy.check_complete(_services(control_pb2))
        server = grpc.aio.server()
        control_pb2_grpc.add_ControlServiceServicer_to_server(self.control, server)
        return server

    def admin_server(self) -> grpc.aio.Server:
        """The operators' server, behind the gate, not yet listening.

        Raises:
            CloisterError: POLICY_INCOMPLETE.
        """
        policy.check_complete(_services(admin_pb2))
        server = grpc.aio.server(interceptors=[Gate(self.sessions, self.journal)])
        models = ModelService(
            self.database, self.imports, self.deployments, self.versions, self.activations, self.untold
        )
        system = SystemService(
            models, self.leases, self.journal.log, self.imports, self.deployments, self.site, self._profile,
            self._isolation,
        )  # fmt: skip
        tenants = TenantService(self.database, self.keys, self.authority, self.leases, self.site, self.limits)
        admin_pb2_grpc.add_SystemServiceServicer_to_server(system, server)
        admin_pb2_grpc.add_ModelServiceServicer_to_server(models, server)
        admin_pb2_grpc.add_TenantServiceServicer_to_server(tenants, server)
        devices = DeviceService(self.database, self.versions, self.deployments)
        admin_pb2_grpc.add_DeviceServiceServicer_to_server(devices, server)
        admin_pb2_grpc.add_AuditServiceServicer_to_server(AuditService(self.journal.log, self.home), server)
        return server

    def login_broker(self) -> LoginBroker:
        """What serves the login socket."""
        return LoginBroker(self.database, self.journal, self.sessions)

    async def drain(self, limit_s: float = _DRAIN_S) -> None:
        """Admit nothing more, wait a while for the gateway to settle, and settle what is left as abandoned."""
        self.control.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.leases.idle.wait(), limit_s)
        left = self.leases.open_leases
        await self.leases.abandon_all(STOPPED)
        try:
            await self.journal.record(records.control_event("stopped", {"leases_left": left}))
        except CloisterError as error:
            log.error("the stop is not recorded", extra={"code": error.code})

    async def close(self) -> None:
        """Close everything; the audit log signs its head."""
        await self.activations.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.imports.close()
        self.database.close()
        await asyncio.to_thread(self.journal.log.close)

    async def _sweep(self) -> None:
        """Once a second: silent gateways, untold deployments. What fails is logged and tried again."""
        chores: tuple[Callable[[], Awaitable[None]], ...] = (
            self.leases.sweep,
            self.deployments.sweep,
            self.untold.tell,
        )
        while True:
            for chore in chores:
                try:
                    await chore()
                except Exception:
                    log.exception("a sweep failed")
            await asyncio.sleep(_SWEEP_S)


def _facts(session: Session) -> dict[str, str]:
    return {name: session.get_one(Meta, name).value for name in ("site", "profile")}


def _services(module: Any) -> list[ServiceDescriptor]:
    return list(module.DESCRIPTOR.services_by_name.values())
