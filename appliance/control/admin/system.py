"""SystemService: the state of the appliance at one glance."""

from importlib.metadata import version
from typing import Any

from appliance.control.admin import gate
from appliance.control.admin.models import ModelService
from appliance.control.admission.leases import LeaseBook
from appliance.control.audit import AuditLog
from appliance.control.deployments import Deployments
from appliance.control.imports import Imports
from appliance.protos import admin_pb2, admin_pb2_grpc

# grpc.aio gives servicers a context whose type the generated stubs keep private.
Context = Any


class SystemService(admin_pb2_grpc.SystemServiceServicer):
    """What runs and how it is, behind the gate.

    Args:
        models: knows the deployments.
        leases: open leases and the gateway's address.
        log: the audit log.
        imports: the importer.
        deployments: engine-host.
        site: as sealed at init.
        profile: as sealed at init.
        isolation: what separates the processes.
    """

    def __init__(
        self,
        models: ModelService,
        leases: LeaseBook,
        log: AuditLog,
        imports: Imports,
        deployments: Deployments,
        site: str,
        profile: str,
        isolation: str,
    ) -> None:
        self._models = models
        self._leases = leases
        self._log = log
        self._imports = imports
        self._deployments = deployments
        self._site = site
        self._profile = profile
        self._isolation = isolation

    async def GetStatus(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.GetStatusRequest, context: Context
    ) -> admin_pb2.GetStatusResponse:
        """Everything, now."""
        peers = [
            admin_pb2.Peer(name="importer", connected=self._imports.connected),
            admin_pb2.Peer(name="engine-host", connected=self._deployments.connected),
        ]
        return admin_pb2.GetStatusResponse(
            version=version("cloister"),
            gateway_address=self._leases.gateway_address,
            peers=peers,
            deployments=await self._models.deployments(),
            audit_size=self._log.size,
            audit_root=self._log.root,
            open_leases=self._leases.open_leases,
            reserved_tokens=self._leases.reserved_tokens,
            isolation=self._isolation,
            profile=self._profile,
            operator=gate.operator(),
            audit_blocked=self._log.blocked,
            site=self._site,
        )
