"""engine-host's watchdog, with the real worker and text: what stands still is killed and serves again."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from engine.protos import engine_pb2, engine_pb2_grpc
from tests import mercy
from tests.engine.processes import running
from tests.engine.test_host import READY, RESTARTING, Host, answer, children, deployment

# Put into the engine's processes by the interpreter itself (the site module), and by nothing in the tree: a step
# that finds the file named here calls pause(2), with the interpreter's lock or without, and never comes back.
HANG = """
import ctypes, os, pathlib, sys
if "engine.worker" in sys.orig_argv:
    from engine.loop import EngineLoop
    healthy = EngineLoop.step
    def step(self):
        order = pathlib.Path(os.environ["TEST_HANG"])
        if order.exists():
            library = {"native": ctypes.CDLL, "native with the lock": ctypes.PyDLL}[order.read_text()]
            order.unlink()
            library(None).pause()
        return healthy(self)
    EngineLoop.step = step
"""


@pytest.fixture
async def host(
    tiny_store: tuple[Path, engine_pb2.FileSet], socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Host]:
    run = socket_dir / "run"
    run.mkdir()
    (socket_dir / "sitecustomize.py").write_text(mercy.PROGRAM + HANG)
    monkeypatch.setenv("PYTHONPATH", f"{socket_dir}:{Path(__file__).parents[2]}")
    monkeypatch.setenv("TEST_HANG", str(socket_dir / "hang"))
    monkeypatch.setenv("TEST_VICTIMS", str(socket_dir / "victims"))
    argv = ("engine.host", "--run", str(run), "--store", str(tiny_store[0]))
    limits = ("--heard-within", "0.6", "--step-within", "0.6")
    async with (
        running(socket_dir, (*argv, *limits)) as process,
        grpc.aio.insecure_channel(f"unix:{run / 'engine-host.sock'}") as channel,
    ):
        stub: engine_pb2_grpc.HostServiceAsyncStub = engine_pb2_grpc.HostServiceStub(channel)  # type: ignore[assignment]  # the aio channel makes it so
        yield Host(process, stub, stub.WatchDeployments(engine_pb2.WatchDeploymentsRequest()), [])


async def test_a_stopped_worker_and_a_stopped_text_are_killed_and_serve_again(
    host: Host, tiny_store: tuple[Path, engine_pb2.FileSet], socket_dir: Path
) -> None:
    await host.want(deployment(tiny_store[1]))
    ready = await host.state("notes", READY)
    first = await answer(ready)
    for role in ("worker", "text"):
        pid = children(host.running.process.pid)[f"engine.{role}"]
        mercy.give_up(socket_dir / "victims", pid)
        os.kill(pid, signal.SIGSTOP)
        died = await host.until(lambda now: now["notes"].state == RESTARTING and bool(now["notes"].reason))
        assert died["notes"].reason == "WATCHDOG"
        assert died["notes"].message == f"engine-{role} was silent for 0.6 s and was killed"
        again = await host.state("notes", READY)
        assert children(host.running.process.pid)[f"engine.{role}"] != pid
        assert await answer(again) == first


@pytest.mark.parametrize("hang", ["native", "native with the lock"])
async def test_a_step_that_never_comes_back_ends_its_worker_and_the_next_one_answers(
    host: Host, tiny_store: tuple[Path, engine_pb2.FileSet], socket_dir: Path, hang: str
) -> None:
    await host.want(deployment(tiny_store[1]))
    ready = await host.state("notes", READY)
    first = await answer(ready)
    (socket_dir / "hang").write_text(hang)
    mercy.give_up(socket_dir / "victims", ready.worker_pid)
    with pytest.raises(grpc.aio.AioRpcError):
        await asyncio.wait_for(answer(ready), 60)
    died = await host.until(lambda now: now["notes"].state == RESTARTING)
    assert died["notes"].reason == "WATCHDOG"
    again = await host.state("notes", READY)
    assert again.worker_pid != ready.worker_pid
    assert await answer(again) == first
