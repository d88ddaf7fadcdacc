"""Keeps one process of a deployment running: starts it, starts it again with back-off, drains it."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.host.child import Child, ChildSpec, Ending

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RestartPolicy:
    """When a process that died is started again, and how long one may drain.

    Attributes:
        first_delay_s: before the first restart; doubled each time.
        longest_delay_s: at most.
        forgiven_after_s: of service, after which the delay is the first one again.
        drain_grace_s: between SIGTERM and SIGKILL.
        load_limit_s: from start to READY; a process that takes longer is ended for good.
        heard_within_s: without a sign of life, from READY on; a process that is silent for longer is killed and
            started again.
        step_within_s: for one turn of a worker's engine; one that takes longer gives no more signs of life.
    """

    first_delay_s: float = 0.2
    longest_delay_s: float = 10.0
    forgiven_after_s: float = 30.0
    drain_grace_s: float = 12.0
    load_limit_s: float = 1800.0
    heard_within_s: float = 20.0
    step_within_s: float = 120.0

    def delay_after(self, previous_s: float | None, served_s: float) -> float:
        """Seconds to wait before the next start, after a life that served `served_s` seconds."""
        if previous_s is None or served_s >= self.forgiven_after_s:
            return self.first_delay_s
        return min(2 * previous_s, self.longest_delay_s)


class Keeper:
    """One process of a deployment, over all its lives.

    Attributes:
        facts: what its last ready life told about itself.
        restarts: times it was started again.
        ending: how its last life ended, None while there was none or since it is ready again.
    """

    def __init__(self, spec: ChildSpec, changed: Callable[[], None], policy: RestartPolicy) -> None:
        self.facts: Mapping[str, str] = {}
        self.restarts = 0
        self.ending: Ending | None = None
        self._spec = spec
        self._changed = changed
        self._policy = policy
        self._child: Child | None = None

    @property
    def pid(self) -> int:
        """The process id; 0 while there is no process."""
        return self._child.pid if self._child else 0

    @property
    def is_ready(self) -> bool:
        """Whether it serves now."""
        return self.pid != 0 and self._child is not None and self._child.ready.is_set()

    async def run(self, stop: asyncio.Event) -> None:
        """Keep the process running until it refuses its deployment, or until `stop` is set and it has drained."""
        delay: float | None = None
        while not stop.is_set():
            served_s, ending = await self._live(stop)
            if stop.is_set():
                return
            self.ending = ending
            log.warning(
                "process ended",
                extra={
                    "deployment": self._spec.name,
                    "role": self._spec.role,
                    "code": ending.code,
                    "reason": ending.message,
                },
            )
            if not ending.refused:
                self.restarts += 1
            self._changed()
            if ending.refused:
                return
            delay = self._policy.delay_after(delay, served_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), delay)

    async def _live(self, stop: asyncio.Event) -> tuple[float, Ending]:
        """One life: seconds of service, and how it ended."""
        try:
            self._child = child = await Child.start(self._spec)
        except OSError as error:
            return 0.0, Ending("PROCESS_NOT_STARTED", f"engine-{self._spec.role}: {error.strerror}", refused=False)
        loop = asyncio.get_running_loop()
        stopping, ready = asyncio.create_task(stop.wait()), asyncio.create_task(child.ready.wait())
        try:
            events = (stopping, ready, child.ended)
            done, _ = await asyncio.wait(
                events, timeout=self._policy.load_limit_s, return_when=asyncio.FIRST_COMPLETED
            )
            since = loop.time()
            if child.ready.is_set() and not child.ended.done():
                self._on_ready(child)
                ending = await self._serve(child, stopping)
                return loop.time() - since, ending
            if not child.ended.done():
                await child.drain(self._policy.drain_grace_s)
            return loop.time() - since, child.ended.result() if done else self._too_late()
        finally:
            stopping.cancel()
            ready.cancel()

    async def _serve(self, child: Child, stopping: "asyncio.Task[bool]") -> Ending:
        """From READY to the end of a life: by itself, by falling silent, or drained because it is to stop."""
        silent = asyncio.create_task(child.falls_silent())
        try:
            await asyncio.wait((stopping, silent, child.ended), return_when=asyncio.FIRST_COMPLETED)
            if silent.done() and not stopping.done() and not child.ended.done():
                return await child.end_silent()
            if not child.ended.done():
                await child.drain(self._policy.drain_grace_s)
            return child.ended.result()
        finally:
            silent.cancel()

    def _too_late(self) -> Ending:
        limit = f"{self._policy.load_limit_s:g} s"
        return Ending("LOAD_TIMEOUT", f"engine-{self._spec.role} was not ready after {limit}", refused=True)

    def _on_ready(self, child: Child) -> None:
        self.facts, self.ending = child.facts, None
        log.info(
            "process ready", extra={"deployment": self._spec.name, "role": self._spec.role, "child": child.pid}
        )
        self._changed()
