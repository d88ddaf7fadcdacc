"""A process stopped (SIGSTOP) under running streams: the watchdog ends it, and all goes on without hands."""

import asyncio
import json

import grpc
import pytest

from tests.e2e.appliance import eventually
from tests.faults.house import LIMIT_S, Ended, House, Running, ends, gone, under_way
from tests.faults.impatient import HEARD_WITHIN_S

pytestmark = pytest.mark.timeout(600)  # on a busy machine the appliance alone takes a minute to start
STREAMS = 8
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


async def test_a_stopped_worker_aborts_its_streams_and_refuses_new_ones_until_it_is_back(house: House) -> None:
    pid, was = house.appliance.pid_of("worker"), house.appliance.deployment()["restarts"]
    with house.as_it_was():
        async with house.client() as client:
            streams = await under_way(client, STREAMS)
            with house.server.stopped(pid):
                late = Running(client, max_tokens=2)
                ended = await ends(streams)
                refused = await late.end
    assert_ended(ended, (grpc.StatusCode.ABORTED, "ENGINE_RESTARTED"))
    assert (refused.status, refused.code, refused.tokens) == (UNAVAILABLE, "ENGINE_UNAVAILABLE", 0)
    assert house.appliance.deployment()["restarts"] > was
    assert f"engine-worker was silent for {HEARD_WITHIN_S} s and was killed" in house.appliance.logs()


async def test_a_stopped_gateway_breaks_its_connections_and_is_back_where_it_was(house: House) -> None:
    pid = house.appliance.pid_of("gateway")
    with house.as_it_was():
        async with house.client() as client:
            streams = await under_way(client, STREAMS)
            with house.server.stopped(pid):
                ended = await ends(streams)
    assert_ended(ended, (UNAVAILABLE, "UNAVAILABLE"))
    assert killed(house, "gateway") >= {pid}


async def test_a_stopped_control_ends_what_cannot_be_recorded_and_picks_up_its_leases(house: House) -> None:
    pid = house.appliance.pid_of("control")
    with house.as_it_was():
        async with house.client() as client:
            streams = await under_way(client, STREAMS)
            with house.server.stopped(pid):
                refused = await Running(client, max_tokens=2).end
                ended = await ends(streams)
    assert (refused.status, refused.code) == (UNAVAILABLE, "CONTROL_UNAVAILABLE")
    assert {(end.status, end.code) for end in ended} <= {
        (grpc.StatusCode.OK, ""), (grpc.StatusCode.ABORTED, "LEASE_CLOSED"), (UNAVAILABLE, "CONTROL_UNAVAILABLE")
    }  # fmt: skip
    assert killed(house, "control") >= {pid}


async def test_a_stopped_engine_host_is_killed_and_its_workers_end_with_it(house: House) -> None:
    pid, worker = house.appliance.pid_of("engine-host"), house.appliance.pid_of("worker")
    with house.as_it_was():
        async with house.client() as client:
            streams = await under_way(client, STREAMS)
            with house.server.stopped(pid):
                ended = await ends(streams)
                await asyncio.to_thread(eventually, lambda: gone(pid) and gone(worker), "both are gone", LIMIT_S)
    assert {(end.status, end.code) for end in ended} <= {
        (grpc.StatusCode.OK, ""), (grpc.StatusCode.ABORTED, "ENGINE_RESTARTED")
    }  # fmt: skip
    assert killed(house, "engine-host") >= {pid}


def assert_ended(ended: list[Ended], last: tuple[grpc.StatusCode, str]) -> None:
    """The stream that had just begun ended so, and every other one so or complete."""
    assert (ended[-1].status, ended[-1].code) == last
    assert {(end.status, end.code) for end in ended} <= {last, (grpc.StatusCode.OK, "")}


def killed(house: House, process: str) -> set[int]:
    """The process ids that `serve` says it killed for their silence."""
    changes = [json.loads(line) for line in house.server.told().splitlines()]
    return {
        change["pid"]
        for change in changes
        if change.get("process") == process and change["detail"] == f"WATCHDOG: silent for {HEARD_WITHIN_S} s"
    }
