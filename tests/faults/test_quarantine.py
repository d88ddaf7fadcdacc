"""A request beside two deaths of the engine is kept away from it, on record; what ran beside it is not."""

import json
import os
import signal

import grpc
import pytest

from tests.faults.house import House, Running, ends

pytestmark = pytest.mark.timeout(600)  # on a busy machine the appliance alone takes a minute to start
POISON = "the request under which the worker is killed"
LONG = {"temperature": 0.0, "max_tokens": 900}


async def killed_over(house: House, *prompts: str) -> None:
    """The worker dies while it has these requests; by hand, because nothing in the house knows what kills it."""
    pid = house.appliance.deployment()["worker_pid"]
    async with house.client() as client:
        streams = [Running(client, prompt=prompt, **LONG) for prompt in prompts]
        for stream in streams:
            await stream.begun()
        os.kill(pid, signal.SIGKILL)
        ended = await ends(streams)
    assert {(end.status, end.code) for end in ended} == {(grpc.StatusCode.ABORTED, "ENGINE_RESTARTED")}
    house.settled()


async def test_the_same_request_beside_two_deaths_is_refused_and_its_neighbour_is_not(house: House) -> None:
    await killed_over(house, POISON, "a neighbour")
    await killed_over(house, POISON, "a stranger")
    async with house.client() as client:
        refused = await Running(client, prompt=POISON, **LONG).end
        for prompt in ("a neighbour", "a stranger", POISON + "?"):
            stream = Running(client, prompt=prompt, **LONG)
            await stream.begun()
            stream.cancel()
            await stream.end
    assert (refused.status, refused.code) == (grpc.StatusCode.FAILED_PRECONDITION, "REQUEST_QUARANTINED")
    records = [json.dumps(r["body"]) for r in house.appliance.records() if r["kind"] == "inference.refused"]
    assert sum("REQUEST_QUARANTINED" in body for body in records) == 1
    assert POISON not in house.appliance.logs()
    house.settled()
