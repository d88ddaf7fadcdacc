"""Imports one after the other, each watched by any number of callers and carried on when all of them leave."""

import asyncio
import logging
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from bundles.format.errors import BundleError
from bundles.importer.importing import import_bundle, take_up
from bundles.importer.records import Import
from bundles.importer.steering import Steering, StoppingError
from bundles.importer.workplace import Workplace
from bundles.pipeline import Progress, State

MOST_IMPORTS = 64
"""Imports that run or wait at once; each has a thread."""

_FINAL = (State.COMMITTED, State.REJECTED)

log = logging.getLogger(__name__)


class Job:
    """One import and what was said of it: the last progress of every state it was in.

    Args:
        path: of the bundle.
        left: what an importer that died or stopped left of it; None of a new one.
    """

    def __init__(self, path: Path, left: Import | None = None) -> None:
        self.import_id = left.import_id if left else secrets.token_hex(8)
        self.path = path
        self.left = left
        self.steering = Steering()
        self._history: list[Progress] = [left.progress if left else Progress(State.QUARANTINE)]
        self._changed = asyncio.Event()
        self._changed_ns = time.time_ns()
        self._started_ns = left.started_ns if left else self._changed_ns
        self._stopped = False

    @property
    def ended(self) -> bool:
        """Committed or rejected."""
        return self._history[-1].state in _FINAL

    @property
    def latest(self) -> Import:
        """Where it is."""
        return Import(self.import_id, str(self.path), self._started_ns, self._changed_ns, self._history[-1])

    def publish(self, progress: Progress) -> None:
        """Tell the watchers."""
        if progress.state is self._history[-1].state:
            self._history[-1] = progress
        else:
            self._history.append(progress)
        self._changed_ns = time.time_ns()
        self._wake()

    def stop(self) -> None:
        """Tell the watchers that no more comes: the importer stops, and the next one goes on."""
        self._stopped = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self) -> AsyncIterator[Progress]:
        """Every state from the first, and the newest progress in the present one, until the end.

        Raises:
            BundleError: STOPPING, the importer stops before that.
        """
        position, last = 0, None
        while last is None or last.state not in _FINAL:
            changed = self._changed
            if self._history[position] is not last:
                last = self._history[position]
                yield last
            elif position + 1 < len(self._history):
                position += 1
            elif self._stopped:
                raise StoppingError
            else:
                await changed.wait()


class Jobs:
    """The queue: one import works, the others wait; one path is in it once.

    Args:
        place: where imports happen.
        ledger_failed: called when store.db cannot be written. What a database says after a failed sync is not
            believed: the process ends, and the next one looks at what is on the disk.
    """

    def __init__(self, place: Workplace, ledger_failed: Callable[[], None]) -> None:
        self._place = place
        self._ledger_failed = ledger_failed
        self._running: dict[Path, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._threads = ThreadPoolExecutor(MOST_IMPORTS, thread_name_prefix="import")
        self.outbox_grew = asyncio.Event()

    def start(self, path: Path) -> Job:
        """The job that imports `path`: the one that does already, or a new one.

        Raises:
            BundleError: IMPORTS_TOO_MANY.
        """
        job = self._running.get(path)
        if job is None or job.ended:
            if len(self._running) >= MOST_IMPORTS:
                raise BundleError(
                    "IMPORTS_TOO_MANY", f"{MOST_IMPORTS} imports run or wait; let one end, or cancel it"
                )
            job = self._begin(Job(path))
        return job

    def take_up(self, ready: asyncio.Event | None = None) -> None:
        """Go on with the imports that an importer left which died or stopped, in the order in which they came.

        Args:
            ready: they are known at once, and work when this is set: one that kills the importer shall not keep it
                from ever being ready.
        """
        for left in self._place.ledger.unfinished():
            self._begin(Job(Path(left.path), left), ready)

    async def look_again(self, job: Job) -> None:
        """Where a job waits for a volume, look once more where that would lie by itself."""
        taken = await asyncio.to_thread(job.steering.look_again)
        latest = job.latest.progress
        if taken and latest.volume_wanted == taken and latest.state not in _FINAL:
            job.publish(replace(latest, volume_wanted=0, volume_refused=""))

    def _begin(self, job: Job, ready: asyncio.Event | None = None) -> Job:
        self._running[job.path] = job
        self._place.desk.line_up(job.steering)  # here: its thread may begin later than those behind it
        self._tasks[job.import_id] = asyncio.create_task(self._run(job, ready))
        return job

    def running(self) -> list[Import]:
        """The imports that work or wait, newest first."""
        return [job.latest for job in reversed(self._running.values())]

    async def offer(self, import_id: str, path: Path) -> None:
        """Hand a volume to an import that waits for it.

        Raises:
            BundleError: IMPORT_NOT_FOUND, or as `Steering.offer`.
        """
        await asyncio.to_thread(self._find(import_id).steering.offer, path)

    async def cancel(self, import_id: str) -> None:
        """End an import; it has ended when this returns.

        Raises:
            BundleError: IMPORT_NOT_FOUND.
        """
        self._find(import_id).steering.end(
            BundleError("IMPORT_CANCELLED", "an operator ended the import; importing the bundle again goes on")
        )
        await asyncio.gather(*filter(None, [self._tasks.get(import_id)]), return_exceptions=True)

    async def stop(self) -> None:
        """Leave all imports, each at its next chunk or where it waits, for the next importer to take up."""
        for job in self._running.values():
            job.steering.end(StoppingError())
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._threads.shutdown()

    def wake(self) -> None:
        """The outbox may have grown."""
        self.outbox_grew.set()
        self.outbox_grew = asyncio.Event()

    def _find(self, import_id: str) -> Job:
        for job in self._running.values():
            if job.import_id == import_id:
                return job
        raise BundleError("IMPORT_NOT_FOUND", "no import of this name runs or waits")

    async def _run(self, job: Job, ready: asyncio.Event | None) -> None:
        if ready is not None:
            await ready.wait()
        loop = asyncio.get_running_loop()

        def told(progress: Progress) -> None:
            loop.call_soon_threadsafe(self._publish, job, progress)

        def carry_out() -> Progress:
            if job.left is not None:
                return take_up(self._place, job.left, told, job.steering)
            return import_bundle(self._place, job.import_id, job.path, told, job.steering)

        try:
            await loop.run_in_executor(self._threads, carry_out)
        except sqlite3.Error:
            log.exception("an import cannot be recorded", extra={"import_id": job.import_id})
            self._ledger_failed()
        except Exception as error:
            log.exception("import failed", extra={"import_id": job.import_id})
            reason = Progress(State.REJECTED, reason="INTERNAL", message=f"a defect: {type(error).__name__}")
            job.publish(reason)
        finally:
            self._place.desk.leave(job.steering)
            job.stop()
            if self._running.get(job.path) is job:
                del self._running[job.path]
            self._tasks.pop(job.import_id, None)
            self.wake()

    def _publish(self, job: Job, progress: Progress) -> None:
        job.publish(progress)
        self.wake()
