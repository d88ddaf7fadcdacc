"""A version's way behind an alias: tried by its canaries through the gateway, or the alias is where it was."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import grpc
import pytest

from appliance.control.activation import system_tenant
from appliance.control.audit.errors import blocked
from appliance.protos import admin_pb2
from engine.protos import engine_pb2
from tests.appliance.activation_house import Site, canary, new_site, open_site
from tests.appliance.control_house import make_home, refusal, until
from tests.appliance.gateway_house import say, silence

FAILED = engine_pb2.DEPLOYMENT_STATE_FAILED
LOADING = engine_pb2.DEPLOYMENT_STATE_LOADING
GOOD = canary("all well")
BAD = canary("all ill")


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with new_site() as made:
        yield made


async def first(site: Site) -> None:
    """`notes` answers with version 1, and version 2 is in the store."""
    steps = await site.activate("notes@1")
    assert steps[-1].stage == "active"


async def test_canaries_are_ordinary_requests_of_the_system_tenant_and_then_the_alias_moves(site: Site) -> None:
    await first(site)
    site.house.importer.add(2, canaries=[GOOD, canary("well", "contains")], canary_pass_percent=100)
    steps = await site.activate("notes@2")
    assert [s.stage for s in steps] == ["planned", "loading", *["canaries"] * 3, "switched", "active"]
    last = steps[-1]
    assert (last.deployment, last.canaries_passed, last.canaries_total) == ("notes-2", 2, 2)
    assert await site.aliases() == {"notes": "notes-2"}
    assert await site.states() == {"notes@1": "retired", "notes@2": "active"}
    requests = site.house.records("inference.request")
    assert [(r.tenant, r.phase) for r in requests] == [("system", "intent"), ("system", "outcome")] * 2
    assert requests[0].facts["model"] == "trial.notes-2"
    tenant = await site.house.tenant("system")
    assert (tenant.tokens_used > 0, list(tenant.models)) == (True, []), "metered, and the trial's alias is gone"


async def test_what_is_on_record_of_an_activation_names_failures_by_index_and_holds_no_text(site: Site) -> None:
    await first(site)
    site.house.importer.add(2, canaries=[GOOD, BAD, GOOD], canary_pass_percent=100)
    last = (await site.activate("notes@2"))[-1]
    assert (last.stage, last.reason, last.canaries_passed) == ("returned", "CANARY_FAILED", 2)
    assert "1 MISMATCH" in last.message
    decision, facts = site.told("model.activation")[-1]
    assert (decision, facts["reason"], facts["canaries_failed"]) == (
        "returned",
        "CANARY_FAILED",
        {"1": "MISMATCH"},
    )
    everything = b"".join(r.body for r in site.house.records())
    assert not [text for text in (b"SECRET QUESTION", b"all ill", b"all well") if text in everything]
    assert await site.aliases() == {"notes": "notes-1"}
    assert await site.deployed() == {"notes-1": "notes@1"}
    assert await site.states() == {"notes@1": "active", "notes@2": "approved"}


async def test_enough_canaries_are_enough(site: Site) -> None:
    site.house.importer.add(2, canaries=[GOOD, BAD, GOOD], canary_pass_percent=66)
    assert (await site.activate("notes@2"))[-1].stage == "active"


async def test_an_answer_that_takes_too_long_has_failed(site: Site) -> None:
    site.house.plane.activations._parts = _hurried(site)
    site.worker.script = silence
    site.house.importer.add(2, canaries=[GOOD], canary_pass_percent=100)
    last = (await site.activate("notes@2"))[-1]
    assert (last.stage, last.reason) == ("returned", "CANARY_TIMEOUT")
    assert (await site.aliases(), await site.deployed()) == ({}, {})


def _hurried(site: Site) -> Any:
    return replace(site.house.plane.activations._parts, canary_seconds=0.2)


async def test_a_version_that_fails_to_load_leaves_the_alias_where_it_was(site: Site) -> None:
    await first(site)
    site.house.importer.add(2)
    site.house.host.states["notes-2"], site.house.host.reasons["notes-2"] = FAILED, "WEIGHTS_INVALID"
    last = (await site.activate("notes@2"))[-1]
    assert (last.stage, last.reason, last.message) == ("returned", "WEIGHTS_INVALID", "because")
    assert (await site.aliases(), await site.deployed()) == ({"notes": "notes-1"}, {"notes-1": "notes@1"})
    assert [d.name for d in site.house.host.told[-1].deployments] == ["notes-1"]


async def test_an_engine_that_vanishes_among_the_canaries_returns_the_alias(site: Site) -> None:
    await first(site)
    site.house.importer.add(2, canaries=[GOOD, GOOD], canary_pass_percent=50)

    async def vanish(submit: Any, send: Any) -> None:
        site.house.host.states["notes-2"], site.house.host.reasons["notes-2"] = FAILED, "WORKER_DIED"
        await site.house.host.say()
        await until(lambda: site.house.plane.deployments.state("notes-2") == "failed")
        await say("all", " well")(submit, send)

    site.worker.script = vanish
    last = (await site.activate("notes@2"))[-1]
    assert (last.stage, last.reason) == ("returned", "WORKER_DIED")
    assert (await site.aliases(), await site.deployed()) == ({"notes": "notes-1"}, {"notes-1": "notes@1"})


async def test_a_caller_who_leaves_stops_nothing_and_may_join_again(site: Site) -> None:
    site.house.host.state = LOADING
    request = admin_pb2.ActivateModelRequest(model_version="notes@1", alias="notes")
    stream = site.house.models.ActivateModel(request)
    await stream.read()
    stream.cancel()
    await until(lambda: site.house.host.told and site.house.host.told[-1].deployments)
    other = admin_pb2.ActivateModelRequest(model_version="notes@1", alias="other")
    assert (await refusal(site.house.models.ActivateModel(other))).code == "ACTIVATION_RUNNING"
    again = site.house.models.ActivateModel(request)
    await again.read()
    site.house.host.state = engine_pb2.DEPLOYMENT_STATE_READY
    await site.house.host.say()
    assert [told.activation.stage async for told in again][-1] == "active"
    assert await site.aliases() == {"notes": "notes-1"}


async def test_a_control_that_was_killed_meanwhile_returns_at_its_next_start() -> None:
    home = make_home()
    try:
        site = Site(home)
        async with open_site(home, site, gateway=False):
            await first(site)
            site.house.importer.add(2, canaries=[GOOD])
            site.house.host.states["notes-2"] = LOADING
            stream = site.house.models.ActivateModel(
                admin_pb2.ActivateModelRequest(model_version="notes@2", alias="notes")
            )
            await until(lambda: "notes-2" in [d.name for d in site.house.host.told[-1].deployments])
            stream.cancel()
        async with open_site(home, site, gateway=False):
            assert (await site.aliases(), await site.deployed()) == ({"notes": "notes-1"}, {"notes-1": "notes@1"})
            assert await site.states() == {"notes@1": "active", "notes@2": "approved"}
            await until(lambda: len(site.told("model.activation")) == 2)
            assert site.told("model.activation")[1][1]["reason"] == "CONTROL_RESTARTED"
            assert site.told("appliance.control")[-1][1]["trials_returned"] == 1
            site.house.host.states.clear()
    finally:
        shutil.rmtree(home.root.parent)


def one_at_a_time(deployment: Any, running: list[str]) -> bool:
    """Memory for one deployment; a plan under a running name takes that one's place."""
    return not [name for name in running if name != deployment.name]


async def test_where_memory_holds_one_the_alias_moves_first_and_stays_when_the_canaries_pass(site: Site) -> None:
    await first(site)
    site.house.importer.add(2, canaries=[GOOD], canary_pass_percent=100)
    site.house.host.fits = one_at_a_time
    told_before = len(site.house.host.told)
    steps = await site.activate("notes@2")
    stages = [s.stage for s in steps]
    assert stages[-1] == "active"
    assert stages.index("switched") < stages.index("canaries")
    together = [[d.name for d in told.deployments] for told in site.house.host.told[told_before:]]
    assert together[0] == [], "the present one gives its memory away before the new one is loaded"
    assert ["notes-1", "notes-2"] not in together[:-1]
    assert await site.aliases() == {"notes": "notes-2"}


async def test_where_memory_holds_one_a_failure_brings_the_present_one_back_by_itself(site: Site) -> None:
    await first(site)
    site.house.importer.add(2, canaries=[BAD], canary_pass_percent=100)
    site.house.host.fits = one_at_a_time
    steps = await site.activate("notes@2")
    assert (steps[-1].stage, steps[-1].reason) == ("returned", "CANARY_FAILED")
    assert "switched" in [s.stage for s in steps]
    assert (await site.aliases(), await site.deployed()) == ({"notes": "notes-1"}, {"notes-1": "notes@1"})
    assert [d.name for d in site.house.host.told[-1].deployments] == ["notes-1"]
    assert [d for d, _ in site.told("version.state")] == ["active"], "a version on trial was never active"
    await site.house.ready("notes-1")


async def test_a_control_killed_while_the_alias_has_already_moved_brings_both_back() -> None:
    home = make_home()
    try:
        site = Site(home)
        async with open_site(home, site):
            await first(site)
            site.house.importer.add(2, canaries=[GOOD], canary_pass_percent=100)
            site.house.host.fits = one_at_a_time
            site.worker.script = silence
            request = admin_pb2.ActivateModelRequest(model_version="notes@2", alias="notes")
            stream = site.house.models.ActivateModel(request)
            await until(lambda: site.worker.submits)
            assert await site.aliases() == {"notes": "notes-2"}
            assert await site.states() == {"notes@1": "active", "notes@2": "approved"}, "on trial, not active"
            await site.house.plane.activations.close()  # as SIGKILL does: nothing is brought back before the end
            stream.cancel()
        async with open_site(home, site, gateway=False):
            assert (await site.aliases(), await site.deployed()) == ({"notes": "notes-1"}, {"notes-1": "notes@1"})
            await site.house.ready("notes-1")
            (key,) = (await site.house.tenants.ListKeys(admin_pb2.ListKeysRequest(tenant="system"))).keys
            assert key.state == "revoked"
    finally:
        shutil.rmtree(home.root.parent)


async def test_what_fits_in_no_way_is_refused_before_anything_moves(site: Site) -> None:
    await first(site)
    site.house.importer.add(2)
    site.house.host.fits = lambda _deployment, _running: False
    request = admin_pb2.ActivateModelRequest(model_version="notes@2", alias="notes")
    error = await refusal(site.house.models.ActivateModel(request))
    assert (error.status, error.code) == (grpc.StatusCode.FAILED_PRECONDITION, "OUT_OF_MEMORY")
    assert (await site.aliases(), await site.deployed()) == ({"notes": "notes-1"}, {"notes-1": "notes@1"})


async def test_a_rollback_is_back_at_once_while_the_version_before_is_still_loaded(site: Site) -> None:
    await first(site)
    site.house.importer.add(2, canaries=[GOOD])
    await site.activate("notes@2")
    told = len(site.house.host.told)
    last = (await site.rollback())[-1]
    assert (last.stage, last.model_version, last.deployment) == ("active", "notes@1", "notes-1")
    assert all("notes-1" in [d.name for d in t.deployments] for t in site.house.host.told[told:])
    assert await site.states() == {"notes@1": "active", "notes@2": "retired"}
    decisions = [(d, f["model_version"]) for d, f in site.told("version.state")]
    assert decisions == [
        ("active", "notes@1"), ("active", "notes@2"), ("retired", "notes@1"),
        ("active", "notes@1"), ("retired", "notes@2"),
    ]  # fmt: skip


async def test_a_rollback_finds_what_an_operator_had_loaded_under_a_name_of_their_own(site: Site) -> None:
    models = site.house.models
    await models.LoadModel(admin_pb2.LoadModelRequest(model_version="notes@1", name="by-hand"))
    await models.SetAlias(admin_pb2.SetAliasRequest(name="notes", deployment="by-hand"))
    site.house.importer.add(2)
    await site.activate("notes@2")
    assert (await site.rollback())[-1].deployment == "by-hand"
    assert sorted(await site.deployed()) == ["by-hand", "notes-2"]
    await models.UnloadModel(admin_pb2.UnloadModelRequest(name="notes-2"))
    assert (await site.rollback())[-1].deployment == "notes-2"


async def test_a_rollback_loads_again_what_was_unloaded_with_its_options(site: Site) -> None:
    options = admin_pb2.DeploymentOptions(threads=3)
    await site.activate("notes@1", options=options)
    site.house.importer.add(2)
    await site.activate("notes@2")
    await site.house.models.UnloadModel(admin_pb2.UnloadModelRequest(name="notes-1"))
    assert (await site.rollback())[-1].stage == "active"
    (again,) = [d for d in site.house.host.told[-1].deployments if d.name == "notes-1"]
    assert again.options.threads == 3
    assert await site.aliases() == {"notes": "notes-1"}


async def test_an_alias_without_a_past_has_nothing_to_go_back_to(site: Site) -> None:
    error = await refusal(site.house.models.RollbackAlias(admin_pb2.RollbackAliasRequest(alias="notes")))
    assert error.code == "ALIAS_NOT_FOUND"
    await first(site)
    error = await refusal(site.house.models.RollbackAlias(admin_pb2.RollbackAliasRequest(alias="notes")))
    assert error.code == "NO_EARLIER_VERSION"


async def test_of_what_was_active_only_the_version_before_stays_loaded(site: Site) -> None:
    for number in (1, 2, 3):
        if number > 1:
            site.house.importer.add(number)
        assert (await site.activate(f"notes@{number}"))[-1].stage == "active"
    assert sorted(await site.deployed()) == ["notes-2", "notes-3"]
    assert await site.states() == {"notes@1": "retired", "notes@2": "retired", "notes@3": "active"}


async def test_nobody_touches_what_is_under_trial(site: Site) -> None:
    await first(site)
    site.house.importer.add(2)
    site.house.host.states["notes-2"] = LOADING
    stream = site.house.models.ActivateModel(
        admin_pb2.ActivateModelRequest(model_version="notes@2", alias="notes")
    )
    await until(lambda: "notes-2" in [d.name for d in site.house.host.told[-1].deployments])
    models = site.house.models
    for call in (
        models.UnloadModel(admin_pb2.UnloadModelRequest(name="notes-2")),
        models.LoadModel(admin_pb2.LoadModelRequest(model_version="notes@1", name="notes-2")),
        models.SetAlias(admin_pb2.SetAliasRequest(name="notes", deployment="notes-1")),
        models.RemoveAlias(admin_pb2.RemoveAliasRequest(name="notes")),
    ):
        assert (await refusal(call)).code == "ACTIVATION_RUNNING"
    assert await site.aliases() == {"notes": "notes-1"}, "the alias of the trial is nobody's to see"
    site.house.host.states.clear()
    await site.house.host.say()
    assert [told.activation.stage async for told in stream][-1] == "active"


async def test_the_key_of_a_trial_is_revoked_with_its_end_and_nobody_else_gets_one(site: Site) -> None:
    site.house.importer.add(2, canaries=[GOOD], canary_pass_percent=100)
    await site.activate("notes@2")
    (key,) = (await site.house.tenants.ListKeys(admin_pb2.ListKeysRequest(tenant="system"))).keys
    assert key.state == "revoked"
    for call in (
        site.house.tenants.AddTenant(admin_pb2.AddTenantRequest(tenant=admin_pb2.Tenant(name="system"))),
        site.house.tenants.SetTenant(admin_pb2.SetTenantRequest(name="system", models=["notes"], set_models=True)),
        site.house.tenants.SuspendTenant(admin_pb2.SuspendTenantRequest(name="system")),
        site.house.tenants.IssueKey(admin_pb2.IssueKeyRequest(tenant="system", application="x")),
    ):
        assert (await refusal(call)).code == "TENANT_RESERVED"


async def test_without_a_gateway_no_canary_can_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_tenant, "_GATEWAY_WITHIN_S", 0.1)
    async with new_site(gateway=False) as site:
        site.house.importer.add(2, canaries=[GOOD])
        last = (await site.activate("notes@2"))[-1]
        assert (last.stage, last.reason) == ("returned", "GATEWAY_UNAVAILABLE")
        assert await site.deployed() == {}


async def test_a_tenant_s_requests_go_on_through_an_activation(site: Site) -> None:
    await first(site)
    await site.house.tenants.AddTenant(
        admin_pb2.AddTenantRequest(tenant=admin_pb2.Tenant(name="ward", models=["notes"]))
    )
    caller = await site.house.caller()
    site.house.importer.add(2, canaries=[GOOD])
    activating = asyncio.create_task(site.activate("notes@2"))
    while not activating.done():
        assert (await site.house.authorize(caller)).deployment in ("notes-1", "notes-2")
    assert (await site.house.authorize(caller)).deployment == "notes-2"


async def test_an_alias_moved_by_somebody_else_meanwhile_is_not_moved_back_by_a_failure(site: Site) -> None:
    await first(site)
    models = site.house.models
    await models.LoadModel(admin_pb2.LoadModelRequest(model_version="notes@1", name="by-hand"))
    site.house.importer.add(2, canaries=[BAD], canary_pass_percent=100)
    deployments = site.house.plane.deployments
    planned, moved = deployments.plan, admin_pb2.SetAliasRequest(name="notes", deployment="by-hand")

    async def plan(*arguments: Any) -> engine_pb2.MemoryPlan:
        await models.SetAlias(moved)
        await models.UnloadModel(admin_pb2.UnloadModelRequest(name="notes-1"))
        found: engine_pb2.MemoryPlan = await planned(*arguments)
        return found

    deployments.plan = plan
    request = admin_pb2.ActivateModelRequest(model_version="notes@2", alias="notes")
    assert (await refusal(models.ActivateModel(request))).code == "ALIAS_CHANGED"
    assert (await site.aliases(), await site.deployed()) == ({"notes": "by-hand"}, {"by-hand": "notes@1"})


async def test_what_an_operator_loaded_by_hand_is_never_unloaded_by_an_activation(site: Site) -> None:
    models = site.house.models
    await models.LoadModel(admin_pb2.LoadModelRequest(model_version="notes@1", name="by-hand"))
    await models.SetAlias(admin_pb2.SetAliasRequest(name="notes", deployment="by-hand"))
    site.house.importer.add(2)
    site.house.importer.add(3)
    await site.activate("notes@2")
    assert (await site.rollback())[-1].deployment == "by-hand"
    for version in ("notes@2", "notes@3"):
        assert (await site.activate(version))[-1].stage == "active"
    assert sorted(await site.deployed()) == ["by-hand", "notes-2", "notes-3"]


async def test_an_activation_with_other_options_is_another_one(site: Site) -> None:
    site.house.host.state = LOADING
    stream = site.house.models.ActivateModel(
        admin_pb2.ActivateModelRequest(model_version="notes@1", alias="notes")
    )
    await stream.read()
    options = admin_pb2.DeploymentOptions(threads=3)
    other = admin_pb2.ActivateModelRequest(model_version="notes@1", alias="notes", options=options)
    assert (await refusal(site.house.models.ActivateModel(other))).code == "ACTIVATION_RUNNING"
    stream.cancel()


async def test_a_version_revoked_under_trial_never_becomes_active(site: Site) -> None:
    await first(site)
    version = site.house.importer.add(2, canaries=[GOOD], canary_pass_percent=100)

    async def revoke(submit: Any, send: Any) -> None:
        version.revoked = "KEY_REVOKED"
        await say("all", " well")(submit, send)

    site.worker.script = revoke
    last = (await site.activate("notes@2"))[-1]
    assert (last.stage, last.reason, last.canaries_passed) == ("returned", "MODEL_REVOKED", 1)
    assert (await site.aliases(), await site.deployed()) == ({"notes": "notes-1"}, {"notes-1": "notes@1"})


async def test_after_a_kill_the_trial_s_memory_is_free_before_the_present_version_is_loaded_again() -> None:
    home = make_home()
    try:
        site = Site(home)
        async with open_site(home, site):
            await first(site)
            site.house.importer.add(2, canaries=[GOOD], canary_pass_percent=100)
            site.house.host.fits = one_at_a_time
            site.worker.script = silence
            request = admin_pb2.ActivateModelRequest(model_version="notes@2", alias="notes")
            stream = site.house.models.ActivateModel(request)
            await until(lambda: site.worker.submits)
            await site.house.plane.activations.close()
            stream.cancel()
        told = len(site.house.host.told)
        async with open_site(home, site, gateway=False):
            await site.house.ready("notes-1")
        together = [[d.name for d in request.deployments] for request in site.house.host.told[told:]]
        assert together[:2] == [[], ["notes-1"]]
    finally:
        shutil.rmtree(home.root.parent)


class _FullDisk:
    """An audit log that can be read and takes no record."""

    blocked = "disk full"

    def __init__(self, log: Any) -> None:
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def append(self, _record: Any) -> Any:
        failed: Future[Any] = Future()
        failed.set_exception(blocked(self.blocked))
        return failed


async def test_while_the_audit_log_takes_nothing_no_alias_moves_and_the_end_is_told_once_it_does(
    site: Site,
) -> None:
    await first(site)
    site.house.importer.add(2)
    site.house.host.states["notes-2"] = LOADING
    request = admin_pb2.ActivateModelRequest(model_version="notes@2", alias="notes")
    stream = site.house.models.ActivateModel(request)
    await until(lambda: "notes-2" in [d.name for d in site.house.host.told[-1].deployments])
    plane = site.house.plane
    log, plane.journal.log = plane.journal.log, _FullDisk(plane.journal.log)
    site.house.host.states.clear()
    await site.house.host.say()
    assert (await refusal(stream)).code == "AUDIT_BLOCKED"
    assert (await site.aliases(), await site.deployed()) == ({"notes": "notes-1"}, {"notes-1": "notes@1"})
    plane.journal.log = log
    await until(lambda: len(site.told("model.activation")) == 2)
    decision, facts = site.told("model.activation")[1]
    assert (decision, facts["reason"]) == ("returned", "AUDIT_BLOCKED")
