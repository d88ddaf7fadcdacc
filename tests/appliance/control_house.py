"""A whole control plane for tests: real databases and sockets; engine-host and importer are small servers."""

import asyncio
import atexit
import functools
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.control.home import Home
from appliance.control.init import Plan, initialise
from appliance.control.plane import ControlPlane
from appliance.errors import CloisterError, from_rpc_error
from appliance.protos import admin_pb2, admin_pb2_grpc, control_pb2, control_pb2_grpc
from bundles.protos import importer_pb2, importer_pb2_grpc
from engine.process import Process
from engine.protos import engine_pb2, engine_pb2_grpc

GENERATE = "/cloister.inference.v1.InferenceService/Generate"
EMBED = "/cloister.inference.v1.InferenceService/Embed"
DIGEST = hashlib.sha256(b"manifest").hexdigest()
CONTEXT = 64
PROMPT = hashlib.sha256(b"the prompt").digest()


class Host(engine_pb2_grpc.HostServiceServicer):
    """An engine-host without engines: what it is told to run is in the state it was told to show."""

    def __init__(self) -> None:
        self.state = engine_pb2.DEPLOYMENT_STATE_READY
        self.plan = engine_pb2.MemoryPlan(
            device="cpu", total_bytes=1, available_bytes=2, fits=True, summary="needs 1"
        )
        self.plan_refusal = ""
        self.calls: list[str] = []
        self.planned: list[engine_pb2.PlanDeploymentRequest] = []
        self.told: list[engine_pb2.ReconcileRequest] = []
        self.changed, self.said = asyncio.Condition(), 0
        self.states: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}
        self.sockets = ("/w.sock", "/t.sock")
        self.fits = lambda _request, _running: True
        self.capabilities = ["generate", "chat"]
        self.derived: engine_pb2.Derived | None = None
        self.refused: engine_pb2.Derived | None = None

    async def GetInventory(self, request: Any, context: Any) -> engine_pb2.GetInventoryResponse:
        cpu = engine_pb2.Device(id="cpu", kind="cpu", name="Example", memory_bytes=2, memory_available_bytes=1)
        return engine_pb2.GetInventoryResponse(devices=[cpu], nvml="none here")

    async def PlanDeployment(self, request: Any, context: Any) -> engine_pb2.PlanDeploymentResponse:
        self.planned.append(request)
        self.calls.append("plan")
        if self.plan_refusal:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.plan_refusal)
        plan = engine_pb2.MemoryPlan()
        plan.CopyFrom(self.plan)
        running = [d.name for d in self.told[-1].deployments] if self.told else []
        plan.fits = self.plan.fits and self.fits(request.deployment, running)
        return engine_pb2.PlanDeploymentResponse(plan=plan)

    async def Reconcile(self, request: engine_pb2.ReconcileRequest, context: Any) -> engine_pb2.ReconcileResponse:
        self.told.append(request)
        self.calls.append("reconcile")
        await self.say()
        return engine_pb2.ReconcileResponse()

    async def WatchDeployments(self, request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            running, heard = self.told[-1].deployments if self.told else (), self.said
            yield engine_pb2.WatchDeploymentsResponse(deployments=map(self._status, running))
            async with self.changed:
                await self.changed.wait_for(lambda heard=heard: self.said != heard)  # also what was said meanwhile

    async def say(self) -> None:
        """Tell control how everything is now."""
        async with self.changed:
            self.said += 1
            self.changed.notify_all()

    def _status(self, deployment: engine_pb2.Deployment) -> engine_pb2.DeploymentStatus:
        return engine_pb2.DeploymentStatus(
            name=deployment.name, state=self.states.get(deployment.name, self.state),
            reason=self.reasons.get(deployment.name, ""), message="because",
            worker_socket=self.sockets[0], text_socket=self.sockets[1],
            max_context_tokens=CONTEXT, capabilities=self.capabilities, model_digest=deployment.files.model_digest,
            derived=self.derived, refused=self.refused,
        )  # fmt: skip


def digest_of(number: int) -> str:
    """The digest of one of the fake importer's versions."""
    return DIGEST if number == 1 else hashlib.sha256(b"manifest %d" % number).hexdigest()


class Importer(importer_pb2_grpc.ImporterServiceServicer):
    """An importer with one version in its store, more if the test adds some, and an outbox that the test fills.

    Attributes:
        approvals: custodians and digest by envelope; any other is refused.
    """

    def __init__(self) -> None:
        self.kind = "model"
        self.versions: list[importer_pb2.ModelVersion] = []
        self.add(1)
        self.outbox: list[importer_pb2.ReadOutboxResponse] = []
        self.acknowledged: list[int] = []
        self.acknowledges = True
        self.offered: list[tuple[str, str]] = []
        self.cancelled: list[str] = []
        self.approvals: dict[bytes, tuple[str, list[str]]] = {}
        self.custodians: list[str] = []

    def add(self, number: int, **fields: Any) -> importer_pb2.ModelVersion:
        """Commit `notes@NUMBER`, which `fields` may change."""
        version = importer_pb2.ModelVersion(
            name="notes", version=str(number), model_digest=digest_of(number), sequence=number,
            files=[importer_pb2.ModelFile(path="config.json", size=2, sha256="ab")], imported_at=number, **fields,
        )  # fmt: skip
        self.versions.append(version)
        return version

    async def ImportBundle(self, request: Any, context: Any) -> AsyncIterator[Any]:
        common = {"import_id": "i1", "model_version": "notes@1", "model_digest": DIGEST}
        yield importer_pb2.ImportBundleResponse(
            state=importer_pb2.IMPORT_STATE_STREAMING, bytes_done=1, bytes_per_second=7, volume_wanted=2, **common
        )
        if "bad" in request.path:
            yield importer_pb2.ImportBundleResponse(
                state=importer_pb2.IMPORT_STATE_REJECTED, reason="CHUNK_DIGEST", **common
            )
        else:
            yield importer_pb2.ImportBundleResponse(state=importer_pb2.IMPORT_STATE_COMMITTED, **common)

    async def OfferVolume(self, request: Any, context: Any) -> importer_pb2.OfferVolumeResponse:
        if "wrong" in request.path:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "VOLUME_ORDER: volume 2 is wanted")
        self.offered.append((request.import_id, request.path))
        return importer_pb2.OfferVolumeResponse()

    async def ListImports(self, request: Any, context: Any) -> importer_pb2.ListImportsResponse:
        progress = importer_pb2.ImportBundleResponse(
            import_id="i1", state=importer_pb2.IMPORT_STATE_STREAMING, volume_wanted=2, volumes=3
        )
        return importer_pb2.ListImportsResponse(
            imports=[
                importer_pb2.Import(path="/media/a", started_ns=10**9, changed_ns=2 * 10**9, progress=progress)
            ]
        )

    async def CancelImport(self, request: Any, context: Any) -> importer_pb2.CancelImportResponse:
        self.cancelled.append(request.import_id)
        return importer_pb2.CancelImportResponse()

    def _all(self) -> list[importer_pb2.ModelVersion]:
        for version in self.versions:
            version.kind = self.kind
        return self.versions

    async def ListModelVersions(self, request: Any, context: Any) -> importer_pb2.ListModelVersionsResponse:
        return importer_pb2.ListModelVersionsResponse(versions=self._all())

    async def GetModelVersion(self, request: Any, context: Any) -> importer_pb2.GetModelVersionResponse:
        for version in reversed(self._all()):
            if request.reference in (version.name, f"{version.name}@{version.version}", version.model_digest):
                return importer_pb2.GetModelVersionResponse(version=version)
        await context.abort(grpc.StatusCode.NOT_FOUND, "no")
        raise AssertionError("aborted")

    async def RemoveModelVersion(self, request: Any, context: Any) -> importer_pb2.RemoveModelVersionResponse:
        self.versions = [v for v in self.versions if v.model_digest != request.reference]
        return importer_pb2.RemoveModelVersionResponse(model_version="notes@1", freed_bytes=5)

    async def VerifyApproval(self, request: Any, context: Any) -> importer_pb2.VerifyApprovalResponse:
        if request.envelope not in self.approvals:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "APPROVAL_INVALID: no custodian signed this")
        digest, custodians = self.approvals[request.envelope]
        return importer_pb2.VerifyApprovalResponse(model_digest=digest, custodians=custodians, threshold=2)

    async def GetTrust(self, request: Any, context: Any) -> importer_pb2.GetTrustResponse:
        role = importer_pb2.TrustRole(name="custodian", threshold=2, keyids=self.custodians)
        return importer_pb2.GetTrustResponse(
            root_version=3, root_expires=9, roles=[role], warnings=["TRUST_STALE"]
        )

    async def GetStore(self, request: Any, context: Any) -> importer_pb2.GetStoreResponse:
        damaged = importer_pb2.DamagedFile(sha256="ab", used_by=["notes@1 config.json"], finding="changed")
        return importer_pb2.GetStoreResponse(bytes=3, files=1, free_bytes=9, damaged=[damaged])

    async def ScrubStore(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield importer_pb2.ScrubStoreResponse(bytes_done=1, bytes_total=2)
        yield importer_pb2.ScrubStoreResponse(bytes_done=2, bytes_total=2, ended=True)

    async def ReadOutbox(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for entry in list(self.outbox):
            yield entry
        await asyncio.Event().wait()

    async def AcknowledgeOutbox(self, request: Any, context: Any) -> importer_pb2.AcknowledgeOutboxResponse:
        if not self.acknowledges:
            await context.abort(grpc.StatusCode.INTERNAL, "lost on the way")
        self.acknowledged.append(request.sequence)
        return importer_pb2.AcknowledgeOutboxResponse()


@dataclass
class House:
    """A home directory and the control plane that runs in it."""

    home: Home
    host: Host = field(default_factory=Host)
    importer: Importer = field(default_factory=Importer)
    plane: Any = None
    control: Any = None
    system: Any = None
    models: Any = None
    tenants: Any = None
    devices: Any = None
    audit: Any = None
    gateway_id: str = "gateway-1"

    def records(self, kind: str = "") -> list[Any]:
        """The audit log's records, parsed."""
        return [r for r in self.plane.journal.log.read(0, 10_000) if r.kind == kind or not kind]

    async def caller(self, tenant: str = "ward", app: str = "summary", **changed: Any) -> control_pb2.Caller:
        """A caller with a key just issued."""
        request = admin_pb2.IssueKeyRequest(tenant=tenant, application=app, csr_pem=csr(), **changed)
        issued = await self.tenants.IssueKey(request)
        certificate = x509.load_pem_x509_certificate(issued.certificate_pem)
        return control_pb2.Caller(
            identity=f"spiffe://test/tenant/{tenant}/app/{app}",
            certificate_sha256=certificate.fingerprint(hashes.SHA256()),
            api_key=issued.api_key,
        )

    async def serving(self, **tenant: Any) -> control_pb2.Caller:
        """Load a model as `notes`, grant it to tenant `ward`, and return a caller of it."""
        await self.models.LoadModel(admin_pb2.LoadModelRequest(model_version="notes", name="notes"))
        await self.models.SetAlias(admin_pb2.SetAliasRequest(name="notes", deployment="notes"))
        wanted = admin_pb2.Tenant(name="ward", models=["notes"], **tenant)
        await self.tenants.AddTenant(admin_pb2.AddTenantRequest(tenant=wanted))
        await self.ready("notes")
        return await self.caller()

    async def ready(self, name: str) -> None:
        """Until control has heard that a deployment is ready."""
        await until(lambda: self.plane.deployments.is_ready(name))

    async def authorize(self, caller: control_pb2.Caller, **changed: Any) -> Any:
        """One Authorize."""
        fields = {"method": GENERATE, "model": "notes", "request_id": str(uuid.uuid4())} | changed
        return await self.control.Authorize(
            control_pb2.AuthorizeRequest(caller=caller, gateway_id=self.gateway_id, **fields)
        )

    async def admit(
        self, caller: control_pb2.Caller, prompt: int = 10, most: int = 20, inputs: int = 0, **changed: Any
    ) -> Any:
        """Authorize and Admit."""
        ticket = (await self.authorize(caller, **changed)).ticket
        return await self.control.Admit(
            control_pb2.AdmitRequest(
                ticket=ticket,
                prompt_tokens=prompt,
                max_tokens=most,
                inputs=inputs,
                prompt_sha256=PROMPT,
                parameters={"temperature": "0"},
            )
        )

    async def settle(self, lease: str, outcome: Any = control_pb2.OUTCOME_COMPLETED, **changed: Any) -> Any:
        """One Settle."""
        fields = {"prompt_tokens": 10, "completion_tokens": 5, "finish_reason": "stop"} | changed
        return await self.control.Settle(control_pb2.SettleRequest(lease=lease, outcome=outcome, **fields))

    async def tenant(self, name: str = "ward") -> Any:
        """A tenant as operators see it."""
        listed = await self.tenants.ListTenants(admin_pb2.ListTenantsRequest())
        return next(t for t in listed.tenants if t.name == name)


async def until(condition: Any) -> None:
    """Until `condition()` holds; pytest's own timeout ends it if it never does."""
    while not condition():
        await asyncio.sleep(0.01)


async def refusal(call: Any) -> CloisterError:
    """The error that a call ends with."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError("the call was answered")


def csr(curve: ec.EllipticCurve | None = None, name: str = "anything at all") -> bytes:
    """A certificate request for a new key."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


async def log_in(home: Home) -> dict[str, str]:
    """What the login socket says to the present user."""
    reader, writer = await asyncio.open_unix_connection(home.login_socket)
    line = await reader.readline()
    writer.close()
    answer: dict[str, str] = json.loads(line)
    return answer


class _UnarySession(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, token: str) -> None:
        self._metadata = (("cloister-session", token),)

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(details._replace(metadata=self._metadata), request)


class _StreamSession(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, token: str) -> None:
        self._metadata = (("cloister-session", token),)

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(details._replace(metadata=self._metadata), request)


def admin_channel(home: Home, token: str) -> grpc.aio.Channel:
    """A channel to the admin socket in a session."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    interceptors = [_UnarySession(token), _StreamSession(token)]
    return grpc.aio.insecure_channel(f"unix:{home.admin_socket}", options, interceptors=interceptors)


def make_home() -> Home:
    """A new home in a short path, as `init` makes it."""
    root = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp")) / "h"
    shutil.copytree(_first_home(), root)
    return Home(root)


@functools.cache
def _first_home() -> Path:
    """Made once in a test run, as `init` makes it; every test gets a copy."""
    folder = tempfile.mkdtemp(prefix="cl-", dir="/tmp")
    atexit.register(shutil.rmtree, folder)
    initialise(Plan(Path(folder) / "h", "alice", os.getuid(), "test", "demo", root=b"{}"))
    return Path(folder) / "h"


@asynccontextmanager
async def running(home: Home, house: House | None = None, begin: bool = True) -> AsyncIterator[House]:
    """A control plane in `home`, with its neighbours, as the process has it."""
    house = house or House(home)
    process = Process("control")
    neighbours = [grpc.aio.server(), grpc.aio.server()]
    engine_pb2_grpc.add_HostServiceServicer_to_server(house.host, neighbours[0])
    importer_pb2_grpc.add_ImporterServiceServicer_to_server(house.importer, neighbours[1])
    process.listen(neighbours[0], home.engine_host_socket)
    process.listen(neighbours[1], home.importer_socket)
    house.plane = ControlPlane(home)
    await house.plane.recover()
    servers = [house.plane.control_server(), house.plane.admin_server()]
    process.listen(servers[0], home.control_socket)
    process.listen(servers[1], home.admin_socket)
    login = await house.plane.login_broker().listen(home.login_socket)
    for server in (*neighbours, *servers):
        await server.start()
    if begin:
        house.plane.begin()
    options = (("grpc.use_local_subchannel_pool", 1),)
    control = grpc.aio.insecure_channel(f"unix:{home.control_socket}", options)
    admin = admin_channel(home, (await log_in(home))["session"])
    house.control = control_pb2_grpc.ControlServiceStub(control)
    house.system = admin_pb2_grpc.SystemServiceStub(admin)
    house.models = admin_pb2_grpc.ModelServiceStub(admin)
    house.tenants = admin_pb2_grpc.TenantServiceStub(admin)
    house.devices = admin_pb2_grpc.DeviceServiceStub(admin)
    house.audit = admin_pb2_grpc.AuditServiceStub(admin)
    try:
        yield house
    finally:
        await control.close()
        await admin.close()
        login.close()
        for server in servers:
            await server.stop(None)
        await house.plane.close()  # before its neighbours: it does not see them go
        for server in neighbours:
            await server.stop(None)


@asynccontextmanager
async def new_house() -> AsyncIterator[House]:
    """A control plane in a home of its own, gone afterwards."""
    home = make_home()
    try:
        async with running(home) as house:
            yield house
    finally:
        shutil.rmtree(home.root.parent)
