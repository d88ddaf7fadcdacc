"""The importer as a process: it serves its socket, shares one import among callers, and stops when told."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import grpc
import pytest

from bundles.content.inspector import Inspector, Verdict
from bundles.importer.importing import Workplace
from bundles.importer.jobs import Job, Jobs
from bundles.importer.service import ImporterService
from bundles.pipeline import State
from bundles.protos import importer_pb2 as pb
from bundles.protos import importer_pb2_grpc
from tests.bundles.making import INSPECTOR, Trust, make_bundle

ROOT = Path(__file__).parents[2]
JUDGING, RELEASED = threading.Event(), threading.Event()


@pytest.fixture
def home(trust: Trust) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cl-", dir="/tmp") as folder:
        home = Path(folder)
        (home / "run").mkdir()
        (home / "trust").mkdir()
        (home / "trust" / "1.root.json").write_bytes(trust.root.raw)
        yield home


def _start(home: Path, extra: str = "") -> "subprocess.Popen[bytes]":
    """The real process; returns when it says READY, as systemd would hear it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(home / "notify"))
        notify.settimeout(30)
        environment = os.environ | {"NOTIFY_SOCKET": str(home / "notify"), "PYTHONPATH": f"{extra}:{ROOT}"}
        command = [sys.executable, "-m", "bundles.importer", "--home", str(home)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=home)
        assert notify.recv(100) == b"READY=1"
    (home / "notify").unlink()
    return process


def test_the_process_imports_lists_and_drains(home: Path, bundle: Path) -> None:
    process = _start(home)
    try:
        assert (home / "run" / "importer.sock").stat().st_mode & 0o777 == 0o600
        with grpc.insecure_channel(f"unix:{home / 'run' / 'importer.sock'}") as channel:
            stub = importer_pb2_grpc.ImporterServiceStub(channel)
            told = list(stub.ImportBundle(pb.ImportBundleRequest(path=str(bundle)), timeout=30))
            with pytest.raises(grpc.RpcError) as relative:
                list(stub.ImportBundle(pb.ImportBundleRequest(path="tiny.bundle"), timeout=10))
            with pytest.raises(grpc.RpcError) as unknown:
                stub.GetModelVersion(pb.GetModelVersionRequest(reference="nobody"), timeout=10)
    finally:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    # The tiny model is none that the real engine-inspect knows: the refusal is its own, told through the importer.
    assert told[0].state == pb.IMPORT_STATE_QUARANTINE
    assert told[-1].state == pb.IMPORT_STATE_REJECTED
    assert told[-2].state == pb.IMPORT_STATE_CONTENT
    assert told[-1].reason not in ("", "INSPECT_FAILED", "INSPECT_TIMEOUT", "INTERNAL")
    assert relative.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    assert process.returncode == 0
    assert all(json.loads(line) for line in log.splitlines())


def test_no_part_of_the_importer_loads_a_forbidden_module() -> None:
    program = (
        "import sys, pkgutil, importlib, bundles\n"
        "for m in pkgutil.walk_packages(bundles.__path__, 'bundles.'):\n"
        "    if not m.name.endswith('__main__'): importlib.import_module(m.name)\n"
        "print(sorted({'torch','tokenizers','jinja2','numpy','sqlalchemy','appliance'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"


class Held(Inspector):
    """Judges when it is allowed to."""

    def inspect(self, files: Mapping[str, int]) -> Verdict:
        JUDGING.set()
        RELEASED.wait(30)
        return INSPECTOR.inspect(files)


async def _until(job: Job, state: State) -> None:
    async for progress in job.watch():
        if progress.state is state:
            return


async def test_one_path_is_one_import_and_two_paths_queue(
    home: Path, bundle: Path, tmp_path: Path, trust: Trust
) -> None:
    second = make_bundle(tmp_path / "second.bundle", trust, sequence=2)
    JUDGING.clear()
    RELEASED.clear()
    place = Workplace.open(home, Held())
    jobs = Jobs(place, lambda: None)
    first = jobs.start(bundle)
    await _until(first, State.CONTENT)
    assert jobs.start(bundle) is first
    other = jobs.start(second)
    assert other is not first
    assert [entry.import_id for entry in place.ledger.outbox(0)] == [first.import_id] * 5, "the second waits"
    RELEASED.set()
    ended = [[p async for p in job.watch()] for job in (first, first, other)]
    assert [told[-1].state for told in ended] == [State.COMMITTED] * 3
    assert [p.state for p in ended[1]] == list(State)[:6], "a late caller hears every state"
    assert [v.sequence for v in place.ledger.versions()] == [1, 2]
    await jobs.stop()
    place.ledger.close()


async def test_an_import_goes_on_when_its_caller_leaves_and_the_outbox_tells_the_end(
    home: Path, bundle: Path
) -> None:
    JUDGING.clear()
    RELEASED.clear()
    place = Workplace.open(home, Held())
    stopping = asyncio.Event()
    jobs = Jobs(place, lambda: None)
    server = grpc.aio.server()
    importer_pb2_grpc.add_ImporterServiceServicer_to_server(ImporterService(jobs, place.ledger, stopping), server)
    server.add_insecure_port(f"unix:{home}/s")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{home}/s") as channel:
        stub = importer_pb2_grpc.ImporterServiceStub(channel)
        call = stub.ImportBundle(pb.ImportBundleRequest(path=str(bundle)))
        async for told in call:
            if told.state == pb.IMPORT_STATE_CONTENT:
                break
        call.cancel()
        RELEASED.set()
        outbox = stub.ReadOutbox(pb.ReadOutboxRequest())
        states = []
        async for entry in outbox:
            states.append(entry.state)
            if entry.state == pb.IMPORT_STATE_COMMITTED:
                break
        assert states == [1, 2, 3, 4, 5, 6]
        await stub.AcknowledgeOutbox(pb.AcknowledgeOutboxRequest(sequence=entry.sequence))
        assert place.ledger.outbox(0) == ()
        version = (await stub.GetModelVersion(pb.GetModelVersionRequest(reference="tiny"))).version
        listed = (await stub.ListModelVersions(pb.ListModelVersionsRequest())).versions
        assert (version.name, version.sequence, len(version.files)) == ("tiny", 1, 5)
        assert [(v.model_digest, len(v.files)) for v in listed] == [(version.model_digest, 0)]
        stopping.set()
        outbox.cancel()
    await jobs.stop()
    await server.stop(1)
    place.ledger.close()


async def test_stopping_interrupts_what_waits_and_records_it(home: Path, bundle: Path, tmp_path: Path) -> None:
    JUDGING.clear()
    RELEASED.clear()
    place = Workplace.open(home, Held())
    jobs = Jobs(place, lambda: None)
    first, other = jobs.start(bundle), jobs.start(Path(shutil.copy(bundle, tmp_path / "other")))
    await asyncio.to_thread(JUDGING.wait, 30)
    stop = asyncio.create_task(jobs.stop())
    await asyncio.sleep(0)
    RELEASED.set()
    await stop
    last = {entry.import_id: (entry.state, entry.reason) for entry in place.ledger.outbox(0)}
    assert last[first.import_id] == (State.COMMITTED, ""), "what was past its last check is not thrown away"
    assert (
        last[other.import_id] == (State.REJECTED, "SOURCE_UNREADABLE") or last[other.import_id][1] == "INTERRUPTED"
    )
    place.ledger.close()


async def test_a_database_that_cannot_be_written_ends_the_process(home: Path, bundle: Path) -> None:
    place = Workplace.open(home, INSPECTOR)
    failed = asyncio.Event()
    jobs = Jobs(place, failed.set)
    place.ledger.close()
    told = [p async for p in jobs.start(bundle).watch()]
    assert (told[-1].state, told[-1].reason) == (State.REJECTED, "INTERNAL")
    await asyncio.wait_for(failed.wait(), 5)
    await jobs.stop()
