"""The engine's thread: what it cannot go on after ends the process, so that engine-host starts another."""

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

from engine.loop import LOST_STEPS, StepRow
from engine.plan import StepPlan, StepResult
from engine.worker.engine_thread import EngineThread
from tests.engine.tiny import engine, request, save_llama


class Dead:
    """A runner that computes nothing any more."""

    def execute(self, plan: StepPlan) -> StepResult:
        raise RuntimeError("the device is gone")


def serve(folder: Path, ends: Connection) -> None:
    """A process whose device is gone: each row's error goes to `ends`, each answer to it brings a new request."""
    loop = engine(folder)
    loop._runner = Dead()

    def deliver(step: int, rows: list[StepRow]) -> None:
        for row in rows:
            ends.send(row.end and row.end.error_code)

    thread = EngineThread(lambda: loop)
    thread.deliver_to(deliver)
    thread.start()
    while True:
        handle = ends.recv()
        thread.submit(request(handle, [5 + handle]))


def test_an_engine_whose_steps_all_fail_ends_its_process(tmp_path: Path) -> None:
    save_llama(tmp_path)
    spawn = multiprocessing.get_context("spawn")
    ends, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(tmp_path, theirs), daemon=True)
    process.start()
    theirs.close()
    for handle in range(LOST_STEPS - 1):
        ends.send(handle)
        assert ends.recv() == "ENGINE_STEP_FAILED"
    ends.send(LOST_STEPS)
    process.join(60)
    assert process.exitcode == 1
