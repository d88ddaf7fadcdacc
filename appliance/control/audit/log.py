"""The audit log as the control process uses it: append and wait for durability, read, look up, close.

Writing goes through one thread (`writer`); reading opens a short read-only connection per call, in the caller's
thread, so it works while the log takes no records.
"""

import asyncio
import fcntl
import os
import sqlite3
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

from appliance.control.audit import note, store
from appliance.control.audit.clock import Clock, SystemClock
from appliance.control.audit.errors import blocked, exists, in_use
from appliance.control.audit.head import Signer, load_signer
from appliance.control.audit.ledger import Ledger, Place
from appliance.control.audit.query import Filter, Page, query
from appliance.control.audit.record import Receipt, Record, StoredRecord, draft
from appliance.control.audit.writer import Writer

_OPEN_INTENTS = f"""SELECT {store.COLUMNS} FROM rec AS intent WHERE seq>? AND phase='intent' AND NOT EXISTS(
 SELECT 1 FROM rec WHERE req_id=intent.req_id AND phase='outcome') ORDER BY seq"""  # noqa: S608  # constant


class AuditLog:
    """An open audit log; at most one process has it open. Made by `create` or `open`; thread-safe."""

    def __init__(self, place: Place, ledger: Ledger, lock: int) -> None:
        self._db = place.db
        self._signer: Signer = place.signer
        self._lock = lock
        self._writer = Writer(place, ledger)

    @classmethod
    def create(
        cls,
        db: Path,
        head: Path,
        key: Path,
        origin: str,
        clock: Clock | None = None,
        factory: type[sqlite3.Connection] = sqlite3.Connection,
    ) -> "AuditLog":
        """Make an empty log; the caller appends its genesis.

        Args:
            db: the database to make.
            head: the signed head to make.
            key: Ed25519 private key, PKCS#8 PEM; see `make_key`.
            origin: name of the log, `cloister/SITE/audit`.
            clock: who tells the time; the machine by default.
            factory: class of the writing connection.

        Raises:
            CloisterError: AUDIT_EXISTS, AUDIT_IN_USE.
            OSError, ValueError: the key cannot be read, the files cannot be made, or the origin is no name.
        """
        place = Place(db, head, load_signer(key, origin), clock or SystemClock(), factory)
        if db.exists() or head.exists():
            raise exists(str(db if db.exists() else head))
        lock = _lock(db)
        try:
            return cls(place, Ledger.create(place), lock)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def open(
        cls,
        db: Path,
        head: Path,
        key: Path,
        origin: str,
        clock: Clock | None = None,
        factory: type[sqlite3.Connection] = sqlite3.Connection,
    ) -> "AuditLog":
        """Open a log whose tail is what its signed head says.

        Takes what `create` takes. A log that a crash left ahead of its head is accepted when its own checkpoint
        signs the difference; a record `audit.resumed` says so.

        Raises:
            AuditTamperedError: the log is not what the head signs.
            CloisterError: AUDIT_IN_USE.
            OSError, ValueError, sqlite3.Error: key or database cannot be read.
        """
        place = Place(db, head, load_signer(key, origin), clock or SystemClock(), factory)
        lock = _lock(db)
        try:
            return cls(place, Ledger.open(place), lock)
        except BaseException:
            os.close(lock)
            raise

    def append(self, record: Record) -> "Future[Receipt]":
        """Hand over a record; the future resolves when it is durable and covered by the head.

        Records are written in the order they are handed over. The future fails with AUDIT_BLOCKED when the log
        takes no records; whether a record that was under way at that moment got in shows in the log later.

        Raises:
            AuditRecordError: the record itself cannot be written.
        """
        return self._writer.submit(draft(record))

    async def record(self, record: Record, timeout: float = 2.0) -> Receipt:
        """Append and wait until durable, at most `timeout` seconds.

        Cancelling the caller, or running out of time, does not take the record back.

        Raises:
            CloisterError: AUDIT_BLOCKED (UNAVAILABLE).
            AuditRecordError: the record itself cannot be written.
        """
        future = asyncio.wrap_future(self.append(record))
        done, _ = await asyncio.wait((future,), timeout=timeout)
        if not done:
            future.add_done_callback(_consume)
            raise blocked(f"no commit within {timeout:g} s")
        return future.result()

    @property
    def size(self) -> int:
        """Durable records."""
        return self._writer.state[0]

    @property
    def root(self) -> bytes:
        """RFC 9162 root over them."""
        return self._writer.state[1]

    @property
    def blocked(self) -> str:
        """Why the log takes no records at present; empty when it does."""
        return self._writer.blocked

    @property
    def origin(self) -> str:
        """The log's name, in every note it signs."""
        return self._signer.origin

    @property
    def public_key(self) -> bytes:
        """Ed25519 public key of the head, 32 bytes, as `verify` takes it."""
        return self._signer.public_key

    @property
    def verifier_key(self) -> str:
        """The same as text, `name+id+base64`, for verifiers elsewhere."""
        return note.verifier_key(self.origin, self.public_key)

    def read(self, after: int, limit: int) -> list[StoredRecord]:
        """Up to `limit` records after sequence number `after`, in order.

        Raises:
            sqlite3.Error: the database cannot be read.
        """
        with closing(store.connect_reader(self._db)) as connection:
            return store.records(store.read_rows(connection, after, limit))

    def query(self, wanted: Filter, before: int, limit: int) -> Page:
        """The newest records before a sequence number (0: of all) that match; see `query.query`.

        Raises:
            sqlite3.Error: the database cannot be read.
        """
        return query(self._db, wanted, before, limit)

    def open_intents(self, after: int = 0) -> list[StoredRecord]:
        """Intents after `after` without an outcome of the same request, in order.

        Raises:
            sqlite3.Error: the database cannot be read.
        """
        with closing(store.connect_reader(self._db)) as connection:
            return store.records(connection.execute(_OPEN_INTENTS, (after,)))

    def has(self, kind: str, request_id: str) -> bool:
        """Whether a record of this kind with this request id is in the log.

        Raises:
            sqlite3.Error: the database cannot be read.
        """
        with closing(store.connect_reader(self._db)) as connection:
            query = "SELECT 1 FROM rec WHERE req_id=? AND kind=? LIMIT 1"
            return connection.execute(query, (request_id.encode(), kind)).fetchone() is not None

    def close(self) -> None:
        """Write what waits, fold the write-ahead log into the database, make the head durable."""
        self._writer.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _consume(future: "asyncio.Future[Receipt]") -> None:
    """Look at the result of a future nobody waits for any more, so that asyncio does not complain."""
    if not future.cancelled():
        future.exception()


def _lock(db: Path) -> int:
    """Take the lock of the one writer; a file of its own, as SQLite's locks on the database die with any close."""
    descriptor = os.open(db.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise in_use(str(db)) from None
    return descriptor
