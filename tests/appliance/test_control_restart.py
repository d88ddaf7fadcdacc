"""Requests in flight when control is killed and started again, and control when a part of it fails."""

import shutil
import sqlite3
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from appliance.control.__main__ import serve
from appliance.control.admission.leases import SILENCE_S
from appliance.control.db.models import Request
from appliance.control.deployments import Deployments
from appliance.control.home import Home
from appliance.control.limits import Limits
from appliance.control.plane import ControlPlane
from appliance.protos import admin_pb2, control_pb2
from bundles.protos import importer_pb2
from engine.process import Process
from tests.appliance.control_house import DIGEST, House, make_home, new_house, refusal, running, until


@pytest.fixture
def home() -> Iterator[Home]:
    made = make_home()
    yield made
    shutil.rmtree(made.root.parent)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with new_house() as made:
        yield made


async def admitted(house: House) -> tuple[control_pb2.Caller, str]:
    """A caller, and a lease of theirs whose intent is durable."""
    caller = await house.serving(max_concurrent=1)
    lease = (await house.admit(caller)).lease
    await house.control.AwaitIntent(control_pb2.AwaitIntentRequest(lease=lease))
    return caller, lease


async def beat(house: House, *leases: str, gateway_id: str = "gateway-1") -> list[str]:
    """One heartbeat; the leases that it is told are closed."""
    request = control_pb2.HeartbeatRequest(gateway_id=gateway_id, address="127.0.0.1:1", leases=leases)
    return list((await house.control.Heartbeat(request)).closed_leases)


def later(house: House, seconds: float) -> None:
    """Move the lease book's clock."""
    now = house.plane.leases._monotonic()
    house.plane.leases._monotonic = lambda: now + seconds


async def test_a_request_whose_gateway_claims_it_after_a_restart_is_settled_as_if_nothing_had_been(
    home: Home,
) -> None:
    async with running(home) as before:
        caller, lease = await admitted(before)
    async with running(home) as after:
        assert (await after.tenant()).tokens_reserved == 30
        await after.ready("notes")
        assert (await refusal(after.admit(caller))).code == "TENANT_CONCURRENCY"
        await after.control.AwaitIntent(control_pb2.AwaitIntentRequest(lease=lease))
        assert await beat(after, lease) == []
        later(after, SILENCE_S + 1)
        await beat(after, lease)
        await after.plane.leases.sweep()
        settled = await after.settle(lease)
        outcome = after.records("inference.request")[-1]
        assert (outcome.sequence, outcome.decision, outcome.actor) == (
            settled.audit_sequence, "completed", caller.identity,
        )  # fmt: skip
        assert (await after.tenant()).tokens_used == 15
        assert after.plane.journal.log.open_intents() == []


async def test_a_request_that_ended_while_control_was_away_is_settled_without_a_heartbeat_first(
    home: Home,
) -> None:
    async with running(home) as before:
        _, lease = await admitted(before)
    async with running(home) as after:
        await after.settle(lease)
        assert (await after.tenant()).tokens_used == 15


async def test_what_nobody_claims_after_a_restart_is_abandoned_at_what_was_reserved(home: Home) -> None:
    async with running(home) as before:
        _, lease = await admitted(before)
    async with running(home) as after:
        later(after, SILENCE_S - 1)
        await after.plane.leases.sweep()
        assert after.plane.leases.open_leases == 1
        later(after, 2)
        assert await beat(after) == [], "a gateway that lives, and does not hold it"
        await after.plane.leases.sweep()
        tenant = await after.tenant()
        assert (tenant.tokens_reserved, tenant.tokens_used) == (0, 30)
        outcome = after.records("inference.request")[-1]
        assert (outcome.decision, outcome.facts["reason"]) == ("abandoned", "UNCLAIMED")
        assert (outcome.facts["lease"], outcome.facts["charged"]) == (lease, "reserved")
        assert await beat(after, lease) == [lease]
        assert (await refusal(after.settle(lease))).code == "LEASE_ABANDONED"


async def test_a_gateway_is_told_that_what_another_one_holds_and_what_nobody_knows_is_closed(house: House) -> None:
    _, lease = await admitted(house)
    assert await beat(house, lease, "unheard-of", gateway_id="gateway-2") == [lease, "unheard-of"]
    assert await beat(house, lease) == []


async def test_a_heartbeat_that_crosses_its_gateway_s_settle_is_not_told_that_the_lease_is_closed(
    house: House,
) -> None:
    _, lease = await admitted(house)
    await house.settle(lease)
    assert await beat(house, lease) == []


async def test_a_reservation_without_an_intent_is_recorded_and_charged_nothing(home: Home) -> None:
    row = Request(
        tenant="ward", request_id="9" * 8 + "-9999-4999-8999-" + "9" * 12, lease="L", gateway_id="gateway-1",
        application="summary", key_id="k", model="notes", deployment="notes", model_digest=DIGEST,
        prompt_tokens=700, max_tokens=100, state="open", admitted_ns=1,
    )  # fmt: skip
    async with running(home) as before:
        await before.serving()
        await before.plane.database.run(lambda s: s.add(row))
    async with running(home) as after:
        tenant = await after.tenant()
        assert (tenant.tokens_reserved, tenant.tokens_used) == (0, 0)
        (outcome,) = after.records("inference.request")
        assert (outcome.phase, outcome.decision, outcome.actor) == ("outcome", "abandoned", "control")
        assert (outcome.facts["reason"], outcome.facts["charged"]) == ("NEVER_STARTED", "nothing")
        assert await beat(after, "L") == ["L"]


async def test_a_database_error_ends_neither_follower(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = []

    def failing(real: Any) -> Any:
        def once(*args: Any) -> Any:
            if real not in failures:
                failures.append(real)
                raise sqlite3.OperationalError("disk I/O error")
            return real(*args)

        return once

    log = type(house.plane.journal.log)
    monkeypatch.setattr(log, "has", failing(log.has))
    monkeypatch.setattr(Deployments, "_tell", failing(Deployments._tell))
    house.importer.outbox.append(
        importer_pb2.ReadOutboxResponse(sequence=1, import_id="i1", state=importer_pb2.IMPORT_STATE_COMMITTED)
    )
    for task in house.plane._tasks[:2]:
        task.cancel()
    house.plane._tasks.clear()
    house.plane.begin()
    await until(lambda: len(failures) == 2)
    await until(lambda: house.importer.acknowledged and house.plane.deployments.connected)
    assert len(house.records("bundle.state")) == 1
    await house.serving()


async def test_control_does_not_outlive_the_end_of_one_of_its_tasks(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_self: object) -> None:
        raise LookupError("a defect")

    monkeypatch.setattr(ControlPlane, "_sweep", broken)
    with pytest.raises(LookupError, match="a defect"):
        await serve(Process("control"), home, "none", Limits(), {})
    monkeypatch.undo()
    async with running(home) as again:
        await again.tenants.ListTenants(admin_pb2.ListTenantsRequest())
