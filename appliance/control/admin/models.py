"""ModelService: bundles imported, versions approved, deployed and activated, the store cared for."""

import re
import time
from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy import select

from appliance.control import aliases, counters
from appliance.control.activation import trial
from appliance.control.activation.activations import Activations
from appliance.control.activation.trial import Wanted
from appliance.control.admin import gate
from appliance.control.admin.store_views import (
    import_view,
    progress_view,
    scrub_view,
    store_view,
    trust_view,
    version_view,
)
from appliance.control.admin.views import deployment_view, engine_options, plan_view
from appliance.control.db.database import Database
from appliance.control.db.models import Deployment
from appliance.control.deployments import Deployments, as_engine_has_it, files_of, require_fit
from appliance.control.imports import Imports
from appliance.control.names import LONGEST_DEPLOYMENT, check_name
from appliance.control.untold import UntoldEvents
from appliance.control.versions import Versions, check_reference, check_unused, name_of
from appliance.errors import CloisterError
from appliance.protos import admin_pb2, admin_pb2_grpc
from bundles.protos import importer_pb2

_CHOICES = {
    "backend": ("", "cpu", "native", "torch", "triton", "reference"),
    "dtype": ("", "float32", "bfloat16"),
    "kv_dtype": ("", "float32", "bfloat16", "int8", "float8"),
}
_LONGEST_PATH = 4096
_DEVICE = re.compile(r"[A-Za-z0-9/._-]{0,128}")
_LONGEST_ID = 128
_FINAL = {"committed", "rejected"}

# grpc.aio gives servicers a context whose type the generated stubs keep private.
Context = Any


class ModelService(admin_pb2_grpc.ModelServiceServicer):
    """From a bundle on a medium to an alias, behind the gate.

    Args:
        database: control.db.
        imports: the importer.
        deployments: engine-host.
        versions: where each version stands.
        activations: versions on their way behind an alias.
        untold: tells the audit log what changed besides the call itself.
    """

    def __init__(
        self,
        database: Database,
        imports: Imports,
        deployments: Deployments,
        versions: Versions,
        activations: Activations,
        untold: UntoldEvents,
    ) -> None:
        self._database = database
        self._imports = imports
        self._deployments = deployments
        self._versions = versions
        self._activations = activations
        self._untold = untold

    # Imports

    async def ImportBundle(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.ImportBundleRequest, context: Context
    ) -> AsyncIterator[admin_pb2.ImportBundleResponse]:
        """Progress until the bundle is committed or rejected; the importer goes on if the caller leaves."""
        _check_path(request.path, "the bundle")
        async for progress in self._imports.import_bundle(request.path):
            view = progress_view(progress)
            if view.state in _FINAL:
                gate.note(import_id=view.import_id, state=view.state, import_reason=view.reason)
                gate.note(model_version=view.model_version, model_digest=view.model_digest)
            yield view

    async def OfferVolume(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.OfferVolumeRequest, context: Context
    ) -> admin_pb2.OfferVolumeResponse:
        """Hands the next volume to an import that waits for it."""
        _check_path(request.path, "the volume")
        _check_import(request.import_id)
        await self._imports.offer_volume(request.import_id, request.path)
        return admin_pb2.OfferVolumeResponse()

    async def ListImports(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.ListImportsRequest, context: Context
    ) -> admin_pb2.ListImportsResponse:
        """Newest first."""
        return admin_pb2.ListImportsResponse(imports=map(import_view, await self._imports.imports()))

    async def CancelImport(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.CancelImportRequest, context: Context
    ) -> admin_pb2.CancelImportResponse:
        """Ends a running import; what it verified stays staged."""
        _check_import(request.import_id)
        await self._imports.cancel(request.import_id)
        return admin_pb2.CancelImportResponse()

    # Versions

    async def ListModelVersions(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.ListModelVersionsRequest, context: Context
    ) -> admin_pb2.ListModelVersionsResponse:
        """Oldest first, and where each stands."""
        versions, standing = await self._versions.all()
        return admin_pb2.ListModelVersionsResponse(versions=[version_view(v, standing) for v in versions])

    async def ApproveModelVersion(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.ApproveModelVersionRequest, context: Context
    ) -> admin_pb2.ApproveModelVersionResponse:
        """Takes custodians' signatures; with enough of them the version is approved."""
        version = await self._versions.approve(request.envelope, gate.operator())
        gate.note(model_version=name_of(version), model_digest=version.model_digest)
        await self._untold.tell()
        _, standing = await self._versions.all()
        return admin_pb2.ApproveModelVersionResponse(version=version_view(version, standing))

    async def ActivateModel(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.ActivateModelRequest, context: Context
    ) -> AsyncIterator[admin_pb2.ActivateModelResponse]:
        """Progress until the alias answers with the version, or is back where it was; goes on without a caller."""
        alias = check_name(request.alias, "alias")
        check_options(request.options)
        operator = gate.operator()
        version = await self._versions.runnable(request.model_version, request.accept_licence, operator)
        if request.HasField("options"):
            options = engine_options(request.options).SerializeToString()
        else:
            options = await self._database.run(lambda s: trial.present_options(s, alias))
        wanted = Wanted(trial.ACTIVATION, alias, operator, version, options)
        async for activation in self._carry_out(wanted):
            yield admin_pb2.ActivateModelResponse(activation=activation)

    async def RollbackAlias(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.RollbackAliasRequest, context: Context
    ) -> AsyncIterator[admin_pb2.RollbackAliasResponse]:
        """Progress until the alias answers with the version it had before, loaded again where it is not."""
        alias, operator = check_name(request.alias, "alias"), gate.operator()
        before = await self._database.run(lambda s: trial.earlier(s, alias))
        version = await self._versions.runnable(before.model_digest, False, operator)
        wanted = Wanted(trial.ROLLBACK, alias, operator, version, before.options, before.deployment)
        async for activation in self._carry_out(wanted):
            yield admin_pb2.RollbackAliasResponse(activation=activation)

    async def _carry_out(self, wanted: Wanted) -> AsyncIterator[admin_pb2.Activation]:
        """Every change of an activation; its end goes on record with the call."""
        gate.note(model_version=name_of(wanted.version), model_digest=wanted.version.model_digest)
        last = admin_pb2.Activation()
        async for last in self._activations.begin(wanted).watch():
            yield last
        gate.note(stage=last.stage, deployment=last.deployment, activation_reason=last.reason)

    async def RemoveModelVersion(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.RemoveModelVersionRequest, context: Context
    ) -> admin_pb2.RemoveModelVersionResponse:
        """Forgets a version that nothing runs."""
        version = await self._imports.version(check_reference(request.model_version))
        digest = version.model_digest
        async with self._deployments.loading:  # nothing is deployed between the look and the removal
            await self._database.run(lambda s: check_unused(s, digest))
            removed = await self._imports.remove(digest)
        await self._versions.forget(digest)
        gate.note(model_version=name_of(version), model_digest=digest, freed_bytes=removed.freed_bytes)
        return admin_pb2.RemoveModelVersionResponse(
            model_version=name_of(version), freed_bytes=removed.freed_bytes
        )

    # The store

    async def GetStore(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.GetStoreRequest, context: Context
    ) -> admin_pb2.GetStoreResponse:
        """What it holds, and what its last scrub found."""
        return store_view(await self._imports.store())

    async def ScrubStore(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.ScrubStoreRequest, context: Context
    ) -> AsyncIterator[admin_pb2.ScrubStoreResponse]:
        """Progress until every file was hashed; the importer goes on if the caller leaves."""
        async for progress in self._imports.scrub():
            if progress.ended:
                gate.note(bytes=progress.bytes_done, damaged=[file.sha256 for file in progress.damaged])
            yield scrub_view(progress)

    async def GetTrust(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.GetTrustRequest, context: Context
    ) -> admin_pb2.GetTrustResponse:
        """The trust root, revocations and floors in force."""
        return trust_view(await self._imports.trust())

    # Deployments and aliases

    async def LoadModel(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.LoadModelRequest, context: Context
    ) -> admin_pb2.LoadModelResponse:
        """Keeps the deployment and tells engine-host; it becomes ready later."""
        name, operator = check_name(request.name, "name", LONGEST_DEPLOYMENT), gate.operator()
        check_options(request.options)
        async with self._deployments.loading:
            version = await self._versions.runnable(request.model_version, request.accept_licence, operator)
            row = _deployment(name, version, request.options)
            plan = await self._deployments.plan(as_engine_has_it(row))
            require_fit(plan)
            await self._database.run(lambda s: aliases.keep_deployment(s, row, operator))
            gate.note(model_version=row.model_version, model_digest=row.model_digest)
            await self._deployments.changed(name)
        await self._untold.tell()
        return admin_pb2.LoadModelResponse(
            deployment=deployment_view(row, self._deployments), plan=plan_view(plan)
        )

    async def UnloadModel(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.UnloadModelRequest, context: Context
    ) -> admin_pb2.UnloadModelResponse:
        """Ends a deployment that no alias points at."""
        await self._database.run(lambda s: aliases.remove_deployment(s, request.name))
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
        name, operator = check_name(request.name, "name"), gate.operator()
        await self._database.run(lambda s: aliases.set_alias(s, name, request.deployment, operator))
        await self._untold.tell()
        return admin_pb2.SetAliasResponse()

    async def RemoveAlias(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.RemoveAliasRequest, context: Context
    ) -> admin_pb2.RemoveAliasResponse:
        """The alias is gone; grants of it lie idle until it is set again."""
        operator = gate.operator()
        await self._database.run(lambda s: aliases.remove_alias(s, request.name, operator))
        await self._untold.tell()
        return admin_pb2.RemoveAliasResponse()

    async def ListAliases(  # noqa: N802  # gRPC's name
        self, request: admin_pb2.ListAliasesRequest, context: Context
    ) -> admin_pb2.ListAliasesResponse:
        """By name."""
        rows = await self._database.run(aliases.of_clients)
        return admin_pb2.ListAliasesResponse(
            aliases=[admin_pb2.Alias(name=row.name, deployment=row.deployment) for row in rows]
        )


def check_options(options: admin_pb2.DeploymentOptions) -> None:
    """Refuse a backend or a number type that there is not, and what cannot be the id of a device.

    Raises:
        CloisterError: INVALID_OPTION, INVALID_DEVICE.
    """
    check_device(options.device, "options.device")
    for field, known in _CHOICES.items():
        if getattr(options, field) not in known:
            choices = ", ".join(filter(None, known))
            raise CloisterError(
                "INVALID_OPTION", f"{field} is one of {choices}, or left out", field=f"options.{field}"
            )


def check_device(device: str, field: str) -> None:
    """Refuse what cannot be the id of a device.

    Raises:
        CloisterError: INVALID_DEVICE.
    """
    if not _DEVICE.fullmatch(device):
        raise CloisterError(
            "INVALID_DEVICE", "name a device by its id, as `cloister gpu list` shows it", field=field
        )


def _check_path(path: str, what: str) -> None:
    if not path.startswith("/") or len(path) > _LONGEST_PATH:
        raise CloisterError("INVALID_PATH", f"give the absolute path of {what}", field="path")


def _check_import(import_id: str) -> None:
    if not 0 < len(import_id) <= _LONGEST_ID:
        raise CloisterError("INVALID_IMPORT", "name an import by its id", field="import_id")


def _deployment(name: str, version: importer_pb2.ModelVersion, options: admin_pb2.DeploymentOptions) -> Deployment:
    return Deployment(
        name=name,
        model_version=name_of(version),
        model_digest=version.model_digest,
        files=files_of(version).SerializeToString(),
        options=engine_options(options).SerializeToString(),
        created_ns=time.time_ns(),
        parked=False,
        revoked="",
    )
