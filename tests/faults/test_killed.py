"""Each process is killed under running streams, `cloister serve` itself too: all comes back without hands."""

import asyncio
import os
import signal

import grpc
import pytest

from tests.e2e.appliance import ALIAS, eventually
from tests.faults.house import LIMIT_S, House, Running, ends, gone, under_way

pytestmark = pytest.mark.timeout(600)  # on a busy machine the appliance alone takes a minute to start
STREAMS = 4
OK = (grpc.StatusCode.OK, "")
RESTARTED = (grpc.StatusCode.ABORTED, "ENGINE_RESTARTED")
UNSETTLED = (grpc.StatusCode.UNAVAILABLE, "CONTROL_UNAVAILABLE")


def greedy(house: House) -> str:
    """A short answer that is always the same."""
    with house.appliance.client() as client:
        return "".join(client.generate(ALIAS, text="hello", temperature=0, max_tokens=8))


def decisions(house: House) -> list[str]:
    """What came of each request, as the audit log has it."""
    return [record["decision"] for record in house.appliance.records() if record["phase"] == "outcome"]


async def test_a_worker_killed_mid_stream_aborts_its_requests_and_comes_back_by_itself(house: House) -> None:
    pid, before = house.appliance.deployment()["worker_pid"], greedy(house)
    with house.as_it_was():
        async with house.client() as client:
            streams = await under_way(client, STREAMS)
            os.kill(pid, signal.SIGKILL)
            ended = await ends(streams)
            refused = await Running(client, max_tokens=2).end
    assert (ended[-1].status, ended[-1].code) == RESTARTED
    assert {(end.status, end.code) for end in ended} <= {OK, RESTARTED}
    assert (refused.status, refused.tokens) == (grpc.StatusCode.UNAVAILABLE, 0)
    assert house.appliance.deployment()["worker_pid"] != pid
    assert greedy(house) == before
    assert "engine_failed" in decisions(house)


async def test_a_client_that_goes_away_frees_its_pages_and_is_recorded_as_cancelled(house: House) -> None:
    async with house.client() as client:
        (stream,) = await under_way(client, 1)
        assert house.owned() > 0
        stream.cancel()
        assert (await stream.end).status is grpc.StatusCode.CANCELLED
    eventually(lambda: house.owned() == 0, "its pages are free", LIMIT_S)
    eventually(lambda: house.status()["open_leases"] == 0, "its lease is closed", LIMIT_S)
    assert decisions(house)[-1] == "cancelled"


@pytest.mark.parametrize(
    ("process", "last"),
    [
        ("gateway", {(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")}),  # its connections break
        # Leases survive it, the answer is completed and settled, if it is back within 5 s; else settled later.
        ("control", {OK, (grpc.StatusCode.ABORTED, "LEASE_CLOSED"), UNSETTLED}),
        ("importer", {OK}),  # nothing of a request passes through it
        ("engine-host", {RESTARTED}),  # its workers die with it
        ("text", {OK}),  # they have been prepared
    ],
)
async def test_any_process_killed_under_load_is_started_again_and_nothing_leaks(
    house: House, process: str, last: set[tuple[grpc.StatusCode, str]]
) -> None:
    pid = house.appliance.pid_of(process)
    with house.as_it_was():
        async with house.client() as client:
            streams = await under_way(client, STREAMS)
            os.kill(pid, signal.SIGKILL)
            ended = await ends(streams)
    assert (ended[-1].status, ended[-1].code) in last  # it had just begun
    assert {(end.status, end.code) for end in ended} <= {*last, OK}
    assert house.appliance.pid_of(process) != pid


async def test_a_killed_serve_takes_everything_with_it_and_the_next_one_settles_what_it_left(house: House) -> None:
    pids = house.processes()
    del pids["serve"]
    with house.as_it_was():
        async with house.client() as client:
            streams = await under_way(client, STREAMS)
            house.server.kill()
            ended = await ends(streams)
        assert ended[-1].status is grpc.StatusCode.UNAVAILABLE
        assert {end.status for end in ended} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK}
        eventually(lambda: all(map(gone, pids.values())), "no process outlives it", LIMIT_S)
        await asyncio.to_thread(house.server.start)
    assert "abandoned" in decisions(house)
    assert not set(pids.values()) & set(house.processes().values())
