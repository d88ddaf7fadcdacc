"""The one thread that touches the engine: commands in through a queue, one batch of rows out per step.

While the engine has no work the thread sleeps on its queue. An error that the engine did not turn into the end
of a request ends the process: engine-host starts a clean one. What raises nothing and does not come back either, a
step that hangs or work that never gets on, is told by `stuck`, and engine-host's watchdog ends the process.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from engine.errors import EngineError
from engine.loop import EngineLoop, EngineStatus, StepRow
from engine.request import Request
from engine.worker.translate import failed_row

COLD_STEP_FACTOR = 5
"""The first step may take that many times as long: kernels are compiled and memory is touched in it."""

log = logging.getLogger(__name__)

Deliver = Callable[[int, list[StepRow]], None]
"""Takes a step's number and its rows; called on the engine's thread."""

_Command = Callable[[EngineLoop], StepRow | None]


class EngineThread:
    """An engine and its thread.

    Args:
        build: makes the engine; called on the thread, because the number of a tensor library's threads belongs to
            the thread that sets it.
        clock: seconds, monotonic.

    Attributes:
        built: done when the engine is; holds what `build` raised otherwise.
    """

    def __init__(self, build: Callable[[], EngineLoop], clock: Callable[[], float] = time.monotonic) -> None:
        self.built: Future[EngineLoop] = Future()
        self._build = build
        self._clock = clock
        self._busy_since: float | None = None
        self._is_warm = False
        self._deliver: Deliver = _nobody
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._status: EngineStatus | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to build, then to step."""
        self._thread.start()

    def deliver_to(self, deliver: Deliver) -> None:
        """Give every step's rows to `deliver` from now on; before the first request."""
        self._deliver = deliver

    def status(self) -> EngineStatus:
        """The counters after the last step.

        Raises:
            RuntimeError: the engine is not built.
        """
        if self._status is None:
            raise RuntimeError("the engine is not built")
        return self._status

    def stuck(self, limit_s: float) -> str:
        """Why the engine does not get on; empty while it does, or has nothing to do.

        Args:
            limit_s: for one step; the first one may take `COLD_STEP_FACTOR` times as long.
        """
        allowed = limit_s if self._is_warm else COLD_STEP_FACTOR * limit_s  # before `since`: the thread runs on
        since = self._busy_since
        if since is None or self._clock() - since <= allowed:
            return ""
        return f"the engine has had work for {allowed:g} s and has not finished a step"

    def submit(self, request: Request) -> None:
        """Hand a request over; a refusal comes as the request's only row."""

        def command(engine: EngineLoop) -> StepRow | None:
            try:
                engine.submit(request)
            except EngineError as error:
                return failed_row(request.handle, error)
            return None

        self._commands.put(command)

    def abort(self, handle: int) -> None:
        """End a request with the next step; nothing happens if it has ended."""
        self._commands.put(lambda engine: engine.abort(handle))

    def _run(self) -> None:
        try:
            engine = self._build()
        except BaseException as error:
            self.built.set_exception(error)
            return
        self._status = engine.status()
        self.built.set_result(engine)
        try:
            while True:
                self._turn(engine)
        except BaseException:
            log.exception("engine thread failed")
            os._exit(1)

    def _turn(self, engine: EngineLoop) -> None:
        """Carry out what is asked, then one step."""
        rows = self._obey(engine)
        steps = engine.status().steps
        if engine.has_work:
            if self._busy_since is None:
                self._busy_since = self._clock()
            rows.extend(engine.step())
        self._status = engine.status()
        if rows or self._status.steps != steps or not engine.has_work:
            self._is_warm = self._is_warm or self._status.steps > 0
            self._busy_since = None
        if rows:
            self._deliver(self._status.steps, rows)

    def _obey(self, engine: EngineLoop) -> list[StepRow]:
        """Carry out all commands there are, waiting for one when there is nothing else to do; refusals' rows."""
        rows = []
        commands = [] if engine.has_work else [self._commands.get()]
        while not self._commands.empty():
            commands.append(self._commands.get())
        for command in commands:
            row = command(engine)
            if row is not None:
                rows.append(row)
        return rows


def _nobody(step: int, rows: list[StepRow]) -> None:
    """Nobody has asked for anything yet."""
