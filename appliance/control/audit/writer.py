"""The one thread that writes the log: group commit, and no trust in a database after it failed once.

Whatever waits when a commit ends goes into the next one. After an error the ledger is poisoned: the batch and all
that wait are refused, the ledger is opened anew from the disk, its tail verified, its write-ahead log folded, and
a record of the incident committed; only then are records taken again. A failed fsync is never followed by a
hopeful next commit. Meanwhile a connection that only reads stays open: with the last one SQLite removes the shared
index of the write-ahead log, and on a full disk no reader could make it anew.

Source: "PostgreSQL's fsync() surprise" (2018) for what a failed fsync leaves behind.
"""

import logging
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

from appliance.control.audit import store
from appliance.control.audit.errors import AuditTamperedError, blocked
from appliance.control.audit.ledger import Ledger, Place
from appliance.control.audit.record import Draft, Receipt

MAX_BATCH = 1024
MAX_WAITING = 65_536
_FIRST_RETRY = 0.05
_LAST_RETRY = 2.0

log = logging.getLogger(__name__)


class Waiting(NamedTuple):
    """A record on its way, and whom to tell."""

    item: Draft
    future: "Future[Receipt]"


class Writer:
    """Owns a ledger and the thread that appends to it.

    Args:
        place: where the log lies, to open it anew.
        ledger: the open ledger; from now on this thread's alone.
    """

    def __init__(self, place: Place, ledger: Ledger) -> None:
        self._place = place
        self._ledger: Ledger | None = ledger
        self._readable: sqlite3.Connection | None = None
        self._queue: deque[Waiting] = deque()
        self._signal = threading.Condition()
        self._closing = False
        self.blocked = ""
        self.state = (ledger.size, ledger.root)
        self._thread = threading.Thread(target=self._run, name="audit-writer", daemon=True)
        self._thread.start()

    def submit(self, item: Draft) -> "Future[Receipt]":
        """Hand a record over; the future resolves once it is durable, or fails with AUDIT_BLOCKED."""
        future: Future[Receipt] = Future()
        future.set_running_or_notify_cancel()  # a record handed over can no longer be taken back
        with self._signal:
            why = "it is closed" if self._closing else self.blocked
            if not why and len(self._queue) >= MAX_WAITING:
                why = f"{MAX_WAITING} records wait already"
            if not why:
                self._queue.append(Waiting(item, future))
                self._signal.notify()
        if why:
            future.set_exception(blocked(why))
        return future

    def close(self) -> None:
        """Write what waits, close the ledger, end the thread."""
        with self._signal:
            self._closing = True
            self._signal.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:  # nobody would write, and every request would wait: `serve` starts a clean process
            log.exception("audit writer failed")
            os._exit(1)

    def _serve(self) -> None:
        delay = _FIRST_RETRY
        while not self._done():
            if not self.blocked:
                delay = _FIRST_RETRY
                self._write(self._take())
            elif not self._resumed():
                delay = min(2 * delay, _LAST_RETRY)
                self._pause(delay)
        if self._ledger is not None:
            self._ledger.close()
        self._let_go()

    def _done(self) -> bool:
        with self._signal:
            return self._closing and not self._queue

    def _pause(self, seconds: float) -> None:
        with self._signal:
            self._signal.wait_for(lambda: self._closing, seconds)

    def _take(self) -> list[Waiting]:
        """The next batch, waited for; empty when the log is being closed."""
        with self._signal:
            self._signal.wait_for(lambda: self._queue or self._closing)
            count = min(len(self._queue), MAX_BATCH)
            return [self._queue.popleft() for _ in range(count)]

    def _write(self, batch: Sequence[Waiting]) -> None:
        if not batch or self._ledger is None:
            return
        try:
            receipts = self._ledger.append([waiting.item for waiting in batch])
        except Exception as error:  # whatever it was, what is on the disk is unknown now
            self._poison(batch, error)
            return
        self.state = (self._ledger.size, self._ledger.root)
        for waiting, receipt in zip(batch, receipts, strict=True):
            waiting.future.set_result(receipt)

    def _poison(self, batch: Sequence[Waiting], error: Exception) -> None:
        """Refuse everything that was promised nothing yet, and drop the ledger."""
        why = _describe(error)
        log.error("audit log blocked", extra={"reason": why, "refused": len(batch)})
        with self._signal:
            self.blocked = why
            refused = [*batch, *self._queue]
            self._queue.clear()
        for waiting in refused:
            waiting.future.set_exception(blocked(why))
        self._keep_readable()
        self._drop()

    def _drop(self) -> None:
        ledger, self._ledger = self._ledger, None
        try:
            if ledger is not None:
                ledger.discard()
        except (sqlite3.Error, OSError) as error:  # a disk that fails may fail close(2), too
            log.warning("audit log not closed", extra={"reason": _describe(error)})

    def _keep_readable(self) -> None:
        """Hold the files open for readers until the log is written again."""
        try:
            self._readable = store.connect_reader(self._place.db)
        except (sqlite3.Error, OSError) as error:
            log.warning("audit log not readable while it is blocked", extra={"reason": _describe(error)})

    def _let_go(self) -> None:
        if self._readable is not None:
            self._readable.close()
            self._readable = None

    def _resumed(self) -> bool:
        """Try to open the log again, down to a record written; False when it still fails."""
        try:
            self._ledger = Ledger.open(self._place, fold=True)
        except Exception as error:  # stays blocked, whatever it was
            self.blocked = _describe(error)
            return False
        self._let_go()
        self.state = (self._ledger.size, self._ledger.root)
        self.blocked = ""
        log.warning("audit log resumed", extra={"size": self._ledger.size})
        return True


def _describe(error: Exception) -> str:
    if isinstance(error, AuditTamperedError):
        return f"{error.code} {error.reason}"
    if isinstance(error, sqlite3.Error):
        return f"{getattr(error, 'sqlite_errorname', 'SQLITE_ERROR')}: {error}"
    return f"{type(error).__name__}: {error}"
