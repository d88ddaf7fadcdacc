"""Many at once, and some that misbehave: what they held comes back, and the others are served meanwhile."""

import asyncio
import contextlib
import os
import random
import time
from pathlib import Path

import grpc
import pytest

from appliance.client.connection import connection_from
from appliance.client.requests import generate_request
from appliance.protos import inference_pb2 as api
from appliance.protos import inference_pb2_grpc
from tests.e2e.appliance import ALIAS, eventually
from tests.faults.house import LIMIT_S, TENANT, Ended, House, Running, ends, load

pytestmark = pytest.mark.timeout(600)  # on a busy machine the appliance alone takes a minute to start
CONNECTIONS = 5  # one carries at most 256 calls
MOST_FDS_MORE = 8
MOST_BYTES_MORE = 96 << 20  # what a thousand streams at once need at their peak stays with the allocators
SPECIFIED = {(grpc.StatusCode.OK, ""), (grpc.StatusCode.CANCELLED, "CANCELLED")}
SOAK_S = float(os.environ.get("CLOISTER_SOAK_SECONDS", "1800"))


def descriptors(house: House) -> dict[str, int]:
    """Open files and sockets of each process."""
    return {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in house.processes().items()}


def resident(house: House) -> dict[str, int]:
    """Bytes of memory of each process."""
    pages = {name: Path(f"/proc/{pid}/statm").read_text().split()[1] for name, pid in house.processes().items()}
    return {name: int(count) * os.sysconf("SC_PAGESIZE") for name, count in pages.items()}


async def storm(house: House, count: int, chance: random.Random) -> list[Ended]:
    """So many streams at once, half of which go away at random moments; how they ended."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(house.client()) for _ in range(CONNECTIONS)]
        streams = [Running(clients[n % CONNECTIONS], max_tokens=8, timeout=600.0) for n in range(count)]
        leaving = chance.sample(streams, count // 2)
        longest = 2.0 + count / 100
        loop = asyncio.get_running_loop()
        for stream in leaving:
            loop.call_later(chance.uniform(0, longest), stream.cancel)
        return await ends(streams)


async def test_a_thousand_streams_half_of_them_cancelled_leave_nothing_behind(house: House) -> None:
    chance = random.Random(4711)
    await storm(house, 100, chance)
    house.settled()
    fds, memory = descriptors(house), resident(house)
    with house.as_it_was():
        ended = await storm(house, 1000, chance)
    assert {(end.status, end.code) for end in ended} == SPECIFIED
    assert sum(end.status is grpc.StatusCode.OK for end in ended) >= 500
    assert all(end.tokens == 8 for end in ended if end.status is grpc.StatusCode.OK)
    eventually(lambda: grown(fds, descriptors(house), MOST_FDS_MORE) == {}, "the descriptors are closed", LIMIT_S)
    assert grown(memory, resident(house), MOST_BYTES_MORE) == {}


def grown(before: dict[str, int], after: dict[str, int], allowed: int) -> dict[str, int]:
    """By how much each process holds more than is allowed."""
    return {name: after[name] - before[name] for name in before if after[name] - before[name] > allowed}


async def test_clients_that_never_read_hold_up_nobody(house: House) -> None:
    """Each asks for more than its connection holds and reads none of it; HTTP/2's windows stay as they begin."""
    options = (("grpc.http2.bdp_probe", 0), ("grpc.enable_retries", 0))
    deaf = connection_from(house.appliance.credentials, None)
    with house.as_it_was():
        async with (
            grpc.aio.secure_channel(deaf.address, deaf.credentials, options=options) as channel,
            house.client() as other,
        ):
            generate = inference_pb2_grpc.InferenceServiceStub(channel).Generate
            calls = [generate(a_large_request(f"deaf {n}"), metadata=deaf.metadata) for n in range(2)]
            served = [await Running(other, max_tokens=8).end for _ in range(4)]
            assert {(end.status, end.tokens) for end in served} == {(grpc.StatusCode.OK, 8)}
            await asyncio.to_thread(eventually, lambda: cut_off(house) == 2, "both are cut off", LIMIT_S)
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError, match="SLOW_CLIENT") as error:
                    _ = [event async for event in call]
                assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def a_large_request(text: str) -> api.GenerateRequest:
    """Its answers are about a megabyte."""
    return generate_request(
        ALIAS, text, None, {"ignore_eos": True, "n": 8, "logprobs": 20, "max_tokens": 900, "timeout": 600.0}
    )


def cut_off(house: House) -> int:
    """Requests that ended because their client did not read, as the audit log has them."""
    reasons = [record["body"]["facts"].get("reason") for record in house.appliance.records()]
    return reasons.count("SLOW_CLIENT")


async def test_a_worker_with_few_pages_preempts_and_completes_every_answer(house: House) -> None:
    load(house.appliance, "few", "--kv-blocks", "80", "--max-running", "16")
    house.appliance.cloister("tenant", "set", TENANT, "--models", f"{ALIAS},few")
    pid = house.appliance.pid_of("worker", "few")
    async with house.client() as client:
        answers = [Running(client, "few", max_tokens=300, timeout=600.0) for _ in range(16)]
        ended = await ends(answers)
    assert {(end.status, end.tokens) for end in ended} == {(grpc.StatusCode.OK, 300)}
    counters = house.worker("few")
    assert counters.preemptions > 0
    eventually(lambda: house.owned("few") == 0, "every page is free", LIMIT_S)
    assert house.appliance.pid_of("worker", "few") == pid
    house.appliance.cloister("tenant", "set", TENANT, "--models", ALIAS)
    house.appliance.cloister("alias", "remove", "few")
    house.appliance.cloister("model", "unload", "few")


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 600)
async def test_memory_descriptors_and_pages_stay_level_under_storms_for_half_an_hour(house: House) -> None:
    """Equal waves, again and again; CLOISTER_SOAK_SECONDS sets how long. The second half may not grow."""
    chance, samples = random.Random(1147), list[tuple[dict[str, int], dict[str, int]]]()
    until = time.monotonic() + SOAK_S
    while time.monotonic() < until or len(samples) < 4:
        ended = await storm(house, 200, chance)
        assert {(end.status, end.code) for end in ended} <= SPECIFIED
        house.settled()
        samples.append((descriptors(house), resident(house)))
        print(len(samples), *(f"{k} {samples[-1][0][k]} fds {v >> 20} MiB" for k, v in samples[-1][1].items()))
    middle, last = samples[len(samples) // 2], samples[-1]
    assert grown(middle[0], last[0], MOST_FDS_MORE) == {}
    assert grown(middle[1], last[1], 16 << 20) == {}
