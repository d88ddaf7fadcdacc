"""store.db: what was imported, is staged or damaged, and the outbox that control copies into the audit log.

A change and its outbox row are one transaction, so the log can neither miss a change nor hear of one that did not
happen.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from bundles.durable import DISK, Fs
from bundles.importer.database import Database
from bundles.importer.floors import Floors
from bundles.importer.records import Damage, Entry, Import, ModelVersion, Scrub
from bundles.pipeline import Progress, State
from bundles.trust.policy import Floor, floor_in_force
from bundles.trust.revocation import Revocations

KEPT_IMPORTS = 100
MOST_DEATHS = 3
"""Deaths of the importer while one import worked, after which that one does not go on by itself."""
_FINAL = (State.COMMITTED, State.REJECTED)


class Owner(NamedTuple):
    """A version as events name it: name@version, and the digest of its manifest."""

    reference: str
    model_digest: str


_NOBODY = Owner("", "")


class Ledger:
    """What the importer remembers; safe to call from several threads.

    Args:
        path: made when absent.
        now_ns: the clock, nanoseconds since the epoch.
        fs: how transactions end.

    Raises:
        BundleError: LEDGER_NEWER, another Cloister wrote it.
    """

    def __init__(self, path: Path, now_ns: Callable[[], int] = time.time_ns, fs: Fs = DISK) -> None:
        self._now_ns = now_ns
        self._db = Database(path, fs)
        self._changes = 0
        self._owned: tuple[int, dict[str, Owner]] = (-1, {})

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    # Imports.

    def begin(self, import_id: str, path: Path) -> None:
        """An import starts, in quarantine; of those that ended the last ones are remembered."""
        now = self._now_ns()
        with self._db.transaction():
            self._db.execute(
                "INSERT INTO import(import_id,path,state,progress,started_ns,changed_ns) VALUES(?,?,?,?,?,?)",
                (import_id, str(path), State.QUARANTINE, _encode(Progress(State.QUARANTINE)), now, now),
            )
            self._db.execute(
                "DELETE FROM import WHERE state IN (?,?) AND import_id NOT IN"
                " (SELECT import_id FROM import WHERE state IN (?,?) ORDER BY changed_ns DESC LIMIT ?)",
                (*_FINAL, *_FINAL, KEPT_IMPORTS),
            )
            self._append("import", import_id=import_id, progress=Progress(State.QUARANTINE))

    def change(self, import_id: str, progress: Progress) -> None:
        """An import is in another state."""
        with self._db.transaction():
            self._db.execute(
                "UPDATE import SET state=?, progress=?, changed_ns=? WHERE import_id=?",
                (progress.state, _encode(progress), self._now_ns(), import_id),
            )
            self._append("import", import_id=import_id, progress=progress)

    def works(self, import_id: str, working: bool) -> None:
        """An import works from now on, or waits for a person: the process's death is its doing, or is not."""
        with self._db.transaction():
            self._db.execute("UPDATE import SET working=? WHERE import_id=?", (working, import_id))

    def offered(self, import_id: str, path: Path) -> None:
        """An import took a volume from here, which is not beside its first."""
        with self._db.transaction():
            self._db.execute("UPDATE import SET offered=? WHERE import_id=?", (str(path), import_id))

    def bury(self) -> frozenset[str]:
        """Count the death of the process that was here before; ids of those imports that it died of too often."""
        with self._db.transaction():
            self._db.execute(
                "UPDATE import SET deaths=deaths+1, working=0 WHERE working AND state NOT IN (?,?)", _FINAL
            )
            rows = self._db.rows(
                "SELECT import_id FROM import WHERE deaths>=? AND state NOT IN (?,?)", (MOST_DEATHS, *_FINAL)
            )
            return frozenset(import_id for (import_id,) in rows)

    def commit(
        self,
        import_id: str,
        progress: Progress,
        version: ModelVersion,
        trust: tuple[int, int],
        revocations: Revocations | None = None,
    ) -> None:
        """An import is complete and its version exists, or neither; one that existed gets the new record.

        Args:
            import_id: the import.
            progress: its last.
            version: what it brought; what was damaged of it is whole again.
            trust: version of the trust root and sequence of the revocations now in force.
            revocations: in force; the floor that a release they revoke set gives way to this version's.
        """
        held = self.floors().models.get(version.name)
        is_void = held is not None and floor_in_force(version.name, held, revocations) is None
        with self._versions_change():
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
            self._db.execute(
                "INSERT INTO floor VALUES(?,?,?,?) ON CONFLICT(name) DO UPDATE SET sequence=excluded.sequence,"
                " model_digest=excluded.model_digest, issued_at=max(excluded.issued_at, floor.issued_at)"
                " WHERE excluded.sequence > floor.sequence OR ?",
                (version.name, version.sequence, version.model_digest, version.issued_at, is_void),
            )
            for digest in dict.fromkeys(version.digests()):
                self.repaired(digest, import_id)
            self._db.execute("DELETE FROM staged WHERE model_digest=?", (version.model_digest,))
            self.trusts(trust, import_id)
            self.change(import_id, progress)

    def unfinished(self) -> tuple[Import, ...]:
        """Imports that are neither committed nor rejected."""
        return self._imports("WHERE state NOT IN (?,?) ORDER BY started_ns", _FINAL)

    def ended(self) -> tuple[Import, ...]:
        """The last imports that ended, newest first."""
        return self._imports(
            "WHERE state IN (?,?) ORDER BY changed_ns DESC, rowid DESC LIMIT ?", (*_FINAL, KEPT_IMPORTS)
        )

    def _imports(self, which: str, values: tuple[object, ...]) -> tuple[Import, ...]:
        rows = self._db.rows(
            f"SELECT import_id, path, started_ns, changed_ns, progress, offered FROM import {which}",  # noqa: S608  # ours
            values,
        )
        return tuple(Import(row[0], row[1], row[2], row[3], _decode(row[4]), row[5]) for row in rows)

    # Versions and what the store must hold.

    def versions(self) -> tuple[ModelVersion, ...]:
        """All committed versions, oldest first."""
        rows = self._db.rows("SELECT record FROM model_version ORDER BY id")
        return tuple(ModelVersion.from_json(record) for (record,) in rows)

    def find(self, reference: str) -> ModelVersion | None:
        """The version called name@version, the newest of a name, or the one with a digest."""
        rows = self._db.rows(
            "SELECT record FROM model_version WHERE ? IN (model_digest, name, name || '@' || version)"
            " ORDER BY sequence DESC, id LIMIT 1",
            (reference,),
        )
        return ModelVersion.from_json(rows[0][0]) if rows else None

    def reference_at(self, name: str, sequence: int) -> str:
        """name@version of the model's version with this sequence; empty where there is none."""
        rows = self._db.rows("SELECT version FROM model_version WHERE (name, sequence) = (?,?)", (name, sequence))
        return f"{name}@{rows[0][0]}" if rows else ""

    def names(self) -> tuple[tuple[str, str], ...]:
        """Name and model digest of every committed version, oldest first."""
        return tuple(self._db.rows("SELECT name, model_digest FROM model_version ORDER BY id"))

    def listed(self) -> frozenset[str]:
        """SHA-256 of every file that any version has."""
        return frozenset(self._owners())

    def remove(self, version: ModelVersion) -> frozenset[str]:
        """Forget a version; the digests that nothing lists any more. Its floor stays."""
        with self._versions_change():
            self._db.execute("DELETE FROM model_version WHERE model_digest=?", (version.model_digest,))
            self._db.execute("DELETE FROM staged WHERE model_digest=?", (version.model_digest,))
            unlisted = frozenset(version.digests()) - self.listed()
            for digest in unlisted:
                self._db.execute("DELETE FROM damage WHERE sha256=?", (digest,))
            self._append("removal", named=Owner(version.reference, version.model_digest))
            return unlisted

    def floors(self) -> Floors:
        """What the releases that were ever committed set, removed ones included."""
        rows = self._db.rows("SELECT name, sequence, model_digest, issued_at FROM floor")
        clock = max((datetime.fromtimestamp(row[3], UTC) for row in rows), default=None)
        return Floors({name: Floor(sequence, digest) for name, sequence, digest, _ in rows}, clock)

    # What is staged.

    def stage(self, model_digest: str, sizes: Mapping[int, int]) -> None:
        """So many verified bytes of these files, by their place in the manifest, are durable in staging."""
        now = self._now_ns()
        with self._db.transaction():
            for position, size in sizes.items():
                self._db.execute(
                    "INSERT OR REPLACE INTO staged VALUES(?,?,?,?)", (model_digest, position, size, now)
                )

    def staged(self, model_digest: str) -> dict[int, int]:
        """Durable bytes by a file's place in the manifest."""
        return dict(self._db.rows("SELECT position, bytes FROM staged WHERE model_digest=?", (model_digest,)))

    def stagings(self) -> Mapping[str, int]:
        """By model digest, when its staging last grew, nanoseconds since the epoch."""
        return dict(self._db.rows("SELECT model_digest, max(changed_ns) FROM staged GROUP BY model_digest"))

    def unstage(self, model_digest: str, positions: Iterable[int] | None = None) -> None:
        """Nothing of these files is staged any more; of the whole model where none are named."""
        with self._db.transaction():
            if positions is None:
                self._db.execute("DELETE FROM staged WHERE model_digest=?", (model_digest,))
                return
            for position in positions:
                self._db.execute(
                    "DELETE FROM staged WHERE model_digest=? AND position=?", (model_digest, position)
                )

    # Trust.

    def trust(self) -> tuple[int, int]:
        """Version of the root and sequence of the revocations that were in force last; zeros before the first."""
        rows = self._db.rows("SELECT root_version, revocation_sequence FROM trust")
        return rows[0] if rows else (0, 0)

    def trusts(self, trust: tuple[int, int], import_id: str = "") -> None:
        """These are in force; an event where they are others than before. The first root of all is none."""
        held = self.trust()
        if trust == held:
            return
        with self._db.transaction():
            self._db.execute("INSERT OR REPLACE INTO trust VALUES(1,?,?)", trust)
            if held[0]:
                detail = f"root {trust[0]}, revocations {trust[1]}"
                self._append("trust", import_id=import_id, detail=detail)

    def commit_trust(self, import_id: str, progress: Progress, trust: tuple[int, int]) -> None:
        """A trust bundle is in force, and its import complete."""
        with self._db.transaction():
            self.trusts(trust, import_id)
            self.change(import_id, progress)

    # Damage and scrubs.

    def damaged(self) -> tuple[Damage, ...]:
        """Files that were found changed, absent or unreadable, and not mended since."""
        return tuple(Damage(*row) for row in self._db.rows("SELECT sha256, finding FROM damage ORDER BY sha256"))

    def found(self, digest: str, finding: str) -> None:
        """A file that a version lists is `finding`, or sound when that is empty; an event where that is news."""
        with self._db.transaction():
            if not finding:
                self.repaired(digest)
            elif (owner := self._owners().get(digest)) and self._finding(digest) != finding:
                self._db.execute("INSERT OR REPLACE INTO damage VALUES(?,?)", (digest, finding))
                self._append("damage", detail=f"{digest} {finding}", named=owner)

    def repaired(self, digest: str, import_id: str = "") -> None:
        """A file is what its name says; an event where it was not."""
        with self._db.transaction():
            if self._db.execute("DELETE FROM damage WHERE sha256=?", (digest,)):
                named = self._owners().get(digest, _NOBODY)
                self._append("repair", import_id=import_id, detail=digest, named=named)

    def scrub(self) -> Scrub:
        """Where the last scrub is or ended."""
        rows = self._db.rows("SELECT position, started, ended, bytes_done FROM scrub")
        return Scrub(*rows[0]) if rows else Scrub()

    def scrubbed(self, scrub: Scrub) -> None:
        """A scrub is so far."""
        with self._db.transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO scrub VALUES(1,?,?,?,?)",
                (scrub.position, scrub.started, scrub.ended, scrub.bytes_done),
            )

    def _finding(self, digest: str) -> str:
        rows = self._db.rows("SELECT finding FROM damage WHERE sha256=?", (digest,))
        return str(rows[0][0]) if rows else ""

    def _owners(self) -> Mapping[str, Owner]:
        """By digest, the oldest version that lists the file; read once, until the versions change.

        A record of 100 000 files takes a second to read, and a store that was lost asks for each of them.
        """
        changes, owned = self._owned
        if changes != self._changes:
            changes, owned = self._changes, {}
            for version in reversed(self.versions()):
                owned.update(dict.fromkeys(version.digests(), Owner(version.reference, version.model_digest)))
            self._owned = changes, owned
        return owned

    @contextmanager
    def _versions_change(self) -> Iterator[None]:
        """A transaction that changes the versions: what is known of them in it or before it holds no longer."""
        with self._db.transaction():
            self._changes += 1
            try:
                yield
            finally:
                self._changes += 1

    # The outbox.

    def outbox(self, after: int, limit: int = 100) -> tuple[Entry, ...]:
        """Events not yet acknowledged, with a higher number than `after`, oldest first."""
        rows = self._db.rows("SELECT * FROM outbox WHERE sequence > ? ORDER BY sequence LIMIT ?", (after, limit))
        return tuple(_entry(*row) for row in rows)

    def acknowledge(self, sequence: int) -> None:
        """Forget events up to a number."""
        with self._db.transaction():
            self._db.execute("DELETE FROM outbox WHERE sequence <= ?", (sequence,))

    def _append(
        self,
        event: str,
        *,
        import_id: str = "",
        progress: Progress | None = None,
        named: Owner = _NOBODY,
        detail: str = "",
    ) -> None:
        if progress is not None:
            named = Owner(progress.model_version, progress.model_digest)
        self._db.execute(
            "INSERT INTO outbox(event,import_id,state,reason,model_version,model_digest,detail,utc_ns)"
            " VALUES(?,?,?,?,?,?,?,?)",
            (
                event,
                import_id,
                progress.state if progress else "",
                progress.reason if progress else "",
                *named,
                detail,
                self._now_ns(),
            ),
        )


def _entry(sequence: int, event: str, import_id: str, state: str, *rest: Any) -> Entry:
    return Entry(sequence, event, import_id, State(state) if state else None, *rest)


def _encode(progress: Progress) -> str:
    return json.dumps(asdict(progress))


def _decode(text: str) -> Progress:
    fields = json.loads(text)
    return Progress(**fields | {"state": State(fields["state"])})
