"""What operators do: who may, what is on record, what becomes of models, tenants and keys."""

import asyncio
import json
import shutil
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from cryptography import x509

from appliance.control.audit.errors import blocked
from appliance.control.db.models import Operator
from appliance.control.login import LIFE_S
from appliance.policy import Role
from appliance.protos import admin_pb2, admin_pb2_grpc, control_pb2
from bundles.protos import importer_pb2
from engine.protos import engine_pb2
from tests.appliance.control_house import (
    CONTEXT,
    DIGEST,
    House,
    admin_channel,
    csr,
    log_in,
    make_home,
    new_house,
    refusal,
    running,
    until,
)

Code = grpc.StatusCode


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with new_house() as made:
        yield made


def tenant(name: str = "ward", **fields: Any) -> admin_pb2.AddTenantRequest:
    return admin_pb2.AddTenantRequest(tenant=admin_pb2.Tenant(name=name, **fields))


def load(name: str = "notes", version: str = "notes", **options: Any) -> admin_pb2.LoadModelRequest:
    return admin_pb2.LoadModelRequest(
        model_version=version, name=name, options=admin_pb2.DeploymentOptions(**options)
    )


async def test_the_kernel_s_word_for_the_user_makes_a_session_that_names_the_operator(house: House) -> None:
    answer = await log_in(house.home)
    assert set(answer) == {"session", "operator", "expires"}
    assert answer["operator"] == "alice"
    status = await house.system.GetStatus(admin_pb2.GetStatusRequest())
    assert (status.operator, status.profile, status.isolation) == ("alice", "demo", "none")
    assert status.site == house.plane.site != ""
    assert answer["session"].encode() not in b"".join(r.body for r in house.records())


async def test_a_user_who_is_no_operator_is_told_so_and_recorded(house: House) -> None:
    await house.plane.database.run(lambda s: setattr(s.get(Operator, "alice"), "uid", 4_000_000))
    answer = await log_in(house.home)
    assert (answer["error"], set(answer)) == ("OPERATOR_UNKNOWN", {"error", "message"})
    record = house.records("operator.login")[-1]
    assert (record.decision, record.facts["reason"]) == ("deny", "OPERATOR_UNKNOWN")


async def test_a_session_ends_ten_minutes_after_its_last_use(house: House) -> None:
    now = house.plane.sessions._monotonic()
    clock = [now]
    house.plane.sessions._monotonic = lambda: clock[0]
    for _ in range(3):
        clock[0] += LIFE_S - 1
        await house.system.GetStatus(admin_pb2.GetStatusRequest())
    clock[0] += LIFE_S
    error = await refusal(house.system.GetStatus(admin_pb2.GetStatusRequest()))
    assert (error.status, error.code) == (Code.UNAUTHENTICATED, "SESSION_INVALID")


@pytest.mark.parametrize("token", ["", "made-up"])
async def test_without_a_session_no_service_is_reached_and_the_attempt_is_recorded(
    house: House, token: str
) -> None:
    async with admin_channel(house.home, token) as channel:
        error = await refusal(admin_pb2_grpc.TenantServiceStub(channel).AddTenant(tenant()))
    assert (error.status, error.code) == (Code.UNAUTHENTICATED, "SESSION_INVALID")
    assert house.records("operator.refused")[-1].facts["method"].endswith("/AddTenant")
    assert (await house.tenants.ListTenants(admin_pb2.ListTenantsRequest())).tenants == []


async def test_an_auditor_may_read_the_log_and_change_nothing(house: House) -> None:
    await house.plane.database.run(lambda s: setattr(s.get(Operator, "alice"), "roles", Role.AUDITOR.value))
    async with admin_channel(house.home, (await log_in(house.home))["session"]) as channel:
        tenants, audit = admin_pb2_grpc.TenantServiceStub(channel), admin_pb2_grpc.AuditServiceStub(channel)
        models = admin_pb2_grpc.ModelServiceStub(channel)
        for call in (
            tenants.AddTenant(tenant()),
            models.LoadModel(load()),
            models.ImportBundle(admin_pb2.ImportBundleRequest(path="/b")),
        ):
            error = await refusal(call)
            assert (error.status, error.code) == (Code.PERMISSION_DENIED, "ROLE_REQUIRED")
        assert (await audit.VerifyAudit(admin_pb2.VerifyAuditRequest())).intact
    refused = house.records("operator.refused")
    methods = {r.facts["method"].rpartition("/")[2] for r in refused}
    assert methods == {"AddTenant", "LoadModel", "ImportBundle"}
    assert not house.records("operator.change")


async def test_a_change_is_on_record_before_and_after_and_so_is_one_that_failed(house: House) -> None:
    await house.tenants.AddTenant(tenant(models=["notes"]))
    assert (await refusal(house.tenants.AddTenant(tenant()))).code == "TENANT_EXISTS"
    changes = house.records("operator.change")
    assert [(r.phase, r.decision, r.actor) for r in changes] == [
        ("intent", "allow", "alice"), ("outcome", "done", "alice"),
        ("intent", "allow", "alice"), ("outcome", "failed", "alice"),
    ]  # fmt: skip
    assert changes[0].facts["arguments"] == {"tenant": {"name": "ward", "models": ["notes"]}}
    assert changes[0].request_id == changes[1].request_id != changes[2].request_id
    assert changes[3].facts["reason"] == "TENANT_EXISTS"


async def test_while_the_log_takes_no_records_operators_look_and_change_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_record: Any) -> Any:
        raise blocked("the disk is full")

    monkeypatch.setattr(house.plane.journal.log, "append", full)
    error = await refusal(house.tenants.AddTenant(tenant()))
    assert (error.status, error.code) == (Code.UNAVAILABLE, "AUDIT_BLOCKED")
    assert (await house.tenants.ListTenants(admin_pb2.ListTenantsRequest())).tenants == []
    async with admin_channel(house.home, (await log_in(house.home))["session"]) as channel:
        audit = admin_pb2_grpc.AuditServiceStub(channel)
        assert [r.kind async for r in audit.TailAudit(admin_pb2.TailAuditRequest(limit=1))] == [
            "appliance.genesis"
        ]
        assert (await audit.VerifyAudit(admin_pb2.VerifyAuditRequest())).intact


async def test_a_defect_behind_the_gate_tells_the_caller_nothing_and_is_closed_in_the_log(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_work: Any) -> None:
        raise RuntimeError("secret words")

    monkeypatch.setattr(house.plane.database, "run", broken)
    error = await refusal(house.tenants.AddTenant(tenant()))
    assert (error.status, error.code) == (Code.INTERNAL, "INTERNAL")
    assert "secret words" not in error.message
    outcome = house.records("operator.change")[-1]
    assert (outcome.phase, outcome.facts["reason"]) == ("outcome", "INTERNAL")


async def test_what_is_no_name_names_nothing(house: House) -> None:
    for name in ("", "Ward", "-a", "a-", "a_b", "a" * 64, "a/b", "a\n", "ä", "[@click=x]"):
        for call in (
            house.tenants.AddTenant(tenant(name)),
            house.tenants.AddTenant(tenant("ward", models=[name])),
            house.models.LoadModel(load(name)),
            house.models.SetAlias(admin_pb2.SetAliasRequest(name=name, deployment="notes")),
            house.tenants.IssueKey(admin_pb2.IssueKeyRequest(tenant="ward", application=name, csr_pem=csr())),
        ):
            assert (await refusal(call)).code == "INVALID_NAME"
    assert (await house.tenants.ListTenants(admin_pb2.ListTenantsRequest())).tenants == []


async def test_a_tenant_takes_defaults_and_changes_only_where_told(house: House) -> None:
    added = (await house.tenants.AddTenant(tenant(models=["b", "a", "b"]))).tenant
    assert (added.max_concurrent, added.weight, list(added.models)) == (16, 100, ["a", "b"])
    changed = (await house.tenants.SetTenant(admin_pb2.SetTenantRequest(name="ward", weight=5))).tenant
    assert (changed.max_concurrent, changed.weight, list(changed.models)) == (16, 5, ["a", "b"])
    changed = (await house.tenants.SetTenant(admin_pb2.SetTenantRequest(name="ward", set_models=True))).tenant
    assert list(changed.models) == []
    for fields in ({"weight": 1001}, {"weight": 0}, {"max_concurrent": 0}, {"max_concurrent": 5000}):
        error = await refusal(house.tenants.SetTenant(admin_pb2.SetTenantRequest(name="ward", **fields)))
        assert error.code == "INVALID_LIMIT"
    assert (
        await refusal(house.tenants.SetTenant(admin_pb2.SetTenantRequest(name="x")))
    ).code == "TENANT_NOT_FOUND"


async def test_a_key_is_shown_once_and_kept_only_as_a_digest(house: House) -> None:
    await house.tenants.AddTenant(tenant())
    request = admin_pb2.IssueKeyRequest(tenant="ward", application="summary", csr_pem=csr(), valid_days=30)
    issued = await house.tenants.IssueKey(request)
    certificate = x509.load_pem_x509_certificate(issued.certificate_pem)
    days = (certificate.not_valid_after_utc.timestamp() - time.time()) / 86400
    assert round(days) == 30
    assert abs(issued.expires_at.seconds - certificate.not_valid_after_utc.timestamp()) < 60
    (listed,) = (await house.tenants.ListKeys(admin_pb2.ListKeysRequest(tenant="ward"))).keys
    assert (listed.key_id, listed.state, listed.application) == (issued.key_id, "active", "summary")
    await house.tenants.RevokeKey(admin_pb2.RevokeKeyRequest(key_id=issued.key_id))
    (listed,) = (await house.tenants.ListKeys(admin_pb2.ListKeysRequest())).keys
    assert listed.state == "revoked"
    secret = issued.api_key.split("_")[2].encode()
    for path in house.home.root.rglob("*"):
        if path.is_file():
            assert secret not in path.read_bytes(), path


async def test_keys_that_cannot_be_are_refused(house: House) -> None:
    wanted = admin_pb2.IssueKeyRequest(tenant="ward", application="summary", csr_pem=csr())
    assert (await refusal(house.tenants.IssueKey(wanted))).code == "TENANT_NOT_FOUND"
    await house.tenants.AddTenant(tenant())
    wanted.valid_days = 10_000
    assert (await refusal(house.tenants.IssueKey(wanted))).code == "INVALID_LIMIT"
    wanted.valid_days, wanted.csr_pem = 1, b"nonsense"
    assert (await refusal(house.tenants.IssueKey(wanted))).code == "INVALID_CSR"
    assert (await refusal(house.tenants.RevokeKey(admin_pb2.RevokeKeyRequest(key_id="x")))).code == "KEY_NOT_FOUND"


async def test_a_loaded_model_reaches_engine_host_with_its_files_and_shows_its_state(house: House) -> None:
    house.host.state = engine_pb2.DEPLOYMENT_STATE_LOADING
    loaded = (await house.models.LoadModel(load(backend="cpu", deterministic=True, threads=2))).deployment
    assert (loaded.model_version, loaded.model_digest) == ("notes@1", DIGEST)
    await until(lambda: house.host.told and house.host.told[-1].deployments)
    (told,) = house.host.told[-1].deployments
    assert (told.name, told.files.model_digest) == ("notes", DIGEST)
    assert [(f.path, f.size, f.sha256) for f in told.files.files] == [("config.json", 2, "ab")]
    assert (told.options.backend, told.options.deterministic, told.options.threads) == ("cpu", True, 2)

    async def shown() -> admin_pb2.Deployment:
        (only,) = (await house.models.ListDeployments(admin_pb2.ListDeploymentsRequest())).deployments
        return only

    assert (await shown()).state == "loading"
    house.host.state = engine_pb2.DEPLOYMENT_STATE_READY
    await house.host.say()
    await house.ready("notes")
    ready = await shown()
    assert (ready.state, ready.max_context_tokens, ready.options.threads) == ("ready", CONTEXT, 2)
    await house.models.UnloadModel(admin_pb2.UnloadModelRequest(name="notes"))
    assert list(house.host.told[-1].deployments) == []
    assert (await house.models.ListDeployments(admin_pb2.ListDeploymentsRequest())).deployments == []


async def test_desired_deployments_outlive_control_and_engine_host() -> None:
    home = make_home()
    try:
        async with running(home) as first:
            await first.models.LoadModel(load())
        async with running(home, begin=False) as before:
            assert (await refusal(before.models.LoadModel(load("more")))).code == "ENGINE_HOST_UNAVAILABLE"
            (waiting,) = (await before.models.ListDeployments(admin_pb2.ListDeploymentsRequest())).deployments
            assert waiting.state == "waiting for engine-host"
            assert before.host.told == []
        async with running(home) as after:
            await after.ready("notes")
            assert [d.name for d in after.host.told[0].deployments] == ["notes"]
    finally:
        shutil.rmtree(home.root.parent)


async def test_a_load_that_cannot_be_is_refused_and_tells_nobody(house: House) -> None:
    for request, code in (
        (load(version="nothing"), "VERSION_NOT_FOUND"),
        (load(version=""), "INVALID_REFERENCE"),
        (load(name="a" * 33), "INVALID_NAME"),
        (load(backend="abacus"), "INVALID_OPTION"),
        (load(dtype="int3"), "INVALID_OPTION"),
        (load(kv_dtype="int3"), "INVALID_OPTION"),
    ):
        assert (await refusal(house.models.LoadModel(request))).code == code
    assert all(not told.deployments for told in house.host.told)


async def test_only_a_model_can_be_loaded_by_itself(house: House) -> None:
    house.importer.kind = "adapter"
    error = await refusal(house.models.LoadModel(load()))
    assert (error.status, error.code) == (Code.FAILED_PRECONDITION, "KIND_NOT_LOADABLE")


async def test_an_alias_points_at_what_is_there_and_keeps_it_there(house: House) -> None:
    alias = admin_pb2.SetAliasRequest(name="notes", deployment="notes")
    assert (await refusal(house.models.SetAlias(alias))).code == "DEPLOYMENT_NOT_FOUND"
    await house.models.LoadModel(load())
    await house.models.LoadModel(load("second"))
    await house.models.SetAlias(alias)
    unload = admin_pb2.UnloadModelRequest(name="notes")
    assert (await refusal(house.models.UnloadModel(unload))).code == "DEPLOYMENT_IN_USE"
    await house.models.SetAlias(admin_pb2.SetAliasRequest(name="notes", deployment="second"))
    (listed,) = (await house.models.ListAliases(admin_pb2.ListAliasesRequest())).aliases
    assert (listed.name, listed.deployment) == ("notes", "second")
    await house.models.UnloadModel(unload)
    assert (await refusal(house.models.UnloadModel(unload))).code == "DEPLOYMENT_NOT_FOUND"
    await house.models.RemoveAlias(admin_pb2.RemoveAliasRequest(name="notes"))
    error = await refusal(house.models.RemoveAlias(admin_pb2.RemoveAliasRequest(name="notes")))
    assert error.code == "ALIAS_NOT_FOUND"


@pytest.mark.parametrize(("path", "state"), [("/media/good", "committed"), ("/media/bad", "rejected")])
async def test_an_import_tells_its_progress_and_its_end_is_on_record(house: House, path: str, state: str) -> None:
    stream = house.models.ImportBundle(admin_pb2.ImportBundleRequest(path=path))
    assert [p.state async for p in stream] == ["streaming", state]
    intent, outcome = house.records("operator.change")
    assert intent.facts["arguments"] == {"path": path}
    assert (outcome.actor, outcome.facts["state"], outcome.facts["model_digest"]) == ("alice", state, DIGEST)


async def test_a_relative_path_is_no_bundle(house: House) -> None:
    error = await refusal(house.models.ImportBundle(admin_pb2.ImportBundleRequest(path="bundle")))
    assert error.code == "INVALID_PATH"


async def test_an_importer_that_is_away_is_named(house: House) -> None:
    house.plane.imports._importer.ListModelVersions = _away
    error = await refusal(house.models.ListModelVersions(admin_pb2.ListModelVersionsRequest()))
    assert (error.status, error.code) == (Code.UNAVAILABLE, "IMPORTER_UNAVAILABLE")


async def _away(*_args: Any, **_kwargs: Any) -> None:
    channel = grpc.aio.insecure_channel("unix:/nonexistent/socket")
    await channel.unary_unary("/a.b/C")(b"")


def entries(*sequences: int) -> list[importer_pb2.ReadOutboxResponse]:
    return [
        importer_pb2.ReadOutboxResponse(
            sequence=n, import_id="i1", state=importer_pb2.IMPORT_STATE_SIGNED, model_version="notes@1", utc_ns=n
        )
        for n in sequences
    ]


async def test_every_state_of_an_import_is_copied_once_even_if_its_acknowledgement_is_lost() -> None:
    home = make_home()
    try:
        house = House(home)
        house.importer.outbox, house.importer.acknowledges = entries(1, 2), False
        async with running(home, house):
            await until(lambda: house.records("bundle.state"))
        house.importer.acknowledges = True
        async with running(home, house):
            await until(lambda: house.importer.acknowledged == [1, 2])
            copied = house.records("bundle.state")
            assert [(r.decision, r.facts["outbox_sequence"]) for r in copied] == [("signed", 1), ("signed", 2)]
    finally:
        shutil.rmtree(home.root.parent)


async def test_the_log_is_read_in_order_and_followed(house: House) -> None:
    stream = house.audit.TailAudit(admin_pb2.TailAuditRequest(follow=True))
    first = await stream.read()
    assert (first.sequence, first.kind) == (1, "appliance.genesis")
    assert json.loads(first.body_json)["facts"]["site"] == "test"
    await house.tenants.AddTenant(tenant("followed"))
    async for record in stream:
        if record.kind == "operator.change" and record.phase == "outcome":
            break
    stream.cancel()
    page = [r.sequence async for r in house.audit.TailAudit(admin_pb2.TailAuditRequest(after_sequence=1, limit=2))]
    assert page == [2, 3]
    assert "TailAudit" in str(house.records("operator.read")[0].facts["method"])


async def test_status_shows_what_runs_and_what_is_open(house: House) -> None:
    caller = await house.serving()
    await house.control.Heartbeat(control_pb2.HeartbeatRequest(gateway_id="g", address="127.0.0.1:9"))
    await house.admit(caller, request_id=str(uuid.uuid4()))
    await house.models.ListModelVersions(admin_pb2.ListModelVersionsRequest())
    status = await house.system.GetStatus(admin_pb2.GetStatusRequest())
    assert {p.name: p.connected for p in status.peers} == {"importer": True, "engine-host": True}
    assert (status.gateway_address, status.open_leases, status.reserved_tokens) == ("127.0.0.1:9", 1, 30)
    assert [d.state for d in status.deployments] == ["ready"]
    verdict = await house.audit.VerifyAudit(admin_pb2.VerifyAuditRequest())
    assert (verdict.intact, verdict.open_intents) == (True, 1)
    assert status.audit_size < verdict.size


async def test_an_operator_who_leaves_in_the_middle_stops_no_change_and_leaves_no_open_intent(
    house: House,
) -> None:
    call = house.tenants.AddTenant(tenant())
    await until(lambda: house.records("operator.change"))
    call.cancel()
    await until(lambda: [r for r in house.records("operator.change") if r.phase == "outcome"])
    assert [t.name for t in (await house.tenants.ListTenants(admin_pb2.ListTenantsRequest())).tenants] == ["ward"]
    stream = house.models.ImportBundle(admin_pb2.ImportBundleRequest(path="/media/good"))
    await stream.read()
    stream.cancel()
    await until(lambda: not house.plane.journal.log.open_intents())
    await asyncio.sleep(0)
