"""Disks fail, fill up and lose their process: nothing acknowledged is lost, nothing unrecorded is answered."""

import asyncio
import errno
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.control.audit import AuditLog, Record
from appliance.control.audit.head import HeadFile
from appliance.control.audit.ledger import Ledger
from appliance.errors import CloisterError
from tests.appliance.audit_logs import Home, ManualClock, fill, numbered


class Disk:
    """What the next commits meet; shared by all connections of one log."""

    def __init__(self) -> None:
        self.fail_after_commit = 0
        self.fail_before_commit = 0
        self.gate = threading.Event()
        self.gate.set()

    def connection(self) -> type[sqlite3.Connection]:
        disk = self

        class Failing(sqlite3.Connection):
            def execute(self, sql: str, *arguments: object) -> sqlite3.Cursor:
                if sql != "COMMIT":
                    return super().execute(sql, *arguments)
                disk.gate.wait()
                if disk.fail_before_commit:
                    disk.fail_before_commit -= 1
                    raise sqlite3.OperationalError("disk I/O error")
                cursor = super().execute(sql)
                if disk.fail_after_commit:
                    disk.fail_after_commit -= 1
                    raise sqlite3.OperationalError("disk I/O error")
                return cursor

        return Failing


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("written", [False, True], ids=["nothing written", "written but not confirmed"])
def test_failed_commit_refuses_its_batch_and_the_log_resumes_from_the_disk(tmp_path: Path, written: bool) -> None:
    home, disk = Home(tmp_path), Disk()
    log = home.create(factory=disk.connection())
    log.append(numbered(1)).result()
    if written:
        disk.fail_after_commit = 1
    else:
        disk.fail_before_commit = 1
    refused = [log.append(numbered(n)) for n in (2, 3)]
    for future in refused:
        with pytest.raises(CloisterError, match="AUDIT_BLOCKED") as error:
            future.result()
        assert error.value.status.name == "UNAVAILABLE"
    wait_until(lambda: not log.blocked)
    receipt = log.append(numbered(4)).result()
    kinds = [record.kind for record in log.read(0, 20)]
    assert kinds.count("audit.resumed") == 1
    assert kinds[receipt.sequence - 1] == "inference.generate"
    log.close()
    verdict = home.verify()
    assert (verdict.intact, verdict.size) == (True, receipt.sequence)


def test_log_whose_files_cannot_even_be_closed_refuses_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """close(2) may report what a dying disk did not write; the lock on the log must not outlive the file."""
    home, disk = Home(tmp_path), Disk()
    log = home.create(factory=disk.connection())
    discard = Ledger.discard

    def failing(self: Ledger) -> None:
        discard(self)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Ledger, "discard", failing)
    disk.fail_before_commit = 1
    with pytest.raises(CloisterError, match="AUDIT_BLOCKED"):
        log.append(numbered(1)).result(timeout=20)
    wait_until(lambda: not log.blocked)
    assert log.append(numbered(2)).result(timeout=20).sequence > 0
    log.close()
    assert home.verify().intact


def test_a_writer_that_fails_in_a_way_nobody_foresaw_ends_its_process(tmp_path: Path) -> None:
    """Or every request would wait for a record that nobody writes."""
    program = """
import pathlib, sys
from appliance.control.audit.writer import Writer
from tests.appliance.audit_logs import Home, numbered
log = Home(pathlib.Path(sys.argv[1])).create()
Writer._take = None
log.append(numbered(1))
log.append(numbered(2)).result(timeout=20)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, "audit writer failed" in done.stderr) == (1, True)


async def test_log_that_cannot_commit_answers_within_the_bounded_wait(tmp_path: Path) -> None:
    home, disk = Home(tmp_path), Disk()
    log = home.create(factory=disk.connection())
    disk.gate.clear()
    with pytest.raises(CloisterError, match="AUDIT_BLOCKED"):
        await log.record(numbered(1), timeout=0.05)
    disk.gate.set()
    await asyncio.to_thread(wait_until, lambda: log.size == 1)
    log.close()
    assert home.verify().intact


def test_blocked_log_refuses_at_once_says_why_and_can_still_be_read(tmp_path: Path) -> None:
    home, disk = Home(tmp_path), Disk()
    log = home.create(factory=disk.connection())
    log.append(numbered(1)).result()
    disk.fail_before_commit = 1000
    with pytest.raises(CloisterError):
        log.append(numbered(2)).result()
    assert "disk I/O error" in log.blocked
    with pytest.raises(CloisterError, match="disk I/O error"):
        log.append(numbered(3)).result(timeout=0)
    assert [record.sequence for record in log.read(0, 10)] == [1]
    assert home.verify().intact
    disk.fail_before_commit = 0
    wait_until(lambda: not log.blocked)
    log.close()


def test_log_whose_tail_is_cut_while_it_is_blocked_does_not_resume(tmp_path: Path) -> None:
    home, disk = Home(tmp_path), Disk()
    log = home.create(factory=disk.connection())
    for number in (1, 2, 3):
        log.append(numbered(number)).result()
    disk.fail_before_commit = 1_000_000
    with pytest.raises(CloisterError):
        log.append(numbered(4)).result()
    home.change("DELETE FROM rec WHERE seq=3")
    wait_until(lambda: log.blocked == "AUDIT_TAMPERED TRUNCATED")
    disk.fail_before_commit = 0
    log.close()


def test_full_disk_blocks_until_there_is_room(tmp_path: Path) -> None:
    """A file size limit is the kernel's own ENOSPC, without a mount: SQLite sees a failing write."""
    home = Home(tmp_path)
    log = home.create()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    acknowledged = 0
    big = Record("test.big", "event", "filler", "done", facts={"text": "x" * 50_000})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512 * 1024, limit[1]))
        with pytest.raises(CloisterError, match="AUDIT_BLOCKED"):  # noqa: PT012  # the loop is what fills the disk
            for _ in range(50):
                acknowledged = log.append(big).result().sequence
        assert log.blocked
        assert len(log.read(0, 100)) >= acknowledged
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)
    wait_until(lambda: not log.blocked)
    assert log.append(numbered(1)).result().sequence > acknowledged > 0
    log.close()
    assert home.verify().intact


def test_log_is_read_while_not_one_more_byte_fits_on_its_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, tries, opened = Home(tmp_path), [], Ledger.open
    log = home.create()
    for number in (1, 2, 3):
        log.append(numbered(number)).result()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limit[1]))
        with pytest.raises(CloisterError, match="AUDIT_BLOCKED"):
            log.append(numbered(4)).result()
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "open", lambda *a, **k: tries.append(a) or opened(*a, **k))
            wait_until(lambda: len(tries) > 2)  # each opens and closes the files
        assert [record.sequence for record in log.read(0, 100)] == [1, 2, 3]
        assert home.verify().intact
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)
    wait_until(lambda: not log.blocked)
    log.close()
    assert not home.db.with_name("audit.db-shm").exists()
    assert home.verify().intact


_TINY_DISK = """
import sys
from pathlib import Path
from appliance.control.audit import Record
from appliance.errors import CloisterError
from tests.appliance.audit_logs import Home
from tests.appliance.test_audit_faults import wait_until
home = Home(Path(sys.argv[1]))
log = home.create()
ballast = home.path / "ballast"
ballast.write_bytes(bytes(300_000))
count = 0
big = Record("test.big", "event", "filler", "done", facts={"text": "x" * 20_000})
try:
    while True:
        count = log.append(big).result().sequence
except CloisterError as error:
    assert error.code == "AUDIT_BLOCKED", error
    assert "FULL" in error.message or "IOERR" in error.message, error
assert home.verify().intact
ballast.unlink()
wait_until(lambda: not log.blocked)
assert log.append(Record("test.small", "event", "filler", "done")).result().sequence > count
log.close()
verdict = home.verify()
assert verdict.intact and verdict.size > count > 0, verdict
"""


def test_full_file_system_blocks_until_there_is_room(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=900k none "$1" && exec "$2" -c "$3" "$1"'
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*own_mounts, "true"], capture_output=True).returncode:
        pytest.skip("no unprivileged mounts here")
    argv = [*own_mounts, mount, "sh", str(tmp_path), sys.executable, _TINY_DISK]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_copy_on_a_read_only_medium_is_verified(tmp_path: Path) -> None:
    home = Home(tmp_path / "medium")
    home.path.mkdir()
    log = home.create()
    log.append(numbered(1)).result()
    log.close()
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*own_mounts, "true"], capture_output=True).returncode:
        pytest.skip("no unprivileged mounts here")
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    verifier = [sys.executable, "-m", "appliance.control.audit", home.db, home.head, home.path / "audit.pub"]
    argv = [*own_mounts, mount, "sh", str(home.path), *map(str, verifier)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert '"intact": true' in done.stdout, done
    assert done.returncode == 0


class PowerCuts:
    """What would be on the disk had the power failed right after a commit, for every commit: the database as the
    commit left it, and the head as it was last flushed, which is the worst a kernel may do.
    """

    def __init__(self, home: Home, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.places = home, places
        self.durable = b""
        flush = os.fdatasync

        def fdatasync(descriptor: int) -> None:
            flush(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path.name.startswith(home.head.name):
                self.durable = path.read_bytes()

        monkeypatch.setattr("os.fdatasync", fdatasync)

    def connection(self) -> type[sqlite3.Connection]:
        cuts = self

        class Copying(sqlite3.Connection):
            def execute(self, sql: str, *arguments: object) -> sqlite3.Cursor:
                cursor = super().execute(sql, *arguments)
                if sql == "COMMIT":
                    cuts.copy()
                return cursor

        return Copying

    def copy(self) -> None:
        place = self.places / str(len(list(self.places.iterdir())))
        shutil.copytree(self.home.path, place)
        (place / self.home.head.name).write_bytes(self.durable)


def test_power_cut_after_any_commit_leaves_a_log_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = tmp_path / "cuts"
    places.mkdir()
    (tmp_path / "log").mkdir()
    home, clock = Home(tmp_path / "log"), ManualClock()
    cuts = PowerCuts(home, places, monkeypatch)
    log = home.create(clock=clock, factory=cuts.connection())
    for wait in (0, 0.3, 0.3, 0.3, 0.3, 50, 0.9, 0.2, 0.05, 0.9, 7000, 0, 0.999, 0.001, 0.001, 3):
        clock.wait(wait)
        fill(log, [1 if wait < 0.9 else 3])
    log.close()
    monkeypatch.undo()
    behind = []
    for place in places.iterdir():
        left = Home(place)
        verdict = left.verify()
        assert verdict.intact, (place, verdict)
        behind.append(verdict.size - int(left.head.read_text().split("\n")[1]))
        left.open(clock=clock).close()
        assert left.verify().intact
    assert len(behind) == 16
    assert max(behind) > 3  # more than one commit: there was something to accept


def test_killed_process_whose_head_the_kernel_still_held_leaves_a_log_that_outlives_the_next_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = tmp_path / "cuts"
    places.mkdir()
    (tmp_path / "log").mkdir()
    home, clock = Home(tmp_path / "log"), ManualClock()
    cuts = PowerCuts(home, places, monkeypatch)
    log = home.create(clock=clock, factory=cuts.connection())
    for wait in (0, 2, 0.3, 0.3):
        clock.wait(wait)
        fill(log, [1])
    killed = Home(tmp_path / "killed")
    shutil.copytree(home.path, killed.path)
    cuts.home = killed
    again = killed.open(clock=clock, factory=cuts.connection())
    clock.wait(60)
    fill(again, [1])
    again.close()
    log.close()
    monkeypatch.undo()
    last = Home(places / "4")
    assert last.verify().intact
    assert last.verify().size == 5
    last.open(clock=clock).close()


def test_head_that_cannot_be_written_does_not_take_the_log_further_from_it_with_every_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    log = home.create()
    log.append(numbered(1)).result()
    tries = []

    def fail(*arguments: object) -> None:
        tries.append(arguments)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(HeadFile, "write", fail)
        with pytest.raises(CloisterError, match="AUDIT_BLOCKED"):
            log.append(numbered(2)).result()
        wait_until(lambda: len(tries) > 3)
        assert len(log.read(0, 10)) == 2
    wait_until(lambda: not log.blocked)
    assert [record.kind for record in log.read(2, 10)] == ["audit.resumed"]
    log.close()
    assert home.verify().intact


_CALLER = """
import os, sys, threading, traceback
from pathlib import Path
from tests.appliance.audit_logs import Home, numbered
home = Home(Path(sys.argv[1]))
log = home.open()
def call():
    try:
        append()
    except BaseException:  # a caller that died quietly would be waited for
        traceback.print_exc()
        os._exit(1)
def append():
    number = 0
    while True:
        number += 1
        receipt = log.append(numbered(number)).result()
        sys.stdout.write(f"{receipt.sequence} {receipt.leaf_hash.hex()}\\n")
        sys.stdout.flush()
for _ in range(8):
    threading.Thread(target=call, daemon=True).start()
threading.Event().wait()
"""


def kill_rounds(home: Home, rounds: int) -> None:
    """Kill a writing process in the middle, again and again; all it acknowledged must be there."""
    home.create().close()
    for number in range(rounds):
        with subprocess.Popen(
            [sys.executable, "-c", _CALLER, str(home.path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        ) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(1 + 37 * number % 400)]
            os.kill(process.pid, signal.SIGKILL)
            lines += process.stdout.readlines()
        acknowledged = dict(line.split() for line in lines if line.endswith("\n"))
        assert acknowledged
        verdict = home.verify()
        assert verdict.intact, (number, verdict)
        with sqlite3.connect(f"file:{home.db}?mode=ro", uri=True) as connection:
            stored = {str(seq): leaf.hex() for seq, leaf in connection.execute("SELECT seq,leaf FROM rec")}
        connection.close()
        assert acknowledged.items() <= stored.items()
    log = home.open()
    log.append(numbered(1)).result()
    log.close()
    assert home.verify().intact


def test_killed_process_loses_no_acknowledged_record(tmp_path: Path) -> None:
    kill_rounds(Home(tmp_path), 10)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_process_killed_a_hundred_times_loses_no_acknowledged_record(tmp_path: Path) -> None:
    kill_rounds(Home(tmp_path), 100)


def test_reader_never_checkpoints_or_writes(tmp_path: Path) -> None:
    home = Home(tmp_path)
    log: AuditLog = home.create()
    log.append(numbered(1)).result()
    before = home.db.read_bytes()
    home.verify()
    log.read(0, 10)
    log.open_intents()
    assert home.db.read_bytes() == before
    log.close()
