"""Audit logs for tests: made in a directory, opened again, and changed behind the log's back."""

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.control.audit import AuditLog, Record, Stamp, Verdict, load_public_key, make_key, verify

ORIGIN = "cloister/test/audit"


class ManualClock:
    """A clock that stands where the test puts it."""

    def __init__(self) -> None:
        self.utc_ns = 1_800_000_000_000_000_000
        self.mono_ns = 1_000
        self.boot = "boot-1"

    def read(self) -> Stamp:
        self.mono_ns += 1
        return Stamp(self.utc_ns, self.mono_ns, self.boot, "synchronised")

    def wait(self, seconds: float) -> None:
        self.utc_ns += int(seconds * 1e9)
        self.mono_ns += int(seconds * 1e9)


@dataclass(frozen=True)
class Home:
    """Where one log lies."""

    path: Path

    @property
    def db(self) -> Path:
        return self.path / "audit.db"

    @property
    def head(self) -> Path:
        return self.path / "audit.head"

    @property
    def key(self) -> Path:
        return self.path / "audit.pem"

    @property
    def public_key(self) -> bytes:
        return load_public_key(self.path / "audit.pub")

    def create(self, **options: object) -> AuditLog:
        make_key(self.key, ORIGIN)
        return AuditLog.create(self.db, self.head, self.key, ORIGIN, **options)

    def open(self, **options: object) -> AuditLog:
        return AuditLog.open(self.db, self.head, self.key, ORIGIN, **options)

    def verify(self) -> Verdict:
        return verify(self.db, self.head, self.public_key)

    def change(self, *statements: str | Callable[[sqlite3.Connection], None]) -> None:
        """Change the closed database as an intruder with a copy of SQLite would."""
        connection = sqlite3.connect(self.db, isolation_level=None)
        connection.execute("PRAGMA ignore_check_constraints=ON")
        for statement in statements:
            if callable(statement):
                statement(connection)
            else:
                connection.execute(statement)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()


def cut(connection: sqlite3.Connection, size: int) -> None:
    """Take a log back to an earlier size, leaving no trace of what followed."""
    connection.execute("DELETE FROM rec WHERE seq>?", (size,))
    connection.execute("DELETE FROM checkpoint WHERE size>?", (size,))
    connection.execute("DELETE FROM node WHERE (idx+1)<<level>?", (size,))


def numbered(number: int) -> Record:
    """A record like any other: an intent or the outcome that follows it."""
    phase, decision = ("intent", "allow") if number % 2 else ("outcome", "ok")
    facts = {"prompt_tokens": 40 + number, "parameters": {"temperature": "0"}, "note": 'é"\n\\ 😀'}
    return Record(
        "inference.generate", phase, f"app-{number % 3}", decision, f"r-{(number + 1) // 2}", "acme", facts
    )


def fill(log: AuditLog, batches: Sequence[int]) -> None:
    """Append records in group commits of exactly these sizes."""
    from appliance.control.audit.record import draft

    ledger = log._writer._ledger
    assert ledger is not None
    number = log.size
    for size in batches:
        ledger.append([draft(numbered(number + i + 1)) for i in range(size)])
        number += size
