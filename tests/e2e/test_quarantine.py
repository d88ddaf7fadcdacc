"""A request that kills the engine twice is kept away from it, on record; what ran beside it is not."""

import json
import os
import signal
from collections.abc import Iterator

import grpc
import pytest

from appliance.client import Client, CloisterError, Stream
from tests.e2e.appliance import ALIAS, Appliance, eventually, running_appliance

POISON = "the request under which the worker is killed"
LONG = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 900}


@pytest.fixture(scope="module")
def victim() -> Iterator[Appliance]:
    with running_appliance() as running:
        yield running


def begun(client: Client, text: str) -> Stream:
    """A long answer of which the first piece has come."""
    stream = client.generate(ALIAS, text, **LONG)
    next(stream)
    return stream


def killed_over(appliance: Appliance, client: Client, *texts: str) -> None:
    """The worker dies while it has these requests; by hand, because nothing in the house knows what kills it."""
    pid = appliance.deployment()["worker_pid"]
    streams = [begun(client, text) for text in texts]
    os.kill(pid, signal.SIGKILL)
    assert all(map(aborted, streams))
    eventually(lambda: appliance.deployment()["worker_pid"] not in (0, pid), "another worker")
    eventually(lambda: appliance.deployment()["state"] == "ready", "the worker is ready again")


def aborted(stream: Stream) -> bool:
    """The rest of `stream` ends because the engine did."""
    with pytest.raises(CloisterError) as error:
        list(stream)
    return (error.value.status, error.value.code) == (grpc.StatusCode.ABORTED, "ENGINE_RESTARTED")


def test_the_same_request_beside_two_deaths_is_refused_and_its_neighbour_is_not(victim: Appliance) -> None:
    with victim.client() as client:
        killed_over(victim, client, POISON, "a neighbour")
        killed_over(victim, client, POISON, "a stranger")
        with pytest.raises(CloisterError) as error:
            list(client.generate(ALIAS, POISON, **LONG))
        assert (error.value.status, error.value.code) == (
            grpc.StatusCode.FAILED_PRECONDITION, "REQUEST_QUARANTINED",
        )  # fmt: skip
        for text in ("a neighbour", "a stranger", POISON + "?"):
            assert client.generate(ALIAS, text, **LONG).result().completed.usage.completion_tokens == 900
    refused = [json.dumps(r["body"]) for r in victim.records() if r["kind"] == "inference.refused"]
    assert ["REQUEST_QUARANTINED" in body for body in refused] == [True]
    assert POISON not in victim.logs()
    status = victim.status()
    assert (status["open_leases"], status["reserved_tokens"], victim.owned_pages()) == (0, 0, 0)
    assert victim.json("audit", "verify")["open_intents"] == 0
