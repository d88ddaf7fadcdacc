"""`cloister serve` itself is killed under running streams; its processes one by one: tests/e2e/test_faults.py."""

import asyncio

import grpc
import pytest

from tests.e2e.appliance import eventually
from tests.faults.house import LIMIT_S, House, ends, under_way

pytestmark = pytest.mark.timeout(600)  # on a busy machine the appliance alone takes a minute to start
STREAMS = 4


def gone(pid: int) -> bool:
    """No such process, or one that has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


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
    decisions = [record["decision"] for record in house.appliance.records() if record["phase"] == "outcome"]
    assert "abandoned" in decisions
    assert not set(pids.values()) & set(house.processes().values())
