"""The gateway as `cloister serve` starts it: ready, reported, silent about secrets, drained on SIGTERM."""

import asyncio
import json
import shutil
import signal
import socket
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from appliance.client import AsyncClient, CloisterError
from appliance.gateway.__main__ import FORBIDDEN
from engine.process import child_environment
from tests.appliance.gateway_house import API_KEY, AUTHORITY, CLIENT, House, make_home, say

CANARY = "zebra-canary-4711"


@pytest.fixture
async def house() -> AsyncIterator[House]:
    """The gateway's neighbours; the gateway itself is a process of its own."""
    home = make_home()
    house = House(home)
    await house.start_control()
    await house.start_text()
    await house.start_worker()
    yield house
    for server in house.servers.values():
        await server.stop(None)
    shutil.rmtree(home, ignore_errors=True)


@asynccontextmanager
async def process(home: Path, listen: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, socket.socket]]:
    """`python -m appliance.gateway`, ended with the test, and where it says READY."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(home / "notify"))
        started = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "appliance.gateway", "--home", str(home), "--listen", listen,
            stderr=asyncio.subprocess.PIPE, env=child_environment(home / "notify"),
        )  # fmt: skip
        try:
            yield started, notify
        finally:
            if started.returncode is None:
                started.kill()
                await started.wait()


@asynccontextmanager
async def running(house: House) -> AsyncIterator[tuple[asyncio.subprocess.Process, AsyncClient]]:
    """The process once it said READY, and a client of the address it reported to control."""
    async with process(house.home, "127.0.0.1:0") as (started, notify):
        assert await asyncio.to_thread(notify.recv, 100) == b"READY=1"
        await house.control.arrived["Heartbeat"].wait()
        address = house.control.asked("Heartbeat")[0].address
        client = AsyncClient(
            address, ca=AUTHORITY.pem, certificate=CLIENT.certificate, key=CLIENT.key, api_key=API_KEY
        )
        async with client:
            yield started, client


async def test_it_serves_and_sigterm_finishes_what_runs_and_exits_0(house: House) -> None:
    proceed = asyncio.Event()

    async def script(submit: Any, send: Any) -> None:
        send("Hel", [1])
        await proceed.wait()
        await say("lo")(submit, send)

    house.worker.script = script
    async with running(house) as (gateway, client):
        stream = client.generate("notes", "x")
        assert await anext(stream) == "Hel"
        gateway.send_signal(signal.SIGTERM)
        proceed.set()
        assert (await stream.result()).text == "Hello"
        assert await gateway.wait() == 0
    assert len({beat.gateway_id for beat in house.control.asked("Heartbeat")}) == 1
    assert (await house.settled()).finish_reason == "stop"


async def test_no_prompt_answer_key_or_certificate_is_logged(house: House) -> None:
    house.worker.script = say(CANARY)
    request_id = str(uuid.uuid4())
    async with running(house) as (gateway, client):
        await client.chat("notes", [{"role": "user", "content": CANARY}], stop=[CANARY + "x"]).result()
        await client.generate("notes", CANARY, request_id=request_id).result()
        for arguments in ({"temperature": -1.0}, {"request_id": CANARY}, {"max_tokens": 10_000}):
            with pytest.raises(CloisterError):
                await client.generate(CANARY, CANARY, retry=False, **arguments).result()
        await house.kill("worker-notes")
        with pytest.raises(CloisterError):
            await client.generate("notes", CANARY, retry=False).result()
        gateway.terminate()
        _, written = await gateway.communicate()
    log = written.decode()
    assert request_id in log
    assert {json.loads(line)["process"] for line in log.splitlines()} == {"gateway"}
    for secret in (CANARY, API_KEY, API_KEY.split("_")[2], "BEGIN", "lease-ticket"):
        assert secret not in log


async def test_a_request_whose_worker_is_killed_leaves_no_word_of_it_in_the_log(house: House) -> None:
    async def script(submit: Any, send: Any) -> None:
        send(CANARY, [1])
        await asyncio.Event().wait()

    house.worker.script = script
    request_id = str(uuid.uuid4())
    async with running(house) as (gateway, client):
        stream = client.generate("notes", CANARY, stop=[CANARY, CANARY + "y"], request_id=request_id)
        assert await anext(stream) == CANARY
        await house.kill("worker-notes")
        with pytest.raises(CloisterError, match="ENGINE_RESTARTED") as error:
            await anext(stream)
        gateway.terminate()
        _, written = await gateway.communicate()
    log = written.decode()
    assert request_id in log
    assert "session broke" in log
    for secret in (CANARY, API_KEY, "lease-ticket"):
        assert secret not in log + str(error.value)
    recorded = [request for name, request in house.control.calls if name != "Authorize"]
    assert not [request for request in recorded if CANARY.encode() in request.SerializeToString()]


async def test_its_process_holds_no_forbidden_module() -> None:
    code = "import sys, appliance.gateway.__main__; print(*{m.partition('.')[0] for m in sys.modules})"
    done = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    written, _ = await done.communicate()
    loaded = set(written.decode().split())
    assert "grpc" in loaded
    assert loaded.isdisjoint({*FORBIDDEN, "cryptography", "pydantic"})


async def test_a_port_that_is_taken_is_named(house: House) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        async with process(house.home, listen) as (gateway, _):
            _, written = await gateway.communicate()
    assert gateway.returncode == 1
    assert f"LISTEN_FAILED: cannot listen on {listen}" in written.decode()


async def test_a_home_without_certificates_is_refused_with_what_to_do(tmp_path: Path) -> None:
    async with process(tmp_path, "127.0.0.1:0") as (gateway, _):
        _out, written = await gateway.communicate()
    assert gateway.returncode == 1
    assert "NOT_INITIALISED" in written.decode()
    assert "cloister init" in written.decode()
