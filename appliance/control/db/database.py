"""One connection to control.db in one thread: jobs queue up, each is all or nothing, and one commit serves many.

Jobs that wait at the same time share a transaction (group commit): each runs in a savepoint of its own, so one
that fails takes back only its own changes, and all are answered after the one COMMIT, synchronous=FULL, has made
them durable. Some errors (a full disk, for one) make SQLite roll back the transaction and not the savepoint; then
all of its jobs that write fail, and those that only read are carried out again without them. One connection keeps
clear of the WAL-reset defect of SQLite before 3.51.3, which needs two.

Source: sqlite.org/wal.html, sqlite.org/lang_savepoint.html, sqlite.org/lang_transaction.html (section 3.2).
"""

import asyncio
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import grpc
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from appliance.errors import CloisterError

Result = TypeVar("Result")
log = logging.getLogger(__name__)
NEWEST_REVISION = max(path.name[:4] for path in Path(__file__).parent.glob("migrations/versions/0*.py"))
"""Their files begin with their numbers."""
_MOST_PER_COMMIT = 64
_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF", "cell_size_check=ON")


@dataclass
class _Job:
    work: Callable[[Session], Any]
    done: "Future[Any]"
    error: Exception | None = None
    result: Any = None
    wrote: bool = False


class Database:
    """control.db, open. Give it functions of a Session; it runs them one after another.

    Args:
        path: the file; made when absent.

    Raises:
        CloisterError: DATABASE_REVISION_UNKNOWN, a newer or foreign program wrote the file.
    """

    def __init__(self, path: Path) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, args=(path,), name="control.db", daemon=True)
        self._opened: Future[None] = Future()
        self._thread.start()
        try:
            self._opened.result()
        except BaseException:
            self._thread.join()
            raise

    async def run(self, work: Callable[[Session], Result]) -> Result:
        """What `work` returns, once its changes are durable; they are undone when it raises."""
        return await asyncio.wrap_future(self.submit(work))

    def submit(self, work: Callable[[Session], Result]) -> "Future[Result]":
        """Queue `work`; its future is done once its changes are durable or undone."""
        done: Future[Result] = Future()
        if self._closed:
            raise RuntimeError("control.db is closed")
        self._jobs.put(_Job(work, done))
        return done

    def close(self) -> None:
        """Finish what is queued and close the file."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._thread.join()

    def _work(self, path: Path) -> None:
        engine = _engine(path)
        try:
            with engine.connect() as connection:
                _migrate(connection)
            session = Session(engine, expire_on_commit=False, autoflush=True)
        except BaseException as error:
            engine.dispose()
            self._opened.set_exception(error)
            return
        self._opened.set_result(None)
        with session:
            raw: Any = session.connection().connection.driver_connection
            session.rollback()
            try:
                while batch := self._next_batch():
                    _carry_out(session, raw, batch)
            except BaseException:  # nobody would be answered any more: `serve` starts a clean process
                log.exception("the thread of control.db failed")
                os._exit(1)
        engine.dispose()

    def _next_batch(self) -> list[_Job]:
        """All that waits, up to a limit; empty when there will be nothing more."""
        first = self._jobs.get()
        batch = [first] if first else []
        while batch and len(batch) < _MOST_PER_COMMIT:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)
                break
            batch.append(job)
        return batch


def _carry_out(session: Session, raw: sqlite3.Connection, batch: list[_Job]) -> None:
    """Run the jobs in one transaction, then answer them; those behind a lost transaction share the next one."""
    while batch:
        done, again = _transaction(session, raw, batch)
        session.expunge_all()
        for job in done:
            _answer(job)
        batch = [*again, *batch[len(done) + len(again) :]]


def _transaction(session: Session, raw: sqlite3.Connection, batch: list[_Job]) -> tuple[list[_Job], list[_Job]]:
    """Run jobs from the front of `batch` and commit: those that have their result or error, and those that only
    read in a transaction that was lost for what others wrote.
    """
    ran: list[_Job] = []
    try:
        for job in batch:
            ran.append(job)
            before = raw.total_changes
            try:
                with session.begin_nested():
                    job.result = job.work(session)
            except Exception as error:
                job.error = error
                if not raw.in_transaction:
                    raise
            job.wrote = raw.total_changes != before
        session.commit()
    except Exception as error:  # nothing of the transaction is durable
        session.rollback()
        readers = [job for job in ran if job.error is None and not job.wrote]
        again = readers if len(readers) < len(ran) else []
        lost = [job for job in ran if job not in again]
        _lose(lost, error)
        return lost, again
    return ran, []


def _lose(jobs: list[_Job], error: Exception) -> None:
    """Fail all jobs of a transaction that is gone; what one had refused by itself it still refuses."""
    log.error("a transaction of control.db was lost", extra={"jobs": len(jobs)}, exc_info=error)
    for job in jobs:
        if not isinstance(job.error, CloisterError):
            job.error = CloisterError(
                "DATABASE_FAILED",
                "control.db could not be written and nothing of this was done; control's log has the cause",
                grpc.StatusCode.UNAVAILABLE,
                retry_after=timedelta(seconds=1),
            )


def _answer(job: _Job) -> None:
    if not job.done.set_running_or_notify_cancel():
        return
    if job.error is not None:
        job.done.set_exception(job.error)
    else:
        job.done.set_result(job.result)


def _engine(path: Path) -> Engine:
    """An engine over one connection, with transactions begun by us and not by the driver."""
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=StaticPool,
        connect_args={"check_same_thread": False},
        hide_parameters=True,  # errors are logged, and parameters are not for logs
    )

    @event.listens_for(engine, "connect")
    def _connected(raw: DBAPIConnection, _record: object) -> None:
        raw.isolation_level = None
        cursor = raw.cursor()
        for pragma in _PRAGMAS:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _migrate(connection: Connection) -> None:
    """Bring the file to this program's revision, or refuse one that this program does not know.

    Alembic is loaded only where something is to be done: it takes a quarter of a second, and a start with open
    leases has five.
    """
    if _revisions(connection) != [NEWEST_REVISION]:
        from appliance.control.db.migrating import migrate

        migrate(connection)
    connection.commit()


def _revisions(connection: Connection) -> list[str]:
    """What Alembic wrote into the file; nothing in a new one."""
    tables = "SELECT name FROM sqlite_master WHERE name = 'alembic_version'"
    if not connection.exec_driver_sql(tables).all():
        return []
    return list(connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars())
