"""ModelService: bundles imported, versions deployed, aliases pointed at deployments."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from sqlalchemy import select
from sqlalchemy.orm import Session

from appliance.control import counters
from appliance.control.admin import gate
from appliance.control.admin.views import deployment_view, engine_options, plan_view, progress_view, version_view
from appliance.control.db.database import Database
from appliance.control.db.models import Alias, Deployment
from appliance.control.deployments import Deployments, as_engine_has_it
from appliance.control.imports import Imports
from appliance.control.names import LONGEST_DEPLOYMENT, check_name
from appliance.errors import CloisterError
from appliance.protos import admin_pb2, admin_pb2_grpc
from bundles.protos import importer_pb2
from engine.protos import engine_pb2

_BACKENDS = ("", "reference", "cpu")
_DTYPES = ("", "float32", "bfloat16")
_LONGEST_PATH = 4096
_LONGEST_REFERENCE = 256
_FINAL = {"committed", "rejected"}

# grpc.aio gives servicers a context whose type the generated stubs keep private.
Context = Any


class ModelService(admin_pb2_grpc.ModelServiceServicer):
    """From a bundle on a medium to an alias, behind the gate.

    Args:
        database: control.db.
        imports: the importer.
        deployments: engine-host.
    """

    def __init__(self, database: Database, imports: Imports, deployments: Deployments) -> None:
        self._database = database
        self._imports = imports
        self._deployments = deployments
        self._loading = asyncio.Lock()

    async def ImportBundle(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.ImportBundleRequest, context: Context
    ) -> AsyncIterator[admin_pb2.ImportBundleResponse]:
        """Progress until the bundle is committed or rejected; the importer goes on if the caller leaves."""
        if not request.path.startswith("/") or len(request.path) > _LONGEST_PATH:
            raise CloisterError("INVALID_PATH", "give the absolute path of the bundle", field="path")
        async for progress in self._imports.import_bundle(request.path):
            view = progress_view(progress)
            if view.state in _FINAL:
                gate.note(import_id=view.import_id, state=view.state, import_reason=view.reason)
                gate.note(model_version=view.model_version, model_digest=view.model_digest)
            yield view

    async def ListModelVersions(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.ListModelVersionsRequest, context: Context
    ) -> admin_pb2.ListModelVersionsResponse:
        """Oldest first."""
        versions = await self._imports.versions()
        return admin_pb2.ListModelVersionsResponse(versions=map(version_view, versions))

    async def LoadModel(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.LoadModelRequest, context: Context
    ) -> admin_pb2.LoadModelResponse:
        """Keeps the deployment and tells engine-host; it becomes ready later."""
        name = check_name(request.name, "name", LONGEST_DEPLOYMENT)
        check_options(request.options)
        version = await model_named(self._imports, request.model_version)
        row = _deployment(name, version, request.options)
        async with self._loading:  # engine-host knows what one load is promised before it plans the next
            plan = await self._deployments.plan(as_engine_has_it(row))
            _require_fit(plan)
            await self._database.run(lambda s: _keep(s, row))
            gate.note(model_version=row.model_version, model_digest=row.model_digest)
            await self._deployments.changed(name)
        return admin_pb2.LoadModelResponse(
            deployment=deployment_view(row, self._deployments), plan=plan_view(plan)
        )

    async def UnloadModel(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.UnloadModelRequest, context: Context
    ) -> admin_pb2.UnloadModelResponse:
        """Ends a deployment that no alias points at."""
        await self._database.run(lambda s: _remove_deployment(s, request.name))
        await self._deployments.changed()
        return admin_pb2.UnloadModelResponse()

    async def ListDeployments(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.ListDeploymentsRequest, context: Context
    ) -> admin_pb2.ListDeploymentsResponse:
        """By name, with their states."""
        return admin_pb2.ListDeploymentsResponse(deployments=await self.deployments())

    async def deployments(self) -> list[admin_pb2.Deployment]:
        """Every deployment as operators see it, by name."""
        rows = await self._database.run(lambda s: s.scalars(select(Deployment).order_by(Deployment.name)).all())
        told = await counters.ask({row.name: self._deployments.worker_socket(row.name) for row in rows})
        return [deployment_view(row, self._deployments, told.get(row.name)) for row in rows]

    async def SetAlias(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.SetAliasRequest, context: Context
    ) -> admin_pb2.SetAliasResponse:
        """Points an alias at a deployment; requests admitted from now on go there."""
        name = check_name(request.name, "name")
        await self._database.run(lambda s: _set_alias(s, name, request.deployment))
        return admin_pb2.SetAliasResponse()

    async def RemoveAlias(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.RemoveAliasRequest, context: Context
    ) -> admin_pb2.RemoveAliasResponse:
        """The alias is gone; grants of it lie idle until it is set again."""
        await self._database.run(lambda s: _remove_alias(s, request.name))
        return admin_pb2.RemoveAliasResponse()

    async def ListAliases(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.ListAliasesRequest, context: Context
    ) -> admin_pb2.ListAliasesResponse:
        """By name."""
        rows = await self._database.run(lambda s: s.scalars(select(Alias).order_by(Alias.name)).all())
        return admin_pb2.ListAliasesResponse(
            aliases=[admin_pb2.Alias(name=row.name, deployment=row.deployment) for row in rows]
        )


async def model_named(imports: Imports, reference: str) -> importer_pb2.ModelVersion:
    """The model version that `reference` names.

    Raises:
        CloisterError: INVALID_REFERENCE, VERSION_NOT_FOUND, NOT_A_MODEL, IMPORTER_UNAVAILABLE.
    """
    if not 0 < len(reference) <= _LONGEST_REFERENCE:
        raise CloisterError("INVALID_REFERENCE", "name a model version", field="model_version")
    version = await imports.version(reference)
    if version.kind != "model":
        raise CloisterError(
            "NOT_A_MODEL",
            "this bundle is no model of its own; load the model it belongs to",
            grpc.StatusCode.FAILED_PRECONDITION,
            {"kind": version.kind},
            field="model_version",
        )
    return version


def _require_fit(plan: engine_pb2.MemoryPlan) -> None:
    """Refuse a plan that does not fit.

    Raises:
        CloisterError: OUT_OF_MEMORY, with the numbers.
    """
    if not plan.fits:
        raise CloisterError(
            "OUT_OF_MEMORY",
            f"{plan.summary}; {plan.advice}",
            grpc.StatusCode.FAILED_PRECONDITION,
            {"total_bytes": str(plan.total_bytes), "available_bytes": str(plan.available_bytes)},
            field="options",
        )


def check_options(options: admin_pb2.DeploymentOptions) -> None:
    """Refuse a backend or a number type that there is not.

    Raises:
        CloisterError: INVALID_OPTION.
    """
    for field, value, known in (("backend", options.backend, _BACKENDS), ("dtype", options.dtype, _DTYPES)):
        if value not in known:
            choices = ", ".join(filter(None, known))
            raise CloisterError(
                "INVALID_OPTION", f"{field} is one of {choices}, or left out", field=f"options.{field}"
            )


def files_of(version: importer_pb2.ModelVersion) -> engine_pb2.FileSet:
    """The files of a version as the engine has them."""
    files = [engine_pb2.File(path=f.path, size=f.size, sha256=f.sha256) for f in version.files]
    return engine_pb2.FileSet(model_digest=version.model_digest, files=files)


def _deployment(name: str, version: importer_pb2.ModelVersion, options: admin_pb2.DeploymentOptions) -> Deployment:
    return Deployment(
        name=name,
        model_version=f"{version.name}@{version.version}",
        model_digest=version.model_digest,
        files=files_of(version).SerializeToString(),
        options=engine_options(options).SerializeToString(),
        created_ns=time.time_ns(),
    )


def _keep(session: Session, row: Deployment) -> None:
    session.merge(row)


def _remove_deployment(session: Session, name: str) -> None:
    row = _existing(session, name, "name")
    aliases = session.scalars(select(Alias.name).where(Alias.deployment == name).order_by(Alias.name)).all()
    if aliases:
        raise CloisterError(
            "DEPLOYMENT_IN_USE",
            f"aliases point at it: {', '.join(aliases)}; remove them or point them elsewhere first",
            grpc.StatusCode.FAILED_PRECONDITION,
        )
    session.delete(row)


def _set_alias(session: Session, name: str, deployment: str) -> None:
    _existing(session, deployment, "deployment")
    session.merge(Alias(name=name, deployment=deployment))


def _remove_alias(session: Session, name: str) -> None:
    row = session.get(Alias, name)
    if row is None:
        raise CloisterError(
            "ALIAS_NOT_FOUND",
            "there is no such alias; `cloister alias list` names them",
            grpc.StatusCode.NOT_FOUND,
            field="name",
        )
    session.delete(row)


def _existing(session: Session, name: str, field: str) -> Deployment:
    row = session.get(Deployment, name)
    if row is None:
        raise CloisterError(
            "DEPLOYMENT_NOT_FOUND",
            "there is no such deployment; `cloister model list` names them",
            grpc.StatusCode.NOT_FOUND,
            field=field,
        )
    return row
