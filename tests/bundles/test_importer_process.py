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
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from bundles.content.files import ModelFiles
from bundles.content.inspector import Inspector, Verdict
from bundles.format.errors import BundleError
from bundles.format.manifest import Kind
from bundles.importer import jobs as importer_jobs
from bundles.importer.importing import import_bundle, take_up
from bundles.importer.jobs import Job, Jobs
from bundles.importer.rate import Rate
from bundles.importer.records import Import
from bundles.importer.scrubbing import Pace, Scrubber
from bundles.importer.service import ImporterService
from bundles.importer.steering import Steering
from bundles.importer.workplace import Workplace
from bundles.pipeline import Progress, Report, State
from bundles.protos import importer_pb2 as pb
from bundles.protos import importer_pb2_grpc
from tests.bundles.making import INSPECTOR, Trust, make_bundle, split
from tests.bundles.stores import Unquestioning, spoil

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

    def inspect(self, files: ModelFiles, kind: Kind) -> Verdict:
        JUDGING.set()
        RELEASED.wait(30)
        return INSPECTOR.inspect(files, kind)


@asynccontextmanager
async def _served(
    place: Workplace, home: Path
) -> "AsyncIterator[tuple[Workplace, importer_pb2_grpc.ImporterServiceAsyncStub]]":
    """The service over a socket, and a client of it."""
    stopping = asyncio.Event()
    jobs, scrubber = Jobs(place, lambda: None), Scrubber(place, Pace(0, 0))
    server = grpc.aio.server()
    service = ImporterService(jobs, place, scrubber, stopping)
    importer_pb2_grpc.add_ImporterServiceServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{home}/s")
    await server.start()
    scrubber.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{home}/s") as channel:
            yield place, importer_pb2_grpc.ImporterServiceStub(channel)
    finally:
        stopping.set()
        await jobs.stop()
        await asyncio.to_thread(scrubber.stop)
        await server.stop(1)
        place.ledger.close()


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
    waiting = [entry.state for entry in place.ledger.outbox(0) if entry.import_id == other.import_id]
    assert set(waiting) <= {State.QUARANTINE}, "the second waits"
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
    async with _served(Workplace.open(home, Held()), home) as (place, stub):
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
        assert [(c.match, c.expected, c.messages[0].content) for c in version.canaries] == [("exact", "2", "1+1=")]
        assert [(given.spdx, given.accept) for given in version.licences] == [("NOASSERTION", False)]
        assert (version.revoked, list(version.damaged), version.approvals_required) == ("", [], 0)
        assert version.imported_at >= version.issued_at > 0
        outbox.cancel()


async def test_stopping_leaves_what_waits_and_the_next_importer_goes_on_with_it(
    home: Path, bundle: Path, tmp_path: Path, trust: Trust
) -> None:
    JUDGING.clear()
    RELEASED.clear()
    place = Workplace.open(home, Held())
    jobs = Jobs(place, lambda: None)
    second = make_bundle(tmp_path / "second.bundle", trust, sequence=2)
    first, other = jobs.start(bundle), jobs.start(second)
    await asyncio.to_thread(JUDGING.wait, 30)
    stop = asyncio.create_task(jobs.stop())
    await asyncio.sleep(0)
    RELEASED.set()
    with pytest.raises(BundleError, match="STOPPING"):
        [_ async for _ in other.watch()]
    await stop
    last = {entry.import_id: (entry.state, entry.reason) for entry in place.ledger.outbox(0)}
    assert last[first.import_id] == (State.COMMITTED, ""), "what was past its last check is not thrown away"
    assert last[other.import_id] == (State.QUARANTINE, "")
    place.ledger.close()
    again = Workplace.open(home, Held())
    jobs = Jobs(again, lambda: None)
    jobs.take_up()
    assert [(held.import_id, held.path) for held in jobs.running()] == [(other.import_id, str(second))]
    assert [p async for p in jobs.start(second).watch()][-1].state is State.COMMITTED
    states = [entry.state for entry in again.ledger.outbox(0) if entry.import_id == other.import_id]
    assert states == list(State)[:6]
    await jobs.stop()
    again.ledger.close()


async def test_what_is_taken_up_keeps_its_order_whichever_thread_begins_first(
    home: Path, bundle: Path, tmp_path: Path, trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer release that came first would end the older one, a delta its base."""
    place = Workplace.open(home, Unquestioning())
    paths = [bundle, *(make_bundle(tmp_path / f"{n}.bundle", trust, sequence=n) for n in (2, 3))]
    for path in paths:
        place.ledger.begin(path.name, path)
    at_its_place = threading.Event()

    def late(place: Workplace, left: Import, report: Report, steering: Steering) -> Progress:
        if left.path == str(paths[-1]):
            threading.Timer(0.2, at_its_place.set).start()
        else:
            at_its_place.wait(30)
        return take_up(place, left, report, steering)

    monkeypatch.setattr(importer_jobs, "take_up", late)
    jobs = Jobs(place, lambda: None)
    jobs.take_up()
    ended = [[p async for p in jobs.start(path).watch()][-1] for path in paths]
    assert [(p.state, p.reason) for p in ended] == [(State.COMMITTED, "")] * 3
    assert [version.sequence for version in place.ledger.versions()] == [1, 2, 3]
    await jobs.stop()
    place.ledger.close()


async def test_a_database_that_cannot_be_written_ends_the_process(home: Path, bundle: Path) -> None:
    place = Workplace.open(home, INSPECTOR)
    failed = asyncio.Event()
    jobs = Jobs(place, failed.set)
    place.ledger.close()
    with pytest.raises(BundleError, match="STOPPING"):
        [_ async for _ in jobs.start(bundle).watch()]
    await asyncio.wait_for(failed.wait(), 5)
    await jobs.stop()


async def _states(stub: "importer_pb2_grpc.ImporterServiceAsyncStub", path: Path) -> list[pb.ImportBundleResponse]:
    return [told async for told in stub.ImportBundle(pb.ImportBundleRequest(path=str(path)))]


async def test_a_volume_is_offered_imports_are_listed_and_one_that_waits_is_cancelled(
    home: Path, bundle: Path, tmp_path: Path, trust: Trust
) -> None:
    first = split(bundle, trust, 5, 1)
    for index in (2, 3):
        (tmp_path / str(index)).mkdir()
        shutil.move(first.with_suffix(f".00{index}"), tmp_path / str(index))
    second = tmp_path / "2" / first.with_suffix(".002").name
    async with _served(Workplace.open(home, INSPECTOR), home) as (_, stub):
        call = stub.ImportBundle(pb.ImportBundleRequest(path=str(first)))
        wanted = await _wanted(call, 2)
        listed = (await stub.ListImports(pb.ListImportsRequest())).imports
        assert [(i.path, i.progress.volume_wanted) for i in listed] == [(str(first), 2)]
        for path, code in ((first, "VOLUME_ORDER"), (tmp_path, "HEADER")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.OfferVolume(pb.OfferVolumeRequest(import_id=wanted.import_id, path=str(path)))
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert (refused.value.details() or "").startswith((code, "CONTAINER"))
        await stub.OfferVolume(pb.OfferVolumeRequest(import_id=wanted.import_id, path=str(second)))
        await _wanted(call, 3)
        await stub.CancelImport(pb.CancelImportRequest(import_id=wanted.import_id))
        listed = (await stub.ListImports(pb.ListImportsRequest())).imports
        assert [(i.progress.state, i.progress.reason) for i in listed] == [(7, "IMPORT_CANCELLED")]
        assert listed[0].changed_ns >= listed[0].started_ns > 0
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.CancelImport(pb.CancelImportRequest(import_id=wanted.import_id))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        store = await stub.GetStore(pb.GetStoreRequest())
        assert (store.files, store.staged_bytes > 0) == (0, True)
        for index in (2, 3):
            shutil.move(tmp_path / str(index) / first.with_suffix(f".00{index}").name, tmp_path)
        assert (await _states(stub, first))[-1].state == pb.IMPORT_STATE_COMMITTED


async def _wanted(call: AsyncIterator[pb.ImportBundleResponse], volume: int) -> pb.ImportBundleResponse:
    async for told in call:
        if told.volume_wanted == volume:
            return told
    raise AssertionError("the import ended")


async def test_the_store_is_scrubbed_mended_and_emptied_and_every_event_is_told(home: Path, bundle: Path) -> None:
    async with _served(Workplace.open(home, INSPECTOR), home) as (place, stub):
        await _states(stub, bundle)
        weights = next(f for f in place.ledger.versions()[0].files if f["path"] == "model.safetensors")
        spoil(place.store.path_of(str(weights["sha256"])))
        told = [step async for step in stub.ScrubStore(pb.ScrubStoreRequest())]
        assert told[-1].ended
        assert [(d.finding, list(d.used_by)) for d in told[-1].damaged] == [
            ("changed", ["tiny@1.0.1 model.safetensors"])
        ]
        version = (await stub.GetModelVersion(pb.GetModelVersionRequest(reference="tiny"))).version
        assert list(version.damaged) == ["model.safetensors"]
        await _states(stub, bundle)
        store = await stub.GetStore(pb.GetStoreRequest())
        assert (list(store.damaged), store.listed_bytes, store.scrubbed_at > 0) == ([], version.total_size, True)
        removed = await stub.RemoveModelVersion(pb.RemoveModelVersionRequest(reference="tiny@1.0.1"))
        assert (removed.model_version, removed.freed_bytes) == ("tiny@1.0.1", store.bytes)
        with pytest.raises(grpc.aio.AioRpcError) as gone:
            await stub.RemoveModelVersion(pb.RemoveModelVersionRequest(reference="tiny@1.0.1"))
        assert gone.value.code() is grpc.StatusCode.NOT_FOUND
        events = [entry.event for entry in place.ledger.outbox(0) if entry.event != "import"]
        assert events == ["damage", "repair", "removal"]
        assert not (await stub.ListModelVersions(pb.ListModelVersionsRequest())).versions


def test_of_imports_that_ended_the_last_hundred_are_remembered(home: Path) -> None:
    place = Workplace.open(home, INSPECTOR)
    for number in range(105):
        import_bundle(place, f"import-{number}", home / "nothing", lambda _: None)
    assert [held.import_id for held in place.ledger.ended()] == [f"import-{n}" for n in range(104, 4, -1)]
    assert place.ledger.ended()[0].progress.reason == "SOURCE_UNREADABLE"
    place.ledger.close()


def test_the_rate_is_that_of_the_last_seconds() -> None:
    now = 0.0
    rate = Rate(lambda: now, window=10.0)
    assert rate(0) == 0
    for second in range(1, 31):
        now = float(second)
        assert rate(second * 100) == 100
    for second in range(31, 60):
        now = float(second)
        told = rate(3000 + (second - 30) * 500)
    assert told == 500
    rate.pause()
    now += 1000
    assert rate(99_999) == 0
    now += 1
    assert rate(100_009) == 10
