"""DeviceService: the devices there are, and what a model would take of one."""

from typing import Any

from sqlalchemy import select

from appliance.control.admin.models import check_device, check_options
from appliance.control.admin.views import device_view, engine_options, plan_view
from appliance.control.db.database import Database
from appliance.control.db.models import Deployment
from appliance.control.deployments import Deployments, files_of
from appliance.control.versions import Versions
from appliance.protos import admin_pb2, admin_pb2_grpc
from engine.protos import engine_pb2

_CPU = "cpu"

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
        """The CPU first, each with the deployments that are to run on it."""
        found = await self._deployments.inventory()
        rows = await self._database.run(
            lambda s: s.execute(select(Deployment.name, Deployment.options).order_by(Deployment.name)).all()
        )
        places = [(name, _device_of(options)) for name, options in rows]
        return admin_pb2.ListDevicesResponse(
            devices=[device_view(d, [name for name, place in places if place == d.id]) for d in found.devices],
            recorded_from=found.recorded_from,
            nvml=found.nvml,
        )

    async def PlanModel(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.PlanModelRequest, context: Context
    ) -> admin_pb2.PlanModelResponse:
        """What loading a version so would take; nothing is loaded."""
        check_options(request.options)
        check_device(request.device, "device")
        version = await self._versions.model(request.model_version)
        deployment = engine_pb2.Deployment(files=files_of(version), options=engine_options(request.options))
        plan = await self._deployments.plan(deployment, request.device)
        return admin_pb2.PlanModelResponse(
            model_version=f"{version.name}@{version.version}",
            model_digest=version.model_digest,
            plan=plan_view(plan),
        )


def _device_of(options: bytes) -> str:
    """The id of the device that a deployment with these stored options runs on."""
    return engine_pb2.DeploymentOptions.FromString(options).device or _CPU
