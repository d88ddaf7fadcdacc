"""Devices, plans, counters and audit queries as operators ask for them, through the gate."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from appliance.cli import gpu
from appliance.control import counters
from appliance.protos import admin_pb2
from engine.protos import engine_pb2, engine_pb2_grpc
from tests.appliance.control_house import DIGEST, House, new_house, refusal, until

Code = grpc.StatusCode
TOO_LARGE = engine_pb2.MemoryPlan(
    device="cpu", total_bytes=9, available_bytes=4, summary="needs 9 B", advice="lower kv_blocks (now 7)"
)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with new_house() as made:
        yield made


def load(name: str = "notes", **options: Any) -> admin_pb2.LoadModelRequest:
    return admin_pb2.LoadModelRequest(
        model_version="notes", name=name, options=admin_pb2.DeploymentOptions(**options)
    )


async def test_the_devices_are_shown_with_what_runs_on_them(house: House) -> None:
    await house.models.LoadModel(load())
    found = await house.devices.ListDevices(admin_pb2.ListDevicesRequest())
    (cpu,) = found.devices
    assert (cpu.id, cpu.name, cpu.memory_bytes, list(cpu.deployments)) == ("cpu", "Example", 2, ["notes"])
    assert not cpu.HasField("temperature_c")
    assert (found.nvml, found.recorded_from) == ("none here", "")


async def test_a_plan_is_asked_for_the_version_and_the_options_that_were_named(house: House) -> None:
    house.host.plan.options.kv_blocks = 7
    options = admin_pb2.DeploymentOptions(backend="cpu", kv_blocks=7)
    request = admin_pb2.PlanModelRequest(model_version="notes", options=options, device="GPU-1")
    answer = await house.devices.PlanModel(request)
    assert (answer.model_version, answer.model_digest) == ("notes@1", DIGEST)
    assert (answer.plan.total_bytes, answer.plan.fits, answer.plan.options.kv_blocks) == (1, True, 7)
    (asked,) = house.host.planned
    assert (asked.device, asked.deployment.name, asked.deployment.options.kv_blocks) == ("GPU-1", "", 7)
    assert asked.deployment.files.model_digest == DIGEST
    assert house.plane.deployments.state("notes") == "loading"  # nothing was made


async def test_a_load_that_does_not_fit_is_refused_with_the_numbers_and_makes_no_deployment(house: House) -> None:
    house.host.plan = TOO_LARGE
    error = await refusal(house.models.LoadModel(load()))
    assert (error.status, error.code) == (Code.FAILED_PRECONDITION, "OUT_OF_MEMORY")
    assert error.message == "needs 9 B; lower kv_blocks (now 7)"
    assert error.metadata == {"total_bytes": "9", "available_bytes": "4"}
    assert not (await house.models.ListDeployments(admin_pb2.ListDeploymentsRequest())).deployments
    assert all(not told.deployments for told in house.host.told)
    outcome = house.records("operator.change")[-1]
    assert (outcome.decision, outcome.facts["reason"]) == ("failed", "OUT_OF_MEMORY")


async def test_one_load_is_told_before_the_next_is_planned(house: House) -> None:
    await until(lambda: house.plane.deployments.connected and house.host.calls)
    house.host.calls.clear()
    await asyncio.gather(house.models.LoadModel(load("a")), house.models.LoadModel(load("b")))
    assert house.host.calls == ["plan", "reconcile"] * 2


async def test_a_host_that_refuses_a_plan_is_quoted(house: House) -> None:
    house.host.plan_refusal = "DEVICE_UNSUPPORTED: there is no backend for it"
    error = await refusal(house.devices.PlanModel(admin_pb2.PlanModelRequest(model_version="notes", device="G")))
    assert (error.status, error.code) == (Code.FAILED_PRECONDITION, "DEVICE_UNSUPPORTED")
    assert error.message == "there is no backend for it"


def test_a_plan_on_a_cuda_device_is_shown_with_the_hosts_share_in_80_columns() -> None:
    plan = admin_pb2.MemoryPlan(
        device="GPU-0a1b2c3d-4e5f-6a7b-8c9d-0e1f2a3b4c5d",
        total_bytes=150 * 2**30,
        available_bytes=140 * 2**30,
        host_total_bytes=20 * 2**30,
        host_available_bytes=64 * 2**30,
        options=admin_pb2.DeploymentOptions(backend="triton", dtype="bfloat16", kv_dtype="float8", block_size=16),
    )
    shown = gpu._plan_shown(admin_pb2.PlanModelResponse(model_version="notes@1", plan=plan)).splitlines()
    assert max(map(len, shown)) <= 80
    assert "triton bfloat16, float8 KV" in shown[0]
    assert [line.split()[-2:] for line in shown if "available" in line] == [["the", "device"], ["the", "host"]]
    assert any("of the host" in line and "20.0 GiB" in line for line in shown)
    assert shown[-1] == f"on {plan.device}"


class Worker(engine_pb2_grpc.WorkerServiceServicer):
    """A worker that counts, or that never answers."""

    def __init__(self, answers: bool) -> None:
        self.answers = answers

    async def GetStatus(self, request: Any, context: Any) -> engine_pb2.GetStatusResponse:
        if not self.answers:
            await asyncio.Event().wait()
        return engine_pb2.GetStatusResponse(running=3, blocks_total=9, tokens_cached=5)


async def test_counters_are_asked_of_all_and_those_who_do_not_answer_are_left_out() -> None:
    folder = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    servers = []
    try:
        for name, answers in (("quick", True), ("stuck", False)):
            server = grpc.aio.server()
            engine_pb2_grpc.add_WorkerServiceServicer_to_server(Worker(answers), server)
            server.add_insecure_port(f"unix:{folder / name}")
            await server.start()
            servers.append(server)
        sockets = {name: str(folder / name) for name in ("quick", "stuck", "gone")} | {"none": ""}
        told = await counters.ask(sockets, limit_s=2)
        assert {name: status.running for name, status in told.items()} == {"quick": 3}
    finally:
        for server in servers:
            await server.stop(None)
        shutil.rmtree(folder)


async def test_the_log_is_queried_by_page_and_each_query_is_on_record(house: House) -> None:
    for name in ("one", "two", "three"):
        await house.tenants.AddTenant(admin_pb2.AddTenantRequest(tenant=admin_pb2.Tenant(name=name)))
    first = await house.audit.QueryAudit(admin_pb2.QueryAuditRequest(kind_prefix="operator.change", limit=2))
    assert [(r.phase, r.decision) for r in first.records] == [("outcome", "done"), ("intent", "allow")]
    assert first.next_before_sequence == first.records[-1].sequence
    more = admin_pb2.QueryAuditRequest(
        kind_prefix="operator.change", before_sequence=first.next_before_sequence, limit=1000
    )
    rest = await house.audit.QueryAudit(more)
    assert (len(rest.records), rest.next_before_sequence) == (4, 0)
    assert rest.log_size >= first.log_size > 6
    assert [r.facts["method"] for r in house.records("operator.read")] == [
        "/cloister.admin.v1.AuditService/QueryAudit"
    ] * 2
    far = admin_pb2.QueryAuditRequest(kind_prefix="operator.change")
    far.since.seconds, far.until.seconds = -(1 << 62), 1 << 62
    assert len((await house.audit.QueryAudit(far)).records) == 6
    error = await refusal(house.audit.QueryAudit(admin_pb2.QueryAuditRequest(tenant="x" * 2000)))
    assert (error.code, error.field) == ("INVALID_FILTER", "tenant")
