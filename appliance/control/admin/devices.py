"""DeviceService: the devices there are, and what a model would take of one."""

from typing import Any

from sqlalchemy import select

from appliance.control.admin.models import check_options
from appliance.control.admin.views import device_view, engine_options, plan_view
from appliance.control.db.database import Database
from appliance.control.db.models import Deployment
from appliance.control.deployments import Deployments, files_of
from appliance.control.versions import Versions
from appliance.errors import CloisterError
from appliance.protos import admin_pb2, admin_pb2_grpc
from engine.protos import engine_pb2

_CPU = "cpu"
_LONGEST_ID = 128

# grpc.aio gives servicers a context whose type the generated stubs keep private.
Context = Any


class DeviceService(admin_pb2_grpc.DeviceServiceServicer):
    """Devices and plans, behind the gate.

    Args:
        database: control.db.
        versions: the models and their files.
        deployments: engine-host, which knows devices and memory.
    """

    def __init__(self, database: Database, versions: Versions, deployments: Deployments) -> None:
        self._database = database
        self._versions = versions
        self._deployments = deployments

    async def ListDevices(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.ListDevicesRequest, context: Context
    ) -> admin_pb2.ListDevicesResponse:
        """The CPU first; every deployment runs there, for nothing else has a backend yet."""
        found = await self._deployments.inventory()
        names = await self._database.run(
            lambda s: list(s.scalars(select(Deployment.name).order_by(Deployment.name)))
        )
        return admin_pb2.ListDevicesResponse(
            devices=[device_view(d, names if d.id == _CPU else []) for d in found.devices],
            recorded_from=found.recorded_from,
            nvml=found.nvml,
        )

    async def PlanModel(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.PlanModelRequest, context: Context
    ) -> admin_pb2.PlanModelResponse:
        """What loading a version so would take; nothing is loaded."""
        check_options(request.options)
        if len(request.device) > _LONGEST_ID:
            raise CloisterError("INVALID_DEVICE", "name a device by its id", field="device")
        version = await self._versions.model(request.model_version)
        deployment = engine_pb2.Deployment(files=files_of(version), options=engine_options(request.options))
        plan = await self._deployments.plan(deployment, request.device)
        return admin_pb2.PlanModelResponse(
            model_version=f"{version.name}@{version.version}",
            model_digest=version.model_digest,
            plan=plan_view(plan),
        )
