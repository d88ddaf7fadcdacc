"""What stands still is noticed, killed and started again; what is slow, waits or is looked at is not."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import cast

import pytest

from appliance.processes import ProcessSpec, table
from appliance.settings import Settings
from appliance.supervisor import Report, RestartPolicy, Supervisor
from engine.loop import EngineLoop, EngineStatus, StepRow
from engine.process import Silence
from engine.request import Request
from engine.text.service import WALL_LIMIT_S
from engine.worker.engine_thread import COLD_STEP_FACTOR, EngineThread
from tests.faults.house import short_folder

HEARD_WITHIN_S = 1.5
PATIENCE_S = 5.0  # with the healthy one, which outlives it because it is heard
LIMIT_S = 60.0

# One process of the house; a word in its inbox makes it misbehave from then on.
PROGRAM = """
import asyncio, pathlib, sys, time
from engine.process import run
inbox = pathlib.Path(sys.argv[1])
async def main(process):
    process.feed_unless(lambda: "it was told to be" if inbox.exists() and inbox.read_text() == "stuck" else "")
    process.ready()
    while not process.stopping.is_set():
        if inbox.exists() and inbox.read_text() == "wedge":
            inbox.unlink()
            while True:
                time.sleep(1)  # the event loop turns no more
        await asyncio.sleep(0.02)
sys.exit(run("probe", main))
"""


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def silence(clock: Clock, pid: int = 0) -> Silence:
    return Silence(pid, 10.0, clock)


def looks(watched: Silence, clock: Clock, seconds: float, every: float = 1.0) -> bool:
    """Look again and again for so long; whether it became too long at any time."""
    found = False
    for _ in range(round(seconds / every)):
        clock.now += every
        found = watched.is_too_long() or found
    return found


def test_silence_is_too_long_after_the_limit_and_a_sign_of_life_begins_it_anew() -> None:
    clock = Clock()
    watched = silence(clock)
    assert not looks(watched, clock, 10)
    watched.heard()
    assert not looks(watched, clock, 10)
    assert looks(watched, clock, 1)


def test_time_in_which_the_watcher_did_not_run_is_nobodys_silence() -> None:
    clock = Clock()
    watched = silence(clock)
    assert not looks(watched, clock, 9)
    clock.now += 3600  # the machine slept
    assert not watched.is_too_long()
    assert not looks(watched, clock, 10), "everybody has a fresh period"
    assert looks(watched, clock, 1)


def test_a_watcher_that_hardly_runs_counts_no_more_than_it_could_have_heard() -> None:
    clock = Clock()
    watched = silence(clock)
    assert not looks(watched, clock, 40, every=8.0), "it looked five times in forty seconds"


def test_a_process_that_a_debugger_holds_is_not_killed_under_it() -> None:
    code = "import ctypes, time; ctypes.CDLL(None).ptrace(0, 0, 0, 0); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as traced:  # by PTRACE_TRACEME
        assert traced.stdout is not None
        traced.stdout.readline()
        clock = Clock()
        assert not looks(silence(clock, traced.pid), clock, 30)
        traced.kill()
    clock = Clock()
    assert looks(silence(clock, os.getpid()), clock, 30)


def test_every_process_may_be_silent_for_longer_than_a_text_may_prepare_one_prompt() -> None:
    assert min(spec.heard_within for spec in table(Settings())) > WALL_LIMIT_S


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        for name in ("run", "logs"):
            (path / name).mkdir()
        (path / "probe.py").write_text(PROGRAM)
        yield path


def test_a_process_feeds_its_watchdog_and_never_waits_for_one_that_does_not_read(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(f"{folder}/notify")
        notify.settimeout(LIMIT_S)
        watched = {"NOTIFY_SOCKET": f"{folder}/notify", "WATCHDOG_USEC": "2000"}
        process = subprocess.Popen(
            [sys.executable, "-m", "probe", folder / "inbox"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}", **watched},
        )
        assert [notify.recv(100), notify.recv(100)] == [b"READY=1", b"WATCHDOG=1"]
        time.sleep(0.5)  # long enough, at one sign in half a millisecond, to fill what the kernel queues
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=LIMIT_S) == 0, "it drains, though nobody hears that it does"


class Supervised:
    """A supervisor with one healthy process and one to hurt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reports: list[Report] = []
        self.stopping = asyncio.Event()
        specs = [
            ProcessSpec(name, "probe", (str(folder / name),), heard_within=within)
            for name, within in (("healthy", PATIENCE_S), ("victim", HEARD_WITHIN_S))
        ]
        policy = RestartPolicy(first_delay=0.01, longest_delay=0.02)
        supervisor = Supervisor(tuple(specs), folder, self.reports.append, policy)
        self.task = asyncio.create_task(supervisor.run(self.stopping, lambda: None))

    def of(self, name: str, state: str) -> list[Report]:
        return [report for report in self.reports if (report.process, report.state) == (name, state)]

    async def until(self, name: str, state: str, times: int) -> Report:
        async with asyncio.timeout(LIMIT_S):
            while len(self.of(name, state)) < times:
                await asyncio.sleep(0.02)
        return self.of(name, state)[times - 1]


@pytest.fixture
async def supervised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Supervised]:
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(__file__).parents[2]}")
    running = Supervised(folder)
    yield running
    running.stopping.set()
    await running.task


async def test_a_stopped_a_wedged_and_a_stuck_process_are_killed_and_started_again_and_no_other(
    supervised: Supervised,
) -> None:
    await supervised.until("healthy", "ready", 1)
    since = time.monotonic()
    inbox = supervised.folder / "victim"
    for number, fault in enumerate(("stop", "wedge", "stuck"), 1):
        pid = (await supervised.until("victim", "ready", number)).pid
        if fault == "stop":
            os.kill(pid, signal.SIGSTOP)
        else:
            inbox.write_text(fault)
        killed = await supervised.until("victim", "killed", number)
        inbox.unlink(missing_ok=True)
        assert (killed.pid, killed.detail) == (pid, "WATCHDOG: silent for 1.5 s")
        assert (await supervised.until("victim", "ended", number)).detail == "killed by SIGKILL"
    await supervised.until("victim", "ready", 4)
    await asyncio.sleep(since + 1.5 * PATIENCE_S - time.monotonic())
    assert len(supervised.of("healthy", "starting")) == 1
    log = (supervised.folder / "logs" / "victim.log").read_text()
    assert log.count("WATCHDOG: silent for 1.5 s") == 3
    assert '"reason": "it was told to be"' in log


class Engine:
    """An engine whose steps a test can hold up."""

    def __init__(self) -> None:
        self.steps = 0
        self.has_work = False
        self.advances = True

    def submit(self, request: Request) -> None:
        self.has_work = True

    def step(self) -> list[StepRow]:
        self.steps += self.advances
        return []

    def status(self) -> EngineStatus:
        return cast(EngineStatus, self)  # the thread reads `steps` of it


def test_an_engine_without_work_is_never_stuck_and_one_whose_work_gets_on_is_not() -> None:
    clock, engine = Clock(), Engine()
    thread = EngineThread(lambda: cast(EngineLoop, engine), clock)
    clock.now += 1e6
    assert thread.stuck(1.0) == ""
    engine.has_work = True
    for _ in range(3):
        thread._turn(cast(EngineLoop, engine))
        clock.now += 1e6
        assert thread.stuck(1.0) == ""


def test_an_engine_whose_work_does_not_get_on_is_stuck_and_its_first_step_has_more_time() -> None:
    clock, engine = Clock(), Engine()
    thread = EngineThread(lambda: cast(EngineLoop, engine), clock)
    engine.has_work, engine.advances = True, False
    thread._turn(cast(EngineLoop, engine))
    clock.now += COLD_STEP_FACTOR - 0.1
    assert thread.stuck(1.0) == ""
    clock.now += 0.2
    assert "has not finished a step" in thread.stuck(1.0)
    engine.advances = True
    thread._turn(cast(EngineLoop, engine))
    assert thread.stuck(1.0) == ""
    engine.advances = False
    thread._turn(cast(EngineLoop, engine))
    clock.now += 1.1
    assert "for 1 s" in thread.stuck(1.0)
