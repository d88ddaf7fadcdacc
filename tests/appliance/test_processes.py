"""The process table, and the supervisor that runs it, with real child processes of a few lines each."""

import asyncio
import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import CloisterError
from appliance.logfile import LogFile
from appliance.processes import LONGEST_SOCKET_NAME, ProcessSpec, problems, table
from appliance.settings import Settings
from appliance.supervisor import Report, RestartPolicy, Supervisor, _pump, sole_supervisor
from engine.process import child_environment

TABLE = table(Settings())
HASTY = RestartPolicy(first_delay=0.01, longest_delay=0.02, attempts=3)
CHILD = """
import os, signal, socket, sys, time
def notify(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto(text, os.environ["NOTIFY_SOCKET"])
def serve():
    signal.signal(signal.SIGTERM, lambda *_: (notify(b"STOPPING=1"), sys.exit(0)))
    notify(b"READY=1")
    open("told", "w").close()
    while True:
        time.sleep(60)
mode = sys.argv[1]
if mode == "serve":
    serve()
elif mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    notify(b"READY=1")
    while True:
        time.sleep(60)
elif mode == "fail":
    print("cannot: the reason")
    sys.exit(7)
elif mode == "silent":
    time.sleep(60)
elif mode == "chatty":  # more than a pipe holds, then READY
    for number in range(4000):
        print(f"line {number} " + "x" * 100)
    sys.stdout.flush()
    serve()
elif mode == "tied":  # as every process of the house lives
    from engine.process import run
    async def main(process):
        process.ready()
        await process.stopping.wait()
    sys.exit(run("tied", main))
elif mode.isdigit():  # leaves this core to the others, as engine-host does
    from engine.process import CORES_LEFT, run
    async def main(process):
        process.tell({CORES_LEFT: "0,x"})  # no list of cores: nobody moves
        process.tell({CORES_LEFT: mode})
        process.ready()
        await process.stopping.wait()
    sys.exit(run("leaver", main))
elif mode == "impostor":  # a child of the process speaks for it
    if os.fork() == 0:
        notify(b"READY=1")
        os._exit(0)
    time.sleep(60)
"""


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    for name in ("run", "logs", "code"):
        (path / name).mkdir()
    (path / "code" / "stand_in.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(path / "code"))
    yield path
    shutil.rmtree(path)


def spec(name: str, mode: str = "serve", needs: tuple[str, ...] = (), within: float = 20.0) -> ProcessSpec:
    return ProcessSpec(name, "stand_in", (mode,), needs, ready_within=within, drain_within=within)


class Running:
    """A supervisor in the background, and what it reported."""

    def __init__(self, home: Path, *specs: ProcessSpec) -> None:
        self.reports: list[Report] = []
        self.stopping = asyncio.Event()
        self.ready = asyncio.Event()
        self._changed = asyncio.Event()
        supervisor = Supervisor(specs, home, self._report, HASTY)
        self.task = asyncio.create_task(supervisor.run(self.stopping, self.ready.set))

    def _report(self, report: Report) -> None:
        self.reports.append(report)
        self._changed.set()

    def states(self, name: str) -> list[str]:
        return [r.state for r in self.reports if r.process == name]

    async def until(self, name: str, state: str, times: int = 1) -> Report:
        while self.states(name).count(state) < times:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), 30)
        return [r for r in self.reports if (r.process, r.state) == (name, state)][times - 1]


@asynccontextmanager
async def running(home: Path, *specs: ProcessSpec) -> AsyncIterator[Running]:
    run = Running(home, *specs)
    try:
        yield run
    finally:
        run.stopping.set()
        await run.task


def test_the_table_starts_what_is_needed_first() -> None:
    assert list(problems(TABLE)) == []
    assert [s.name for s in TABLE] == ["control", "importer", "engine-host", "gateway"]


def test_a_table_with_a_need_that_comes_later_is_reported() -> None:
    found = list(problems((spec("a", needs=("b",)), spec("b"), spec("b"))))
    assert found == ["a needs b, which does not come before it", "b is in the table twice"]


def test_arguments_are_filled_in_and_the_current_directory_is_not_imported_from() -> None:
    argv = {s.name: s.argv(Path("/srv/home")) for s in TABLE}
    assert argv["engine-host"][:10] == (
        sys.executable, "-P", "-m", "engine.host", "--run", "/srv/home/run", "--store", "/srv/home/store",
        "--derived", "/srv/home/derived",
    )  # fmt: skip
    assert argv["importer"][3:6] == ("bundles.importer", "--home", "/srv/home")
    assert "--quota-bytes=0" in argv["importer"]
    assert "--listen=127.0.0.1:8443" in argv["gateway"]


def test_a_home_of_eighty_bytes_leaves_room_for_every_socket() -> None:
    assert len("/" * 56 + "/run/") + LONGEST_SOCKET_NAME <= 107


async def test_a_process_starts_when_what_it_needs_is_ready_and_they_drain_in_reverse(home: Path) -> None:
    async with running(home, spec("first"), spec("second", needs=("first",))) as run:
        await run.ready.wait()
        order = [(r.process, r.state) for r in run.reports]
        assert order == [("first", "starting"), ("first", "ready"), ("second", "starting"), ("second", "ready")]
    ends = [(r.process, r.state, r.detail) for r in run.reports[4:]]
    assert ends == [
        ("second", "stopping", ""),
        ("second", "stopped", "exit status 0"),
        ("first", "stopping", ""),
        ("first", "stopped", "exit status 0"),
    ]


async def test_a_killed_process_is_started_again(home: Path) -> None:
    async with running(home, spec("only")) as run:
        first = await run.until("only", "ready")
        os.kill(first.pid, signal.SIGKILL)
        second = await run.until("only", "ready", times=2)
        assert second.pid != first.pid
        assert (await run.until("only", "ended")).detail == "killed by SIGKILL"


async def test_what_a_process_says_before_its_start_was_noticed_is_heard(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor that got no processor in between, or was stopped."""
    start = asyncio.create_subprocess_exec

    async def slowly(*argv: Any, **options: Any) -> asyncio.subprocess.Process:
        process = await start(*argv, **options)
        while not (home / "told").exists():
            await asyncio.sleep(0.01)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slowly)
    async with running(home, spec("quick")) as run:
        await run.until("quick", "ready")
    assert run.states("quick") == ["starting", "ready", "stopping", "stopped"]


async def test_a_process_that_cannot_be_forked_now_is_tried_again_and_the_others_stay(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, refusals = asyncio.create_subprocess_exec, [OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))]

    async def at_first_not(*argv: Any, **options: Any) -> asyncio.subprocess.Process:
        if "late" in argv and refusals:
            raise refusals.pop()
        return await start(*argv, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", at_first_not)
    late = ProcessSpec("late", "stand_in", ("serve", "late"))
    async with running(home, spec("good"), late) as run:
        await run.until("late", "ready")
        await run.until("good", "ready")
    assert run.states("late") == ["ended", "starting", "ready", "stopping", "stopped"]
    assert (await run.until("late", "ended")).detail == "not started: Resource temporarily unavailable"
    assert run.states("good").count("starting") == 1


async def test_a_process_that_never_becomes_ready_is_named_with_the_end_of_its_log(home: Path) -> None:
    run = Running(home, spec("good"), spec("bad", "fail"))
    with pytest.raises(CloisterError) as error:
        await run.task
    assert error.value.code == "PROCESS_NOT_READY"
    assert "bad did not become ready in 3 starts" in error.value.message
    assert error.value.message.endswith("cannot: the reason")
    assert run.states("bad").count("starting") == 3
    assert run.states("good")[-1] == "stopped"


@pytest.mark.parametrize("mode", ["silent", "impostor"])
async def test_a_process_that_does_not_say_ready_itself_is_killed(home: Path, mode: str) -> None:
    run = Running(home, spec("mute", mode, within=0.2))
    with pytest.raises(CloisterError):
        await run.task
    assert "ready" not in run.states("mute")
    assert (await run.until("mute", "killed")).detail == "not ready in 0.2 s"


async def test_a_process_that_ignores_sigterm_is_killed_after_its_time(home: Path) -> None:
    async with running(home, spec("stubborn", "stubborn", within=0.5)) as run:
        await run.ready.wait()
    assert (await run.until("stubborn", "stopped")).detail == "killed by SIGKILL"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has nothing to tell apart")
async def test_processes_keep_to_the_cores_that_one_leaves_them_for_as_long_as_it_lives(home: Path) -> None:
    every = os.sched_getaffinity(0)
    left = max(every)
    async with running(
        home, spec("early"), spec("leaver", str(left), ("early",)), spec("late", needs=("leaver",))
    ) as run:
        await run.ready.wait()
        pids = [(await run.until(name, "ready")).pid for name in ("early", "leaver", "late")]
        assert [os.sched_getaffinity(pid) for pid in pids] == [{left}, every, {left}]
        os.kill(pids[0], signal.SIGKILL)
        again = await run.until("early", "ready", 2)
        assert os.sched_getaffinity(again.pid) == {left}
        os.kill(pids[1], signal.SIGKILL)
        await run.until("leaver", "ended")
        assert [os.sched_getaffinity(pid) for pid in (again.pid, pids[2])] == [every, every]


def test_children_die_with_a_killed_supervisor(home: Path) -> None:
    code = (
        "import asyncio, sys, pathlib\n"
        "from appliance.supervisor import Supervisor\n"
        "from appliance.processes import ProcessSpec\n"
        "def report(r): print(r.state, r.pid, flush=True)\n"
        "async def main():\n"
        "    table = (ProcessSpec('child', 'stand_in', ('tied',)),)\n"
        "    await Supervisor(table, pathlib.Path(sys.argv[1]), report).run(asyncio.Event(), lambda: None)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, home], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        pid = next(int(line.split()[1]) for line in supervisor.stdout if line.startswith("ready"))
        descriptor = os.pidfd_open(pid)
        supervisor.kill()
    assert asyncio.run(_readable(descriptor)), "the child outlived its supervisor"
    os.close(descriptor)


def test_a_process_whose_starter_is_gone_ends_before_it_serves(home: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(home / "gone"))
    done = subprocess.run(
        [sys.executable, "-m", "stand_in", "tied"],
        env={**os.environ, "NOTIFY_SOCKET": str(home / "gone")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "ConnectionRefusedError" in done.stderr


def test_a_process_whose_starter_has_a_successor_already_ends_before_it_serves(home: Path) -> None:
    """As after a kill -9 of `serve` that somebody starts again at once: the same path, another process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as successor:
        successor.bind(str(home / "notify"))
        done = subprocess.run(
            [sys.executable, "-m", "stand_in", "tied"],
            env={**os.environ, **child_environment(home / "notify"), "CLOISTER_PARENT": "1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        successor.setblocking(False)
        with pytest.raises(BlockingIOError):
            successor.recv(100)
    assert (done.returncode, "process 1, which started this one, is gone" in done.stderr) == (1, True)


async def test_a_full_log_disk_does_not_hold_up_the_process_that_logs(home: Path) -> None:
    (home / "logs" / "noisy.log").symlink_to("/dev/full")
    async with running(home, spec("noisy", "chatty")) as run:
        await run.until("noisy", "ready")
        lost = await run.until("noisy", "unlogged")
        assert "No space left on device" in lost.detail
    assert run.states("noisy") == ["starting", "unlogged", "ready", "stopping", "stopped"]


async def test_lines_lost_while_the_disk_was_full_are_counted_when_there_is_room_again() -> None:
    class Disk(LogFile):
        """Full for the second and third write."""

        def __init__(self) -> None:
            self.writes, self.written = 0, b""

        def write(self, chunk: bytes) -> None:
            self.writes += 1
            if self.writes in (2, 3):
                raise OSError(errno.ENOSPC, "No space left on device")
            self.written += chunk

        def close(self) -> None:
            pass

    disk, told = Disk(), list[OSError]()
    process = await asyncio.create_subprocess_exec(
        "printf", "a\\nb\\nc\\nd\\ne\\n", stdout=asyncio.subprocess.PIPE
    )
    await _pump(process, disk, told.append)
    await process.wait()
    first, lost, *rest = disk.written.splitlines()
    assert (first, rest) == (b"a", [b"d", b"e"])
    assert json.loads(lost)["event"] == "2 lines lost"
    assert len(told) == 1


async def _readable(descriptor: int) -> bool:
    """A process's descriptor becomes readable when it ends; pidfd_open(2)."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(descriptor, ended.set)
    return await asyncio.wait_for(ended.wait(), 20)


def test_a_home_is_served_once(home: Path) -> None:
    with sole_supervisor(home), pytest.raises(CloisterError) as error, sole_supervisor(home):
        pass
    assert f"by process {os.getpid()}" in error.value.message
    assert error.value.code == "ALREADY_RUNNING"
    with sole_supervisor(home):
        pass


def test_a_log_rotates_by_size_and_keeps_three_older_files(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "x.log", max_bytes=10)
    for number in range(6):
        log.write(b"line %d\n" % number)
    log.close()
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {
        "x.log": "line 5\n",
        "x.log.1": "line 4\n",
        "x.log.2": "line 3\n",
        "x.log.3": "line 2\n",
    }
    assert (tmp_path / "x.log").stat().st_mode & 0o777 == 0o600


def test_a_log_is_appended_to_and_shows_its_last_lines(tmp_path: Path) -> None:
    for text in (b"one\ntwo\n", b"three\n"):
        log = LogFile(tmp_path / "x.log")
        log.write(text)
        log.close()
    assert LogFile(tmp_path / "x.log").last_lines(2) == ["two", "three"]


def test_a_line_that_was_written_in_part_does_not_swallow_the_next(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes write(2) write what fits, and fail after that; setrlimit(2)."""
    log, limits = LogFile(tmp_path / "x.log"), resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        log.write(b"whole\n")
        with pytest.raises(OSError, match="too large"):
            log.write(b"cut in two\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    log.write(b"next\n")
    log.close()
    assert (tmp_path / "x.log").read_bytes() == b"whole\ncut \nnext\n"
