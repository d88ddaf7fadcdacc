"""Imports one after the other, each watched by any number of callers and carried on when all of them leave."""

import asyncio
import logging
import secrets
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bundles.format.errors import BundleError
from bundles.importer.importing import Workplace, import_bundle
from bundles.pipeline import Progress, State

log = logging.getLogger(__name__)
_FINAL = (State.COMMITTED, State.REJECTED)


class Job:
    """One import and what was said of it: the last progress of every state it was in."""

    def __init__(self, path: Path) -> None:
        self.import_id = secrets.token_hex(8)
        self.path = path
        self._history: list[Progress] = [Progress(State.QUARANTINE)]
        self._changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Committed or rejected."""
        return self._history[-1].state in _FINAL

    def publish(self, progress: Progress) -> None:
        """Tell the watchers."""
        if progress.state is self._history[-1].state:
            self._history[-1] = progress
        else:
            self._history.append(progress)
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self) -> AsyncIterator[Progress]:
        """Every state from the first, and the newest progress in the present one, until the end."""
        position, last = 0, None
        while last is None or last.state not in _FINAL:
            changed = self._changed
            if self._history[position] is not last:
                last = self._history[position]
                yield last
            elif position + 1 < len(self._history):
                position += 1
            else:
                await changed.wait()


class Jobs:
    """The queue: one import runs, the others wait; one path is in it once.

    Args:
        place: where imports happen.
        ledger_failed: called when store.db cannot be written. What a database says after a failed sync is not
            believed: the process ends, and the next one looks at what is on the disk.
    """

    def __init__(self, place: Workplace, ledger_failed: Callable[[], None]) -> None:
        self._place = place
        self._ledger_failed = ledger_failed
        self._running: dict[Path, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="import")
        self._stopping = False
        self.outbox_grew = asyncio.Event()

    def start(self, path: Path) -> Job:
        """The job that imports `path`: the one that does already, or a new one."""
        job = self._running.get(path)
        if job is None:
            job = self._running[path] = Job(path)
            task = asyncio.create_task(self._run(job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return job

    async def stop(self) -> None:
        """End the running import at its next chunk, and those that wait; all are recorded as interrupted."""
        self._stopping = True
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._thread.shutdown()

    async def _run(self, job: Job) -> None:
        loop = asyncio.get_running_loop()

        def told(progress: Progress) -> None:
            loop.call_soon_threadsafe(self._publish, job, progress)
            if self._stopping and progress.state not in _FINAL:
                raise BundleError("INTERRUPTED", "the importer is stopping; import the bundle again")

        try:
            await loop.run_in_executor(self._thread, import_bundle, self._place, job.import_id, job.path, told)
        except Exception as error:
            log.exception("import failed", extra={"import_id": job.import_id})
            reason = Progress(State.REJECTED, reason="INTERNAL", message=f"a defect: {type(error).__name__}")
            job.publish(reason)
            if isinstance(error, sqlite3.Error):
                self._ledger_failed()
        finally:
            self._running.pop(job.path, None)
            self._wake()

    def _publish(self, job: Job, progress: Progress) -> None:
        job.publish(progress)
        self._wake()

    def _wake(self) -> None:
        self.outbox_grew.set()
        self.outbox_grew = asyncio.Event()
