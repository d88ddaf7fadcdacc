"""The importer process killed by SIGKILL, between volumes and inside one; what the next does unasked."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from bundles.protos import importer_pb2 as pb
from bundles.protos import importer_pb2_grpc
from tests.bundles.making import Trust, sha256
from tests.bundles.test_taking_up import media, unplugged

ROOT = Path(__file__).parents[2]
STREAMING, COMMITTED, REJECTED = pb.IMPORT_STATE_STREAMING, pb.IMPORT_STATE_COMMITTED, pb.IMPORT_STATE_REJECTED
LIMIT_S = 60


@pytest.fixture
def home(trust: Trust) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cl-", dir="/tmp") as folder:
        home = Path(folder)
        (home / "run").mkdir()
        (home / "trust").mkdir()
        (home / "trust" / "1.root.json").write_bytes(trust.root.raw)
        yield home


class Serving:
    """One importer process, and a client of it."""

    def __init__(self, process: "subprocess.Popen[bytes]", stub: "importer_pb2_grpc.ImporterServiceStub") -> None:
        self.process, self.stub = process, stub

    def begin(self, path: Path) -> str:
        """The id of an import that somebody began and did not watch."""
        call = self.stub.ImportBundle(pb.ImportBundleRequest(path=str(path)), timeout=LIMIT_S)
        import_id = next(iter(call)).import_id
        call.cancel()
        return import_id

    def dies_of(self, path: Path) -> None:
        """Begin an import that the process is killed in."""
        request = pb.ImportBundleRequest(path=str(path))
        with pytest.raises(grpc.RpcError):
            list(self.stub.ImportBundle(request, timeout=LIMIT_S, wait_for_ready=True))
        assert self.process.wait(LIMIT_S) == -signal.SIGKILL

    def the_import(self) -> pb.Import:
        (found,) = self.stub.ListImports(pb.ListImportsRequest(), timeout=LIMIT_S).imports
        return found

    def until(self, volume: int = 0, state: int = STREAMING) -> pb.ImportBundleResponse:
        """Look until the import waits for a volume, or is in a state; nobody joins it."""
        deadline = time.monotonic() + LIMIT_S
        while (told := self.the_import().progress).volume_wanted != volume or told.state != state:
            assert time.monotonic() < deadline, told
            time.sleep(0.02)
        return told

    def offer(self, import_id: str, path: Path) -> None:
        self.stub.OfferVolume(pb.OfferVolumeRequest(import_id=import_id, path=str(path)), timeout=LIMIT_S)

    def events(self) -> list[tuple[str, int]]:
        """Import and state of every event of an import, acknowledged as control does."""
        found: list[tuple[str, int]] = []
        call = self.stub.ReadOutbox(pb.ReadOutboxRequest(), timeout=LIMIT_S)
        for entry in call:
            found.append((entry.import_id, entry.state))
            self.stub.AcknowledgeOutbox(pb.AcknowledgeOutboxRequest(sequence=entry.sequence), timeout=LIMIT_S)
            if entry.state in (COMMITTED, REJECTED):
                call.cancel()
                return found
        raise AssertionError(found)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(home: Path, dying_at: int = 0) -> Iterator[Serving]:
    """The process, from READY; it is stopped at the end if it lives still."""
    with started(home, dying_at) as (process, notify):
        assert notify.recv(100) == b"READY=1"
        with grpc.insecure_channel(f"unix:{home / 'run' / 'importer.sock'}") as channel:
            yield Serving(process, importer_pb2_grpc.ImporterServiceStub(channel))


@contextmanager
def started(home: Path, dying_at: int) -> Iterator[tuple["subprocess.Popen[bytes]", socket.socket]]:
    """The process, and where it says that it is ready."""
    command = [sys.executable, str(Path(__file__).with_name("dying_importer.py")), "--home", str(home)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(home / "notify"))
        notify.settimeout(LIMIT_S)
        environment = os.environ | {
            "NOTIFY_SOCKET": str(home / "notify"), "PYTHONPATH": str(ROOT), "DYING_AT": str(dying_at),
        }  # fmt: skip
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, cwd=home)
        try:
            yield process, notify
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(LIMIT_S)
            (home / "notify").unlink()


def dies(home: Path, at: int) -> None:
    """A process that is killed at a record of what it takes up by itself, once it is ready."""
    with started(home, at) as (process, notify):
        assert notify.recv(100) == b"READY=1", "no import keeps it from that"
        assert process.wait(LIMIT_S) == -signal.SIGKILL


def whole_store(home: Path) -> dict[str, bytes]:
    held = {path.name: path.read_bytes() for path in (home / "store" / "sha256").glob("*/*")}
    assert all(sha256(content) == name for name, content in held.items())
    assert list((home / "store" / "staging").iterdir()) == []
    return held


def test_killed_between_volumes_and_inside_one_it_goes_on_by_itself_to_the_same_bytes(
    home: Path, tmp_path: Path, trust: Trust
) -> None:
    first, second, third = media(tmp_path, trust, 3, 4)
    with serving(home) as served:
        import_id = served.begin(first)
        served.until(volume=2)
        served.kill()
    unplugged(first)
    with serving(home) as served:
        assert served.until(volume=2).import_id == import_id
        assert served.the_import().path == str(first)
        served.kill()
    second = second.rename(first.with_name(second.name))  # its medium is where the first one's was
    dies(home, at=2)
    with serving(home) as served:
        assert served.until(volume=3).import_id == import_id
        unplugged(second)
        served.kill()
    with serving(home) as served:
        served.until(volume=3)
        served.offer(import_id, third)
        ended = served.until(state=COMMITTED)
        assert (ended.import_id, ended.bytes_done) == (import_id, ended.bytes_total)
        assert ended.bytes_reused > ended.bytes_total // 2, "only the last volume's chunks were read"
        assert served.events() == [(import_id, state) for state in range(1, 7)]
        version = served.stub.GetModelVersion(pb.GetModelVersionRequest(reference="tiny"), timeout=LIMIT_S).version
    assert {file.sha256 for file in version.files} <= whole_store(home).keys()


def test_a_cancelled_import_stays_cancelled_over_a_kill(home: Path, tmp_path: Path, trust: Trust) -> None:
    first, _ = media(tmp_path, trust, 5)
    with serving(home) as served:
        import_id = served.begin(first)
        served.until(volume=2)
        served.stub.CancelImport(pb.CancelImportRequest(import_id=import_id), timeout=LIMIT_S)
        served.kill()
    with serving(home) as served:
        told = served.the_import().progress
        assert (told.import_id, told.state, told.reason) == (import_id, REJECTED, "IMPORT_CANCELLED")
        assert served.events()[-1] == (import_id, REJECTED)


def test_a_medium_that_is_back_at_its_path_is_taken_when_the_same_import_is_asked_for(
    home: Path, bundle: Path
) -> None:
    with serving(home, dying_at=1) as served:
        served.dies_of(bundle)
    elsewhere = unplugged(bundle)
    with serving(home) as served:
        import_id = served.until(volume=1).import_id
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(LIMIT_S) == 0
    with serving(home) as served:
        assert served.until(volume=1).import_id == import_id, "a stop is no end"
        elsewhere.rename(bundle)
        told = list(served.stub.ImportBundle(pb.ImportBundleRequest(path=str(bundle)), timeout=LIMIT_S))
        assert {step.volume_wanted for step in told} == {0}, "who asks is not sent for it"
        assert (told[-1].state, told[-1].import_id) == (COMMITTED, import_id)
        assert told[-1].bytes_reused > 0
        assert served.events() == [(import_id, state) for state in range(1, 7)]


def test_an_import_that_kills_its_importer_is_left_to_the_operator_after_three_deaths(
    home: Path, bundle: Path
) -> None:
    with serving(home, dying_at=1) as served:
        served.dies_of(bundle)
    for _ in range(2):
        dies(home, at=1)
    with serving(home) as served:
        left = served.the_import().progress
        assert (left.state, left.reason, left.model_version) == (REJECTED, "INTERRUPTED", "tiny@1.0.1")
        assert served.events() == [(left.import_id, state) for state in (1, 2, 3, 4, 7)]
        told = list(served.stub.ImportBundle(pb.ImportBundleRequest(path=str(bundle)), timeout=LIMIT_S))
        assert (told[-1].state, told[-1].bytes_reused > 0) == (COMMITTED, True)
        assert told[-1].import_id != left.import_id
