"""store.db itself: its tables, and transactions that are whole or not there.

One connection, one writer.

Source: sqlite.org, "Write-Ahead Logging"; synchronous=FULL survives power loss.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bundles.durable import DISK, Fs
from bundles.format.errors import BundleError

SCHEMA_VERSION = 3
_SCHEMA = """
CREATE TABLE import(
  import_id TEXT PRIMARY KEY, path TEXT NOT NULL, state TEXT NOT NULL, progress TEXT NOT NULL,
  started_ns INTEGER NOT NULL, changed_ns INTEGER NOT NULL,
  working INTEGER NOT NULL DEFAULT 0, deaths INTEGER NOT NULL DEFAULT 0, offered TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE model_version(
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, version TEXT NOT NULL, sequence INTEGER NOT NULL,
  model_digest TEXT NOT NULL UNIQUE, record TEXT NOT NULL, UNIQUE(name, version), UNIQUE(name, sequence)
) STRICT;
CREATE TABLE floor(
  name TEXT PRIMARY KEY, sequence INTEGER NOT NULL, model_digest TEXT NOT NULL, issued_at INTEGER NOT NULL
) STRICT;
CREATE TABLE trust(
  one INTEGER PRIMARY KEY CHECK(one = 1), root_version INTEGER NOT NULL, revocation_sequence INTEGER NOT NULL
) STRICT;
CREATE TABLE staged(
  model_digest TEXT NOT NULL, position INTEGER NOT NULL, bytes INTEGER NOT NULL, changed_ns INTEGER NOT NULL,
  PRIMARY KEY(model_digest, position)
) STRICT;
CREATE TABLE scrub(
  one INTEGER PRIMARY KEY CHECK(one = 1), position TEXT NOT NULL, started INTEGER NOT NULL, ended INTEGER NOT NULL,
  bytes_done INTEGER NOT NULL
) STRICT;
CREATE TABLE damage(sha256 TEXT PRIMARY KEY, finding TEXT NOT NULL) STRICT;
CREATE TABLE outbox(
  sequence INTEGER PRIMARY KEY AUTOINCREMENT, event TEXT NOT NULL, import_id TEXT NOT NULL, state TEXT NOT NULL,
  reason TEXT NOT NULL, model_version TEXT NOT NULL, model_digest TEXT NOT NULL, detail TEXT NOT NULL,
  utc_ns INTEGER NOT NULL
) STRICT;
"""
_FROM_2 = """
ALTER TABLE import ADD COLUMN working INTEGER NOT NULL DEFAULT 0;
ALTER TABLE import ADD COLUMN deaths INTEGER NOT NULL DEFAULT 0;
ALTER TABLE import ADD COLUMN offered TEXT NOT NULL DEFAULT '';
"""
_STEPS = {0: _SCHEMA, 2: _FROM_2}  # each from its version to the present one


class Database:
    """The connection; safe to call from several threads.

    Args:
        path: made when absent.
        fs: how transactions end.

    Raises:
        BundleError: LEDGER_NEWER, another Cloister wrote it.
    """

    def __init__(self, path: Path, fs: Fs = DISK) -> None:
        self._fs = fs
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "trusted_schema=OFF", "cell_size_check=ON"):
            self._db.execute(f"PRAGMA {pragma}")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version in _STEPS:
            self._db.executescript(
                f"BEGIN IMMEDIATE; {_STEPS[version]} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
            )
        elif version != SCHEMA_VERSION:
            self._db.close()
            raise BundleError("LEDGER_NEWER", f"{path} has schema {version}, this version reads {SCHEMA_VERSION}")

    def close(self) -> None:
        """Close the connection; what was not committed never was."""
        with self._lock:
            self._db.close()

    def rows(self, query: str, values: tuple[object, ...] = ()) -> list[Any]:
        """All rows of a query."""
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def execute(self, statement: str, values: tuple[object, ...] = ()) -> int:
        """Change rows inside a transaction of this thread; how many."""
        return self._db.execute(statement, values).rowcount

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block's changes, or none; blocks in blocks are one."""
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._fs.commit(self._db)
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
