"""engine-host: the desired deployments kept running, with the real processes on a tiny random Llama."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from engine.cores import usable_cores
from engine.host.child import ChildSpec
from engine.host.inventory import cpu_device
from engine.host.keeper import Keeper, RestartPolicy
from engine.protos import engine_pb2, engine_pb2_grpc
from tests.engine.processes import Running, running
from tests.engine.sessions import OPTIONS, Session, submit
from tests.engine.test_worker import flip_bit
from tests.engine.tiny_models import CONTEXT

LIMIT_S = 60.0
LOADING = engine_pb2.DEPLOYMENT_STATE_LOADING
READY = engine_pb2.DEPLOYMENT_STATE_READY
RESTARTING = engine_pb2.DEPLOYMENT_STATE_RESTARTING
DRAINING = engine_pb2.DEPLOYMENT_STATE_DRAINING
FAILED = engine_pb2.DEPLOYMENT_STATE_FAILED

Statuses = dict[str, engine_pb2.DeploymentStatus]


@dataclass
class Host:
    """A running engine-host, and what its watch has told."""

    running: Running
    stub: "engine_pb2_grpc.HostServiceAsyncStub"
    watch: "grpc.aio.UnaryStreamCall[engine_pb2.WatchDeploymentsRequest, engine_pb2.WatchDeploymentsResponse]"
    seen: list[Statuses]

    async def want(self, *deployments: engine_pb2.Deployment) -> None:
        await self.stub.Reconcile(engine_pb2.ReconcileRequest(deployments=deployments))

    async def until(self, holds: Callable[[Statuses], bool]) -> Statuses:
        """Watch until `holds`; the statuses that do."""
        async with asyncio.timeout(LIMIT_S):
            while not (self.seen and holds(self.seen[-1])):
                response = await self.watch.read()
                assert isinstance(response, engine_pb2.WatchDeploymentsResponse), "the watch ended"
                self.seen.append({status.name: status for status in response.deployments})
        return self.seen[-1]

    async def state(self, name: str, state: "engine_pb2.DeploymentState.ValueType") -> engine_pb2.DeploymentStatus:
        statuses = await self.until(lambda now: name in now and now[name].state == state)
        return statuses[name]

    def states(self, name: str) -> list[int]:
        """The states of a deployment in the order they were seen, repetitions left out."""
        every = [statuses[name].state for statuses in self.seen if name in statuses]
        return [state for i, state in enumerate(every) if i == 0 or every[i - 1] != state]


@pytest.fixture
async def host(tiny_store: tuple[Path, engine_pb2.FileSet], socket_dir: Path) -> AsyncIterator[Host]:
    store, _ = tiny_store
    run = socket_dir / "run"
    run.mkdir()
    argv = ("engine.host", "--run", str(run), "--store", str(store))
    async with (
        running(socket_dir, argv) as process,
        grpc.aio.insecure_channel(f"unix:{run / 'engine-host.sock'}") as channel,
    ):
        stub: engine_pb2_grpc.HostServiceAsyncStub = engine_pb2_grpc.HostServiceStub(channel)  # type: ignore[assignment]  # the aio channel makes it so
        yield Host(process, stub, stub.WatchDeployments(engine_pb2.WatchDeploymentsRequest()), [])


def deployment(files: engine_pb2.FileSet, name: str = "notes", **options: int) -> engine_pb2.Deployment:
    made = engine_pb2.Deployment(name=name, files=files, options=OPTIONS)
    made.options.MergeFrom(engine_pb2.DeploymentOptions(**options))
    return made


async def answer(status: engine_pb2.DeploymentStatus) -> tuple[list[int], list[int]]:
    """A prompt from the deployment's text process, and the tokens its worker answers with."""
    async with grpc.aio.insecure_channel(f"unix:{status.text_socket}") as text:
        message = engine_pb2.ChatMessage(role="user", content="Claim 4711?")
        conversation = engine_pb2.Conversation(messages=[message])
        stub = engine_pb2_grpc.TextServiceStub(text)
        prepared = await stub.Prepare(engine_pb2.PrepareRequest(conversation=conversation))
    async with grpc.aio.insecure_channel(f"unix:{status.worker_socket}") as worker:
        session = Session(worker)
        await session.send(submit(1, prepared.token_ids))
        return list(prepared.token_ids), (await session.finish(1)).token_ids


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> dict[str, int]:
    """Process ids of a process's children by their module."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        argv = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        found[argv[argv.index("-m") + 1]] = int(child)
    return found


async def gone(*pids: int) -> None:
    async with asyncio.timeout(LIMIT_S):
        while any(alive(pid) for pid in pids):
            await asyncio.sleep(0.01)


async def test_a_killed_worker_or_text_comes_back_and_unloading_leaves_nothing(
    host: Host, tiny_store: tuple[Path, engine_pb2.FileSet]
) -> None:
    _, files = tiny_store
    await host.want(deployment(files))
    ready = await host.state("notes", READY)
    assert host.states("notes") == [LOADING, READY]
    assert (ready.max_context_tokens, ready.model_digest) == (CONTEXT, files.model_digest)
    assert (list(ready.capabilities), ready.restarts) == (["generate", "chat"], 0)
    first = await answer(ready)

    os.kill(ready.worker_pid, signal.SIGKILL)
    died = await host.state("notes", RESTARTING)
    assert (died.reason, died.restarts) == ("WORKER_DIED", 1)
    assert "SIGKILL" in died.message
    back = await host.state("notes", READY)
    assert back.worker_pid not in (0, ready.worker_pid)
    assert await answer(back) == first

    os.kill(children(host.running.process.pid)["engine.text"], signal.SIGKILL)
    died = await host.state("notes", RESTARTING)
    assert (died.reason, died.restarts) == ("TEXT_DIED", 2)
    again = await host.state("notes", READY)
    assert again.worker_pid == back.worker_pid  # the weights stayed loaded
    assert await answer(again) == first

    await host.want(deployment(files))  # the same: kept
    processes = children(host.running.process.pid)
    assert processes["engine.worker"] == back.worker_pid
    await host.want()
    await host.until(lambda now: not now)
    assert DRAINING in host.states("notes")
    await gone(*processes.values())
    assert sorted(path.name for path in Path(ready.worker_socket).parent.iterdir()) == ["engine-host.sock"]


async def test_changed_weights_fail_for_good_until_reconciled_anew(
    host: Host, tiny_store: tuple[Path, engine_pb2.FileSet]
) -> None:
    store, files = tiny_store
    weights = next(file for file in files.files if file.path == "model.safetensors")
    place = store / "sha256" / weights.sha256[:2] / weights.sha256
    flip_bit(place)
    await host.want(deployment(files))
    failed = await host.state("notes", FAILED)
    assert (failed.reason, failed.restarts) == ("WEIGHTS_DIGEST_MISMATCH", 0)
    assert "model.safetensors" in failed.message
    assert RESTARTING not in host.states("notes")
    await host.until(lambda now: now["notes"].worker_pid == 0)

    flip_bit(place)
    await host.want(deployment(files))
    ready = await host.state("notes", READY)

    await host.want(deployment(files, max_context_tokens=64))  # other options: drained and started anew
    smaller = await host.until(lambda now: now["notes"].state == READY and now["notes"].max_context_tokens == 64)
    assert smaller["notes"].worker_pid != ready.worker_pid
    assert smaller["notes"].restarts == 0
    processes = children(host.running.process.pid)
    assert await host.running.terminate() == 0
    assert not any(alive(pid) for pid in processes.values())


async def test_children_die_with_a_killed_host(host: Host, tiny_store: tuple[Path, engine_pb2.FileSet]) -> None:
    await host.want(deployment(tiny_store[1]))
    await host.until(lambda now: "notes" in now)
    async with asyncio.timeout(LIMIT_S):
        while len(children(host.running.process.pid)) < 2:
            await asyncio.sleep(0.01)
    processes = children(host.running.process.pid)
    host.running.process.kill()
    await host.running.process.wait()
    await gone(*processes.values())


@pytest.mark.parametrize("names", [["../evil"], [""], ["a" * 33], ["Notes"], ["twice", "twice"]])
async def test_names_that_are_no_names_are_refused_and_nothing_starts(host: Host, names: list[str]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await host.want(*(engine_pb2.Deployment(name=name) for name in names))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (refused.value.details() or "").startswith("INVALID_DEPLOYMENT: ")
    assert await host.until(lambda now: True) == {}


async def test_the_inventory_names_this_machine(host: Host) -> None:
    inventory = await host.stub.GetInventory(engine_pb2.GetInventoryRequest())
    assert [(device.id, device.kind) for device in inventory.devices] == [("cpu", "cpu")]
    assert inventory.devices[0].cores == usable_cores()


def test_the_inventory_reads_the_kernels_files_and_honours_the_memory_limit(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Example 9000\n")
    (tmp_path / "meminfo").write_text("MemTotal:        2048 kB\nMemFree:          10 kB\nMemAvailable: 1024 kB\n")
    cpu = cpu_device(tmp_path, tmp_path)
    assert (cpu.name, cpu.memory_bytes) == ("Example 9000", 2048 * 1024)
    for allowed, memory in (("4096\n", 4096), ("max\n", 2048 * 1024)):
        (tmp_path / "memory.max").write_text(allowed)
        assert cpu_device(tmp_path, tmp_path).memory_bytes == memory


async def test_a_process_that_is_never_ready_is_ended_for_good(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ChildSpec("worker", "notes", socket_dir, socket_dir, b"", 20.0, 120.0)
    endless = (sys.executable, "-c", "import time; time.sleep(600)")
    monkeypatch.setattr(ChildSpec, "argv", property(lambda _: endless))
    keeper = Keeper(spec, lambda: None, RestartPolicy(load_limit_s=0.1))
    await asyncio.wait_for(keeper.run(asyncio.Event()), LIMIT_S)
    assert keeper.ending is not None
    assert (keeper.ending.code, keeper.ending.refused, keeper.restarts) == ("LOAD_TIMEOUT", True, 0)
    assert keeper.pid == 0


def test_restarts_back_off_and_are_forgiven_after_good_service() -> None:
    policy = RestartPolicy(first_delay_s=0.2, longest_delay_s=1.0, forgiven_after_s=30.0)
    delays: list[float] = []
    for served in (0.0, 0.0, 0.0, 0.0, 31.0, 0.0):
        delays.append(policy.delay_after(delays[-1] if delays else None, served))
    assert delays == [0.2, 0.4, 0.8, 1.0, 0.2, 0.4]


async def test_a_plan_is_what_the_worker_then_has(host: Host, tiny_store: tuple[Path, engine_pb2.FileSet]) -> None:
    wanted = deployment(tiny_store[1], kv_blocks=0)
    planned = (await host.stub.PlanDeployment(engine_pb2.PlanDeploymentRequest(deployment=wanted))).plan
    assert planned.fits
    await host.want(wanted)
    ready = await host.state("notes", READY)
    async with grpc.aio.insecure_channel(f"unix:{ready.worker_socket}") as channel:
        counters = await engine_pb2_grpc.WorkerServiceStub(channel).GetStatus(engine_pb2.GetStatusRequest())
    assert counters.blocks_total == planned.options.kv_blocks
    refused = engine_pb2.PlanDeploymentRequest(deployment=wanted, device="GPU-none")
    with pytest.raises(grpc.aio.AioRpcError, match="DEVICE_NOT_FOUND"):
        await host.stub.PlanDeployment(refused)
