"""store.db: what was imported, and the outbox of state changes that control copies into the audit log.

One connection, one writer. A state change and its outbox row are one transaction, so the log can neither miss a
change nor hear of one that did not happen.

Source: sqlite.org, "Write-Ahead Logging"; synchronous=FULL survives power loss.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bundles.format.errors import BundleError
from bundles.importer.floors import Floors
from bundles.pipeline import Progress, State
from bundles.trust.policy import Floor

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE import(
  import_id TEXT PRIMARY KEY, path TEXT NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL, message TEXT NOT NULL,
  model_version TEXT NOT NULL, model_digest TEXT NOT NULL, started_ns INTEGER NOT NULL, changed_ns INTEGER NOT NULL
) STRICT;
CREATE TABLE model_version(
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, version TEXT NOT NULL, sequence INTEGER NOT NULL,
  model_digest TEXT NOT NULL UNIQUE, record TEXT NOT NULL, UNIQUE(name, version), UNIQUE(name, sequence)
) STRICT;
CREATE TABLE outbox(
  sequence INTEGER PRIMARY KEY AUTOINCREMENT, import_id TEXT NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL,
  model_version TEXT NOT NULL, model_digest TEXT NOT NULL, utc_ns INTEGER NOT NULL
) STRICT;
"""


@dataclass(frozen=True)
class ModelVersion:
    """A committed model version.

    Attributes:
        name: the model's.
        version: shown to people.
        sequence: release order.
        model_digest: SHA-256 of the signed manifest, hex.
        kind: model, adapter or draft.
        imported_at: seconds since the epoch.
        signers: key ids whose signatures counted, release and publisher.
        total_size: bytes of all files.
        architecture: as config.json names it.
        files: path, size and SHA-256 of each.
        evidence: digests in the store of the signed documents, by what they are.
    """

    name: str
    version: str
    sequence: int
    model_digest: str
    kind: str
    imported_at: int
    signers: tuple[str, ...]
    total_size: int
    architecture: str
    files: tuple[Mapping[str, str | int], ...]
    evidence: Mapping[str, str]

    @property
    def reference(self) -> str:
        """name@version."""
        return f"{self.name}@{self.version}"

    def digests(self) -> Iterator[str]:
        """SHA-256 of everything that the store holds of it: the files and the evidence."""
        yield from (str(file["sha256"]) for file in self.files)
        yield from self.evidence.values()

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, text: str) -> "ModelVersion":
        """Of what `as_dict` gave."""
        fields = json.loads(text)
        return cls(**fields | {"signers": tuple(fields["signers"]), "files": tuple(fields["files"])})


@dataclass(frozen=True)
class Entry:
    """One outbox row; `sequence` grows by one, `utc_ns` are nanoseconds since the epoch."""

    sequence: int
    import_id: str
    state: State
    reason: str
    model_version: str
    model_digest: str
    utc_ns: int


class Ledger:
    """The database; safe to call from several threads.

    Args:
        path: made when absent.
        now_ns: the clock, nanoseconds since the epoch.

    Raises:
        BundleError: LEDGER_NEWER, a newer Cloister wrote it.
    """

    def __init__(self, path: Path, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._now_ns = now_ns
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "trusted_schema=OFF", "cell_size_check=ON"):
            self._db.execute(f"PRAGMA {pragma}")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise BundleError("LEDGER_NEWER", f"{path} has schema {version}, this version reads {SCHEMA_VERSION}")

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._db.close()

    def begin(self, import_id: str, path: Path) -> None:
        """An import starts, in quarantine."""
        now = self._now_ns()
        with self._transaction():
            self._db.execute(
                "INSERT INTO import VALUES(?,?,?,'','','','',?,?)",
                (import_id, str(path), State.QUARANTINE, now, now),
            )
            self._append(import_id, Progress(State.QUARANTINE), now)

    def change(self, import_id: str, progress: Progress) -> None:
        """An import is in another state."""
        with self._transaction():
            self._change(import_id, progress)

    def commit(self, import_id: str, progress: Progress, version: ModelVersion) -> None:
        """An import is complete and its version exists, or neither; one that existed gets the new record."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO model_version(name,version,sequence,model_digest,record) VALUES(?,?,?,?,?)"
                " ON CONFLICT(model_digest) DO UPDATE SET record=excluded.record",
                (
                    version.name,
                    version.version,
                    version.sequence,
                    version.model_digest,
                    json.dumps(version.as_dict()),
                ),
            )
            self._change(import_id, progress)

    def reject_unfinished(self) -> None:
        """Close what a process that died left open: imports that can never go on."""
        final = (State.COMMITTED, State.REJECTED)
        reason = Progress(State.REJECTED, reason="INTERRUPTED", message="the importer stopped; import it again")
        with self._transaction():
            rows = self._db.execute("SELECT import_id FROM import WHERE state NOT IN (?,?)", final).fetchall()
            for (import_id,) in rows:
                self._change(import_id, reason)

    def versions(self) -> tuple[ModelVersion, ...]:
        """All committed versions, oldest first."""
        with self._lock:
            rows = self._db.execute("SELECT record FROM model_version ORDER BY id").fetchall()
        return tuple(ModelVersion.from_json(record) for (record,) in rows)

    def find(self, reference: str) -> ModelVersion | None:
        """The version called name@version, the newest of a name, or the one with a digest."""
        found = [v for v in self.versions() if reference in (v.reference, v.model_digest, v.name)]
        return max(found, key=lambda v: v.sequence, default=None)

    def floors(self) -> Floors:
        """Floors that the committed versions set; the clock's is only in its file."""
        floors: dict[str, Floor] = {}
        for version in sorted(self.versions(), key=lambda v: v.sequence):
            floors[version.name] = Floor(version.sequence, version.model_digest)
        return Floors(floors)

    def outbox(self, after: int, limit: int = 100) -> tuple[Entry, ...]:
        """State changes not yet acknowledged, with a higher number than `after`, oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM outbox WHERE sequence > ? ORDER BY sequence LIMIT ?", (after, limit)
            ).fetchall()
        return tuple(Entry(row[0], row[1], State(row[2]), *row[3:]) for row in rows)

    def acknowledge(self, sequence: int) -> None:
        """Forget state changes up to a number."""
        with self._transaction():
            self._db.execute("DELETE FROM outbox WHERE sequence <= ?", (sequence,))

    def _change(self, import_id: str, progress: Progress) -> None:
        now = self._now_ns()
        self._db.execute(
            "UPDATE import SET state=?, reason=?, message=?, model_version=?, model_digest=?, changed_ns=?"
            " WHERE import_id=?",
            (
                progress.state,
                progress.reason,
                progress.message,
                progress.model_version,
                progress.model_digest,
                now,
                import_id,
            ),
        )
        self._append(import_id, progress, now)

    def _append(self, import_id: str, progress: Progress, now: int) -> None:
        self._db.execute(
            "INSERT INTO outbox(import_id,state,reason,model_version,model_digest,utc_ns) VALUES(?,?,?,?,?,?)",
            (import_id, progress.state, progress.reason, progress.model_version, progress.model_digest, now),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
