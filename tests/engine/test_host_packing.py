"""engine-host has weights packed before a worker starts: once, and never at the cost of an answer."""

import asyncio
import hashlib
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import pytest
from safetensors.torch import load_file, save_file

from engine.derived.location import UNFINISHED, Derived
from engine.host import packing
from engine.host.packing import Packer, derived_message
from engine.prepare.question import Compiling, read_question
from engine.protos import engine_pb2, engine_pb2_grpc
from tests.engine.processes import running
from tests.engine.quantised import FORMATS
from tests.engine.test_formats_served import Pair
from tests.engine.test_host import READY, Host, Statuses, answer, deployment
from tests.engine.test_worker import flip_bit
from tests.engine.tiny_models import into_store

LAYOUT = "cpu-float32-0123456789abcdef"


@pytest.fixture(scope="module")
def quantised(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, engine_pb2.FileSet]:
    """A store with the tiny Llama, its matrices in 8 bits."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("quantised") / "model"))
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    pair = Pair(config, tensors, *FORMATS["int8 (ours)"])
    (folder / "config.json").write_text(json.dumps(pair.quantised_config))
    save_file(pair.quantised, folder / "model.safetensors")
    store = folder.with_name("store")
    return store, into_store(folder, store)


@pytest.fixture
async def host(quantised: tuple[Path, engine_pb2.FileSet], socket_dir: Path) -> AsyncIterator[Host]:
    run = socket_dir / "run"
    run.mkdir()
    derived = ("--derived", str(socket_dir / "derived"), "--derive-mib", "0")
    argv = ("engine.host", "--run", str(run), "--store", str(quantised[0]), *derived)
    async with (
        running(socket_dir, argv) as process,
        grpc.aio.insecure_channel(f"unix:{run / 'engine-host.sock'}") as channel,
    ):
        stub: Any = engine_pb2_grpc.HostServiceStub(channel)
        yield Host(process, stub, stub.WatchDeployments(engine_pb2.WatchDeploymentsRequest()), [])


async def reconcile(host: Host, on_record: list[engine_pb2.Derived], *wanted: engine_pb2.Deployment) -> None:
    await host.stub.Reconcile(engine_pb2.ReconcileRequest(deployments=wanted, derived=on_record))


async def test_weights_are_packed_once_checked_at_each_start_and_packed_again_when_they_were_changed(
    host: Host, quantised: tuple[Path, engine_pb2.FileSet], socket_dir: Path
) -> None:
    wanted, folder = deployment(quantised[1]), socket_dir / "derived"
    await reconcile(host, [], wanted)
    first = await host.state("notes", READY)
    assert (first.reason, first.HasField("refused")) == ("", False)
    (file,) = folder.iterdir()
    assert file.name == f"{first.derived.model_digest}.{first.derived.layout}"
    assert first.derived.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (first.derived.size, file.stat().st_mode & 0o777) == (file.stat().st_size, 0o400)
    said = await answer(first)
    await reconcile(host, [first.derived], wanted)  # control has put it on record: nothing is started anew

    file.chmod(0o600)
    flip_bit(file)
    os.kill(first.worker_pid, signal.SIGKILL)

    def is_back(now: Statuses) -> bool:
        return now["notes"].state == READY and now["notes"].worker_pid != first.worker_pid

    second = (await host.until(is_back))["notes"]
    assert (second.reason, second.HasField("derived"), second.refused) == ("DERIVED_CHANGED", False, first.derived)
    assert file.name in second.message
    assert await answer(second) == said

    await reconcile(host, [first.derived], deployment(quantised[1], max_context_tokens=128))
    again = await host.until(lambda now: now["notes"].state == READY and now["notes"].max_context_tokens == 128)
    third = again["notes"]
    assert (third.reason, third.derived) == ("", first.derived)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == first.derived.sha256
    assert await answer(third) == said

    await reconcile(host, [first.derived])
    await host.until(lambda now: not now)
    assert list(folder.iterdir()) == [file]  # on record
    await reconcile(host, [])
    assert list(folder.iterdir()) == []


def packer(store: Path, folder: Path, **changes: Any) -> Packer:
    return Packer(store, folder, **({"least_bytes": 0} | changes))


async def test_two_deployments_of_a_model_share_one_file_and_what_is_on_record_is_not_made_again(
    quantised: tuple[Path, engine_pb2.FileSet], tmp_path: Path
) -> None:
    store, files = quantised
    folder = tmp_path / "derived"
    one = packer(store, folder)
    made = await asyncio.gather(*(one.packed(deployment(files, name)) for name in ("a", "b")))
    assert made[0] == made[1]
    (file,) = folder.iterdir()
    assert made[0].derived is not None
    before = file.stat()
    later = packer(store, folder)
    later.hear([derived_message(made[0].derived)], [])
    assert await later.packed(deployment(files)) == made[0]
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


async def test_what_cannot_be_packed_is_said_and_leaves_nothing(
    quantised: tuple[Path, engine_pb2.FileSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, files = quantised
    folder = tmp_path / "derived"
    slow = await packer(store, folder, limit_s=0.05).packed(deployment(files))
    assert slow.derived is None
    assert slow.problem.startswith("DERIVED_NOT_MADE: ")
    assert "PREPARE_TIMEOUT" in slow.problem
    monkeypatch.setattr(
        packing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 30)
    )
    full = await packer(store, folder).packed(deployment(files))
    assert "DISK_FULL" in full.problem
    assert list(folder.iterdir()) == []


async def test_engine_prepare_that_dies_half_way_is_said_and_the_next_one_begins_anew(
    quantised: tuple[Path, engine_pb2.FileSet], tmp_path: Path
) -> None:
    store, files = quantised
    one, folder = packer(store, tmp_path / "derived"), tmp_path / "derived"
    folder.mkdir()
    task = asyncio.create_task(one.packed(deployment(files)))
    async with asyncio.timeout(60):
        while not any(path.name.endswith(UNFINISHED) for path in folder.iterdir()) and not task.done():
            await asyncio.sleep(0)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    victims = [pid for pid in children if b"engine.prepare" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in victims:
        os.kill(int(pid), signal.SIGKILL)
    died = await task
    assert "PREPARE_FAILED" in died.problem
    one.hear([], [files.model_digest])
    assert list(folder.iterdir()) == []


async def test_a_small_model_a_plain_one_and_one_that_is_broken_are_left_to_their_workers(
    quantised: tuple[Path, engine_pb2.FileSet], tiny_store: tuple[Path, engine_pb2.FileSet], tmp_path: Path
) -> None:
    folder = tmp_path / "derived"
    broken = engine_pb2.FileSet(
        model_digest="ab" * 32, files=[engine_pb2.File(path="x", size=1, sha256="00" * 32)]
    )
    cases = [
        (Packer(quantised[0], folder), quantised[1]),
        (packer(tiny_store[0], folder), tiny_store[1]),
        (packer(quantised[0], folder), broken),
        (Packer(quantised[0], None, least_bytes=0), quantised[1]),
    ]
    for one, files in cases:
        assert await one.packed(deployment(files)) == packing.Packed()
    assert not folder.exists()


def test_of_a_deployment_on_a_cuda_device_the_kernels_are_asked_for_with_all_its_options(
    tiny_store: tuple[Path, engine_pb2.FileSet], tmp_path: Path
) -> None:
    device = engine_pb2.Device(id="GPU-a", kind="cuda", name="Example H200", compute_capability="9.0")
    one = packer(tiny_store[0], tmp_path, least_bytes=1 << 40, device={"GPU-a": device}.__getitem__)
    wanted = deployment(tiny_store[1])
    wanted.options.CopyFrom(engine_pb2.DeploymentOptions(device="GPU-a", kv_blocks=64, threads=1))
    job = one._job(wanted)
    assert job is not None
    question = read_question(BytesIO(json.dumps(one._question(job)).encode()))
    assert isinstance(question, Compiling)
    assert (question.device, question.capability) == ("Example H200", 90)
    assert (question.packing.options.backend, question.packing.options.kv_blocks) == ("triton", 64)
    assert question.packing.layout == job.location.derived.layout
    assert packing._environment(())["CUDA_VISIBLE_DEVICES"] == ""


async def test_a_folder_that_cannot_be_made_is_said_and_one_that_went_away_is_made_again(
    quantised: tuple[Path, engine_pb2.FileSet], tmp_path: Path
) -> None:
    store, files = quantised
    folder = tmp_path / "derived"
    folder.write_bytes(b"in the way")
    one = packer(store, folder)
    one.hear([], [files.model_digest])
    assert "File exists" in (await one.packed(deployment(files))).problem
    folder.unlink()
    one.hear([], [files.model_digest])
    assert (await one.packed(deployment(files))).derived is not None


def test_only_what_is_on_record_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "derived"
    folder.mkdir()
    (folder / "a folder of somebody's").mkdir()
    one = packer(tmp_path, folder)
    recorded, wanted, other = (Derived(digest * 32, LAYOUT, "ee" * 32, 1) for digest in ("aa", "bb", "cc"))
    for derived in (recorded, wanted, other):
        (folder / derived.name).write_bytes(b"x")
        (folder / (derived.name + UNFINISHED)).write_bytes(b"x")
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    unsound = engine_pb2.Derived(model_digest="../outside", layout=LAYOUT, sha256="ee" * 32, size=1)
    one.hear([derived_message(recorded), unsound], [wanted.model_digest])
    assert {path.name for path in folder.iterdir() if path.is_file()} == {recorded.name}
    assert outside.exists()
