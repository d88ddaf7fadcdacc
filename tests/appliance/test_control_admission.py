"""The way of a request through control: who gets in, what is reserved, and what is on record afterwards."""

import asyncio
import uuid
from collections.abc import AsyncIterator

import grpc
import pytest

from appliance.control.admission.leases import SILENCE_S
from appliance.control.admission.tickets import LIFE_S
from appliance.protos import admin_pb2, control_pb2
from engine.protos import engine_pb2
from tests.appliance.control_house import (
    CONTEXT,
    DIGEST,
    GENERATE,
    PROMPT,
    House,
    new_house,
    refusal,
    until,
)

Code = grpc.StatusCode


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with new_house() as made:
        yield made


async def test_a_request_is_authorised_admitted_recorded_and_settled(house: House) -> None:
    caller = await house.serving(max_concurrent=6)
    request_id = str(uuid.uuid4())
    where = await house.authorize(caller, request_id=request_id)
    assert (where.deployment, where.model_digest, where.max_context_tokens) == ("notes", DIGEST, CONTEXT)
    assert (where.text_socket, where.worker_socket) == ("/t.sock", "/w.sock")
    assert (where.scope, where.max_concurrent) == (house.plane.keys.scope("ward"), 6)
    admitted = await house.control.Admit(
        control_pb2.AdmitRequest(ticket=where.ticket, prompt_tokens=10, max_tokens=20, prompt_sha256=PROMPT)
    )
    tenant = await house.tenant()
    assert (tenant.tokens_reserved, tenant.requests_open) == (30, 1)
    intent = await house.control.AwaitIntent(control_pb2.AwaitIntentRequest(lease=admitted.lease))
    settled = await house.settle(admitted.lease)
    records = {r.phase: r for r in house.records("inference.request")}
    assert (records["intent"].sequence, records["outcome"].sequence) == (
        intent.audit_sequence, settled.audit_sequence,
    )  # fmt: skip
    assert records["outcome"].leaf_hash == settled.leaf_hash
    assert records["intent"].request_id == records["outcome"].request_id == f"ward/{request_id}"
    assert (records["intent"].decision, records["outcome"].decision) == ("allow", "completed")
    assert records["intent"].actor == caller.identity
    tenant = await house.tenant()
    assert (tenant.tokens_used, tenant.tokens_reserved) == (15, 0)


async def test_scope_and_salt_are_stable_for_a_tenant_and_tell_tenants_apart(house: House) -> None:
    caller = await house.serving()
    await house.tenants.AddTenant(
        admin_pb2.AddTenantRequest(tenant=admin_pb2.Tenant(name="claims", models=["notes"], weight=7))
    )
    first, again = await house.admit(caller), await house.admit(caller)
    other = await house.admit(await house.caller("claims"))
    assert (first.scope, first.salt) == (again.scope, again.salt)
    assert first.scope != other.scope
    assert first.salt != other.salt
    assert "ward" not in first.scope
    assert (first.weight, other.weight) == (100, 7)


async def test_the_prompt_is_on_record_only_under_the_salt(house: House) -> None:
    lease = (await house.admit(await house.serving())).lease
    await house.control.AwaitIntent(control_pb2.AwaitIntentRequest(lease=lease))
    bodies = b"".join(r.body for r in house.records())
    assert PROMPT.hex().encode() not in bodies
    assert house.plane.keys.prompt_mac(PROMPT).encode() in bodies


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"api_key": ""}, Code.UNAUTHENTICATED, "API_KEY_MISSING"),
        ({"api_key": "clo_nobody_x_0"}, Code.UNAUTHENTICATED, "API_KEY_INVALID"),
        ({"identity": "spiffe://test/tenant/ward"}, Code.UNAUTHENTICATED, "IDENTITY_INVALID"),
        ({"identity": "spiffe://test/tenant/ward/app/other"}, Code.PERMISSION_DENIED, "KEY_CERTIFICATE_MISMATCH"),
        (
            {"identity": "spiffe://else/tenant/ward/app/summary"},
            Code.PERMISSION_DENIED,
            "KEY_CERTIFICATE_MISMATCH",
        ),
        ({"certificate_sha256": b"x" * 32}, Code.PERMISSION_DENIED, "KEY_CERTIFICATE_MISMATCH"),
    ],
)
async def test_who_is_not_known_is_refused_and_on_record(
    house: House, change: dict[str, object], status: grpc.StatusCode, code: str
) -> None:
    caller = await house.serving()
    for name, value in change.items():
        setattr(caller, name, value)
    error = await refusal(house.authorize(caller))
    assert (error.status, error.code) == (status, code)
    (record,) = house.records("inference.refused")
    assert (record.decision, record.facts["reason"]) == ("deny", code)


async def test_a_wrong_secret_and_an_unknown_id_are_told_in_the_same_words(house: House) -> None:
    import zlib

    caller = await house.serving()

    def altered(key_id: str, secret: str) -> control_pb2.Caller:
        body = f"clo_{key_id}_{secret}"
        changed = control_pb2.Caller(api_key=f"{body}_{zlib.crc32(body.encode()):08x}")
        return control_pb2.Caller(
            identity=caller.identity, certificate_sha256=caller.certificate_sha256, api_key=changed.api_key
        )

    _, key_id, secret, _ = caller.api_key.split("_")
    wrong = await refusal(house.authorize(altered(key_id, "a" * 52)))
    unknown = await refusal(house.authorize(altered("0" * 12, secret)))
    assert (wrong.code, wrong.message) == (unknown.code, unknown.message)
    assert wrong.code == "API_KEY_INVALID"


async def test_a_key_of_one_tenant_under_the_certificate_of_another_is_refused(house: House) -> None:
    caller = await house.serving()
    await house.tenants.AddTenant(
        admin_pb2.AddTenantRequest(tenant=admin_pb2.Tenant(name="claims", models=["notes"]))
    )
    other = await house.caller("claims")
    caller.identity, caller.certificate_sha256 = other.identity, other.certificate_sha256
    error = await refusal(house.authorize(caller))
    assert (error.status, error.code) == (Code.PERMISSION_DENIED, "KEY_CERTIFICATE_MISMATCH")


async def test_a_revoked_key_and_an_expired_one_are_refused(house: House) -> None:
    caller = await house.serving()
    object.__setattr__(house.plane.callers, "now_ns", lambda: 2**62)
    assert (await refusal(house.authorize(caller))).code == "KEY_EXPIRED"
    await house.tenants.RevokeKey(admin_pb2.RevokeKeyRequest(key_id=caller.api_key.split("_")[1]))
    error = await refusal(house.authorize(caller))
    assert (error.status, error.code) == (Code.UNAUTHENTICATED, "KEY_REVOKED")


async def test_a_new_key_does_not_bring_a_revoked_certificate_back(house: House) -> None:
    old = await house.serving()
    new = await house.caller()
    await house.tenants.RevokeKey(admin_pb2.RevokeKeyRequest(key_id=old.api_key.split("_")[1]))
    new.certificate_sha256 = old.certificate_sha256
    assert (await refusal(house.authorize(new))).code == "CERTIFICATE_REVOKED"


async def test_a_key_revoked_between_authorize_and_admit_is_not_admitted(house: House) -> None:
    caller = await house.serving()
    where = await house.authorize(caller)
    await house.tenants.RevokeKey(admin_pb2.RevokeKeyRequest(key_id=caller.api_key.split("_")[1]))
    error = await refusal(
        house.control.Admit(control_pb2.AdmitRequest(ticket=where.ticket, prompt_tokens=1, max_tokens=1))
    )
    assert error.code == "KEY_REVOKED"


async def test_a_suspended_tenant_is_refused_until_it_is_resumed(house: House) -> None:
    caller = await house.serving()
    await house.tenants.SuspendTenant(admin_pb2.SuspendTenantRequest(name="ward"))
    error = await refusal(house.authorize(caller))
    assert (error.status, error.code) == (Code.PERMISSION_DENIED, "TENANT_SUSPENDED")
    await house.tenants.SuspendTenant(admin_pb2.SuspendTenantRequest(name="ward", resume=True))
    await house.authorize(caller)


async def test_an_unknown_model_and_one_not_granted_look_the_same_and_are_not_listed(house: House) -> None:
    caller = await house.serving()
    await house.models.SetAlias(admin_pb2.SetAliasRequest(name="hidden", deployment="notes"))
    hidden = await refusal(house.authorize(caller, model="hidden"))
    unknown = await refusal(house.authorize(caller, model="nothing"))
    assert (hidden.status, hidden.code, hidden.message) == (unknown.status, unknown.code, unknown.message)
    assert (hidden.status, hidden.code) == (Code.NOT_FOUND, "MODEL_NOT_FOUND")
    method = "/cloister.inference.v1.InferenceService/ListModels"
    listed = await house.control.ListVisibleModels(
        control_pb2.ListVisibleModelsRequest(caller=caller, method=method)
    )
    assert [(m.name, m.ready, list(m.capabilities)) for m in listed.models] == [
        ("notes", True, ["generate", "chat"])
    ]


async def test_a_model_that_is_not_ready_is_unavailable_and_worth_a_retry(house: House) -> None:
    house.host.state = engine_pb2.DEPLOYMENT_STATE_LOADING
    await house.models.LoadModel(admin_pb2.LoadModelRequest(model_version="notes", name="notes"))
    await house.models.SetAlias(admin_pb2.SetAliasRequest(name="notes", deployment="notes"))
    await house.tenants.AddTenant(
        admin_pb2.AddTenantRequest(tenant=admin_pb2.Tenant(name="ward", models=["notes"]))
    )
    error = await refusal(house.authorize(await house.caller()))
    assert (error.status, error.code) == (Code.UNAVAILABLE, "MODEL_NOT_READY")
    assert error.retry_after is not None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"method": "/cloister.inference.v1.InferenceService/Retrain"}, "METHOD_NOT_ALLOWED"),
        ({"method": "/cloister.admin.v1.TenantService/IssueKey"}, "METHOD_NOT_ALLOWED"),
        ({"request_id": "not-a-uuid"}, "INVALID_REQUEST_ID"),
    ],
)
async def test_what_no_policy_row_allows_a_tenant_is_refused(
    house: House, change: dict[str, str], code: str
) -> None:
    assert (await refusal(house.authorize(await house.serving(), **change))).code == code


@pytest.mark.parametrize(
    ("prompt", "most", "code"),
    [(0, 5, "EMPTY_PROMPT"), (5, 0, "INVALID_MAX_TOKENS"), (CONTEXT, 1, "CONTEXT_OVERFLOW")],
)
async def test_a_size_the_model_cannot_hold_reserves_nothing(
    house: House, prompt: int, most: int, code: str
) -> None:
    error = await refusal(house.admit(await house.serving(), prompt, most))
    assert (error.status, error.code) == (Code.INVALID_ARGUMENT, code)
    assert (await house.tenant()).tokens_reserved == 0


async def test_a_repeated_request_id_is_refused_running_or_settled_and_is_another_tenant_s_own(
    house: House,
) -> None:
    caller, request_id = await house.serving(), str(uuid.uuid4())
    lease = (await house.admit(caller, request_id=request_id)).lease
    error = await refusal(house.admit(caller, request_id=request_id.upper()))
    assert (error.status, error.code) == (Code.ALREADY_EXISTS, "DUPLICATE_REQUEST_ID")
    await house.settle(lease)
    assert (await refusal(house.admit(caller, request_id=request_id))).code == "DUPLICATE_REQUEST_ID"
    assert (await house.tenant()).tokens_used == 15
    await house.tenants.AddTenant(
        admin_pb2.AddTenantRequest(tenant=admin_pb2.Tenant(name="claims", models=["notes"]))
    )
    await house.admit(await house.caller("claims"), request_id=request_id)


async def test_of_many_at_once_no_more_are_admitted_than_the_tenant_may_have(house: House) -> None:
    caller = await house.serving(max_concurrent=3)
    results = await asyncio.gather(*(house.admit(caller) for _ in range(12)), return_exceptions=True)
    admitted = [r for r in results if not isinstance(r, BaseException)]
    refused = [await refusal(_raise(r)) for r in results if isinstance(r, grpc.aio.AioRpcError)]
    assert (len(admitted), len(refused)) == (3, 9)
    assert {(e.status, e.code) for e in refused} == {(Code.RESOURCE_EXHAUSTED, "TENANT_CONCURRENCY")}
    assert all(e.retry_after for e in refused)
    await house.settle(admitted[0].lease)
    await house.admit(caller)


async def _raise(error: BaseException) -> None:
    raise error


async def test_a_ticket_admits_once_and_only_for_a_minute(house: House) -> None:
    caller = await house.serving()
    ticket = (await house.authorize(caller)).ticket
    request = control_pb2.AdmitRequest(ticket=ticket, prompt_tokens=1, max_tokens=1)
    await house.control.Admit(request)
    assert (await refusal(house.control.Admit(request))).code == "TICKET_INVALID"
    (record,) = house.records("inference.refused")
    assert (record.actor, record.decision, record.facts["reason"]) == ("unknown", "deny", "TICKET_INVALID")
    late = (await house.authorize(caller)).ticket
    now = house.plane.control._tickets._monotonic()
    house.plane.control._tickets._monotonic = lambda: now + LIFE_S + 1
    error = await refusal(
        house.control.Admit(control_pb2.AdmitRequest(ticket=late, prompt_tokens=1, max_tokens=1))
    )
    assert error.code == "TICKET_INVALID"


async def test_a_lease_settled_again_gets_the_same_receipt_and_one_ledger_row(house: House) -> None:
    lease = (await house.admit(await house.serving())).lease
    receipts = await asyncio.gather(*(house.settle(lease) for _ in range(4)))
    receipts.append(await house.settle(lease))
    assert len({r.audit_sequence for r in receipts}) == 1
    assert (await house.tenant()).tokens_used == 15
    assert (await refusal(house.settle("unheard-of"))).code == "LEASE_UNKNOWN"


async def test_the_leases_of_a_silent_gateway_are_settled_as_abandoned_at_what_was_reserved(house: House) -> None:
    lease = (await house.admit(await house.serving())).lease
    now = house.plane.leases._monotonic()
    house.plane.leases._monotonic = lambda: now + SILENCE_S - 1
    await house.plane.leases.sweep()
    assert house.plane.leases.open_leases == 1
    house.plane.leases._monotonic = lambda: now + SILENCE_S + 1
    await house.plane.leases.sweep()
    tenant = await house.tenant()
    assert (house.plane.leases.open_leases, tenant.tokens_reserved, tenant.tokens_used) == (0, 0, 30)
    outcome = house.records("inference.request")[-1]
    assert (outcome.decision, outcome.facts["reason"]) == ("abandoned", "GATEWAY_SILENT")
    assert (outcome.facts["completion_tokens"], outcome.facts["charged"]) == (20, "reserved")
    beat = control_pb2.HeartbeatRequest(gateway_id="gateway-1", address="127.0.0.1:1", leases=[lease])
    assert (await house.control.Heartbeat(beat)).closed_leases == [lease]
    error = await refusal(house.settle(lease))
    assert (error.status, error.code) == (Code.ABORTED, "LEASE_ABANDONED")


async def test_a_gateway_that_takes_over_an_address_ends_the_leases_of_the_one_before(house: House) -> None:
    caller = await house.serving()
    beat = control_pb2.HeartbeatRequest
    await house.control.Heartbeat(beat(gateway_id="gateway-1", address="127.0.0.1:1"))
    await house.admit(caller)
    await house.control.Heartbeat(beat(gateway_id="gateway-1", address="127.0.0.1:1"))
    assert house.plane.leases.open_leases == 1
    await house.control.Heartbeat(beat(gateway_id="gateway-2", address="127.0.0.1:1"))
    assert house.plane.leases.open_leases == 0
    assert house.records("inference.request")[-1].facts["reason"] == "GATEWAY_REPLACED"
    assert house.plane.leases.gateway_address == "127.0.0.1:1"


async def test_a_draining_control_admits_nothing_and_waits_for_what_runs(house: House) -> None:
    caller = await house.serving()
    lease = (await house.admit(caller)).lease
    ticket = (await house.authorize(caller)).ticket
    draining = asyncio.create_task(house.plane.drain(60))
    await asyncio.sleep(0)
    for call in (
        house.authorize(caller),
        house.control.Admit(control_pb2.AdmitRequest(ticket=ticket, prompt_tokens=1, max_tokens=1)),
    ):
        error = await refusal(call)
        assert (error.status, error.code) == (Code.UNAVAILABLE, "DRAINING")
    assert not draining.done()
    await house.settle(lease)
    await draining
    assert house.records("inference.request")[-1].decision == "completed"


async def test_what_is_still_open_when_draining_ends_is_settled_as_abandoned(house: House) -> None:
    await house.admit(await house.serving())
    await house.plane.drain(0)
    assert house.records("inference.request")[-1].facts["reason"] == "CONTROL_STOPPED"
    assert (await house.tenant()).tokens_reserved == 0


async def test_while_the_audit_log_takes_no_records_nobody_is_admitted(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = await house.serving()
    ticket = (await house.authorize(caller)).ticket
    monkeypatch.setattr(type(house.plane.journal.log), "blocked", property(lambda _: "the disk is full"))
    for call in (
        house.authorize(caller),
        house.control.Admit(control_pb2.AdmitRequest(ticket=ticket, prompt_tokens=1, max_tokens=1)),
    ):
        error = await refusal(call)
        assert (error.status, error.code) == (Code.UNAVAILABLE, "AUDIT_BLOCKED")
    monkeypatch.undo()
    assert (await house.tenant()).tokens_reserved == 0


async def test_the_gateway_s_own_refusals_are_recorded_without_foreign_text(house: House) -> None:
    caller = await house.serving()
    refused = control_pb2.RecordRefusalRequest(
        caller=caller, method=GENERATE, request_id="robert'); drop", reason="INVALID_REQUEST_ID", count=7
    )
    await house.control.RecordRefusal(refused)
    (record,) = house.records("inference.refused")
    assert (record.tenant, record.actor, record.request_id) == ("ward", caller.identity, "")
    assert (record.facts["reason"], record.facts["count"]) == ("INVALID_REQUEST_ID", 7)
    assert caller.api_key.encode() not in record.body


async def test_settling_without_an_outcome_is_refused(house: House) -> None:
    lease = (await house.admit(await house.serving())).lease
    assert (await refusal(house.settle(lease, control_pb2.OUTCOME_UNSPECIFIED))).code == "INVALID_OUTCOME"


async def test_a_gateway_that_hangs_up_while_it_is_admitted_leaves_a_lease_that_is_swept(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = await house.serving()
    ticket = (await house.authorize(caller)).ticket
    run, reserved, go_on = house.plane.database.run, asyncio.Event(), asyncio.Event()

    async def slowly(work: object) -> object:
        result = await run(work)
        reserved.set()
        await go_on.wait()
        return result

    monkeypatch.setattr(house.plane.database, "run", slowly)
    call = house.control.Admit(control_pb2.AdmitRequest(ticket=ticket, prompt_tokens=1, max_tokens=1))
    await reserved.wait()
    call.cancel()
    await asyncio.sleep(0.1)
    monkeypatch.undo()
    go_on.set()
    await until(lambda: house.plane.leases.open_leases == 1)
    now = house.plane.leases._monotonic()
    house.plane.leases._monotonic = lambda: now + SILENCE_S + 1
    await house.plane.leases.sweep()
    assert (await house.tenant()).tokens_reserved == 0
    assert house.plane.journal.log.open_intents() == []


async def test_a_request_whose_intent_cannot_be_written_keeps_no_reservation(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = await house.serving()
    ticket = (await house.authorize(caller)).ticket

    def broken(_record: object) -> None:
        raise ValueError("not a record")

    monkeypatch.setattr(house.plane.journal, "begin", broken)
    error = await refusal(
        house.control.Admit(control_pb2.AdmitRequest(ticket=ticket, prompt_tokens=1, max_tokens=1))
    )
    assert (error.status, error.code) == (Code.INTERNAL, "INTERNAL")
    monkeypatch.undo()
    tenant = await house.tenant()
    assert (tenant.tokens_reserved, tenant.tokens_used) == (0, 0)
