"""The tables of audit.db, and the one connection that writes them.

One connection writes and checkpoints; all others are read-only with automatic checkpoints off. That is a rule, not
a taste: SQLite 3.7.0 to 3.51.2 can corrupt a WAL database that two connections write or checkpoint at once, and
the SQLite of most distributions is older than the fix.

Source: sqlite.org, "Write-Ahead Logging" and release notes of 3.51.3; STRICT tables.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from appliance.control.audit.record import StoredRecord
from appliance.control.audit.tree import Edge, Node, edge_nodes

APPLICATION_ID = 0x434C4F49
SCHEMA_VERSION = 1
BLOCK = 2048
_FOLD_PAGES = 4096  # of the write-ahead log, before it is copied into the database

TABLES = (
    """CREATE TABLE rec(seq INTEGER PRIMARY KEY, utc_ns INT NOT NULL, mono_ns INT NOT NULL,
 boot TEXT NOT NULL, clock TEXT NOT NULL, req_id BLOB NOT NULL, kind TEXT NOT NULL,
 phase TEXT NOT NULL CHECK(phase IN('intent','outcome','event')), tenant TEXT,
 actor TEXT NOT NULL, decision TEXT NOT NULL,
 body BLOB, leaf BLOB NOT NULL, chain BLOB NOT NULL) STRICT""",
    "CREATE TABLE node(level INT, idx INT, hash BLOB, PRIMARY KEY(level,idx)) STRICT, WITHOUT ROWID",
    "CREATE TABLE checkpoint(size INTEGER PRIMARY KEY, note TEXT NOT NULL) STRICT",
    "CREATE INDEX rec_tenant ON rec(tenant,seq)",
    "CREATE INDEX rec_actor ON rec(actor,seq)",
    "CREATE INDEX rec_request ON rec(req_id,phase)",
)
COLUMNS = "seq,utc_ns,mono_ns,boot,clock,req_id,kind,phase,tenant,actor,decision,body,leaf,chain"

Row = tuple[int, int, int, str, str, bytes, str, str, str, str, str, bytes, bytes, bytes]


def row_of(record: StoredRecord) -> Row:
    """The columns of `rec`, in order; the request id is its UTF-8 bytes."""
    return (
        record.sequence,
        record.utc_ns,
        record.mono_ns,
        record.boot,
        record.clock,
        record.request_id.encode(),
        record.kind,
        record.phase,
        record.tenant,
        record.actor,
        record.decision,
        record.body,
        record.leaf_hash,
        record.chain_hash,
    )


def record_of(row: Row) -> StoredRecord:
    """The record in a row of `rec`."""
    return StoredRecord(
        *row[:5], row[5].decode(), row[6], row[7], row[8], row[9], row[10], row[11], row[12], row[13]
    )


class Store:
    """The writing connection. Every error of SQLite passes through: the caller closes and opens anew.

    Args:
        path: the database file.
        factory: the connection class, for tests that make commits fail.
    """

    def __init__(self, path: Path, factory: type[sqlite3.Connection] = sqlite3.Connection) -> None:
        self._connection = sqlite3.connect(
            f"file:{_quoted(path)}?mode=rw",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=5,
            factory=factory,
        )
        try:
            self._configure()
        except BaseException:
            self._connection.close()
            raise

    @staticmethod
    def create(path: Path) -> None:
        """Make an empty database.

        Raises:
            FileExistsError: something is there already.
        """
        path.touch(mode=0o600, exist_ok=False)
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            for statement in TABLES:
                connection.execute(statement)
            connection.execute("COMMIT")
        finally:
            connection.close()

    def commit(self, records: Sequence[StoredRecord], nodes: Sequence[Node], size: int, note: str) -> None:
        """Write records, the nodes they complete and the checkpoint over them in one durable transaction."""
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        self._connection.executemany(
            f"INSERT INTO rec({COLUMNS}) VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            map(row_of, records),
        )
        self._connection.executemany("INSERT INTO node(level,idx,hash) VALUES(?,?,?)", nodes)
        run("INSERT INTO checkpoint(size,note) VALUES(?,?)", (size, note))
        run("COMMIT")

    def size(self) -> int:
        """Records in the log; the highest sequence number."""
        return last_sequence(self._connection)

    def schema_differences(self) -> list[str]:
        """Names of tables, indexes and marks of the file that are not as this version makes them."""
        return schema_differences(self._connection)

    def edge(self, size: int) -> Edge | None:
        """The tree's right edge when it had `size` leaves, or None when a node of it is missing."""
        hashes = []
        for name in edge_nodes(size):
            found = self._connection.execute("SELECT hash FROM node WHERE level=? AND idx=?", name).fetchone()
            if found is None:
                return None
            hashes.append(found[0])
        return Edge(size, hashes)

    def last_row(self) -> Row | None:
        """The newest row."""
        rows = read_rows(self._connection, self.size() - 1, 1)
        return rows[0] if rows else None

    def rows(self, after: int, until: int) -> Iterator[list[Row]]:
        """Rows after a sequence number up to another, in blocks."""
        return iterate(self._connection, after, until)

    def note(self, size: int) -> bytes | None:
        """The checkpoint stored for this size."""
        return read_note(self._connection, size)

    def stray_checkpoint(self) -> int | None:
        """The size of a checkpoint that no log of this length can have."""
        return stray_checkpoint(self._connection)

    def notes(self, after: int, until: int) -> Iterator[tuple[int, bytes]]:
        """The checkpoints after a size up to another."""
        return iterate_notes(self._connection, after, until)

    def fold(self) -> None:
        """Copy the WAL into the database and empty it, so that no frame of a failed fsync stays in use.

        After a failed fsync the kernel may hold pages that it takes for written; frames appended behind them would
        be lost with them. Copying writes all of them anew.

        Raises:
            sqlite3.OperationalError: a reader still uses the WAL, or the disk still fails.
        """
        busy = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if busy:
            raise sqlite3.OperationalError("a reader holds the write-ahead log")

    def close(self) -> None:
        """Close the connection; an open transaction is rolled back."""
        self._connection.close()

    def _configure(self) -> None:
        run = self._connection.execute
        run("PRAGMA trusted_schema=OFF")
        run("PRAGMA cell_size_check=ON")
        run("PRAGMA mmap_size=0")
        run("PRAGMA synchronous=FULL")
        run(f"PRAGMA wal_autocheckpoint={_FOLD_PAGES}")
        mode = run("PRAGMA journal_mode").fetchone()[0]
        if mode != "wal":
            raise sqlite3.DatabaseError(f"journal mode is {mode}, not wal")


def connect_reader(path: Path) -> sqlite3.Connection:
    """A read-only connection; it never writes, never checkpoints, and holds no lock between statements.

    A copy on a read-only medium, where SQLite cannot make its `-shm` file, is read as the immutable file it is.

    Raises:
        sqlite3.Error: the database cannot be read.
    """
    try:
        return _reader(path, "mode=ro")
    except sqlite3.OperationalError:
        wal = path.with_name(f"{path.name}-wal")
        if not path.exists() or os.access(path.parent, os.W_OK) or (wal.exists() and wal.stat().st_size):
            raise
        return _reader(path, "mode=ro&immutable=1")


def _reader(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"file:{_quoted(path)}?{mode}", uri=True, isolation_level=None, check_same_thread=False, timeout=5
    )
    try:
        for pragma in ("query_only=ON", "trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def schema_differences(connection: sqlite3.Connection) -> list[str]:
    """Names of tables, indexes, views, triggers and marks of the file that are not as this version makes them."""
    found = dict(
        connection.execute("SELECT name,sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite~_%' ESCAPE '~'")
    )
    wanted = {statement.split()[2].partition("(")[0]: statement for statement in TABLES}
    differences = [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
    for mark, value in (("application_id", APPLICATION_ID), ("user_version", SCHEMA_VERSION)):
        if connection.execute(f"PRAGMA {mark}").fetchone()[0] != value:
            differences.append(mark)
    return sorted(differences)


def last_sequence(connection: sqlite3.Connection) -> int:
    """The highest sequence number, 0 in an empty log."""
    highest: int | None = connection.execute("SELECT max(seq) FROM rec").fetchone()[0]
    return highest or 0


def extent(connection: sqlite3.Connection) -> tuple[int, int, int]:
    """Lowest and highest sequence number and the number of stored nodes, at one moment; 0 where there is none."""
    query = "SELECT ifnull(min(seq),0), (SELECT ifnull(max(seq),0) FROM rec), (SELECT count(*) FROM node) FROM rec"
    lowest, highest, nodes = connection.execute(query).fetchone()
    return lowest, highest, nodes


def stray_checkpoint(connection: sqlite3.Connection) -> int | None:
    """The size of a checkpoint that no log of this length can have."""
    highest = "(SELECT ifnull(max(seq),0) FROM rec)"
    query = f"SELECT size FROM checkpoint WHERE size<1 OR size>{highest} LIMIT 1"  # noqa: S608  # constant
    found = connection.execute(query).fetchone()
    return None if found is None else found[0]


def read_rows(connection: sqlite3.Connection, after: int, limit: int) -> list[Row]:
    """Up to `limit` rows after a sequence number, in order."""
    return connection.execute(
        f"SELECT {COLUMNS} FROM rec WHERE seq>? ORDER BY seq LIMIT ?",  # noqa: S608  # constant
        (after, limit),
    ).fetchall()


def read_note(connection: sqlite3.Connection, size: int) -> bytes | None:
    """The checkpoint stored for this size."""
    found = connection.execute("SELECT CAST(note AS BLOB) FROM checkpoint WHERE size=?", (size,)).fetchone()
    return None if found is None else found[0]


def iterate_notes(connection: sqlite3.Connection, after: int, until: int) -> Iterator[tuple[int, bytes]]:
    """Checkpoints (size, note) after a size up to another, one short read transaction for a block of them."""
    query = "SELECT size,CAST(note AS BLOB) FROM checkpoint WHERE size>? AND size<=? ORDER BY size LIMIT ?"
    while after < until:
        found = connection.execute(query, (after, until, BLOCK)).fetchall()
        if not found:
            return
        yield from found
        after = found[-1][0]


def iterate(connection: sqlite3.Connection, after: int, until: int, block: int = BLOCK) -> Iterator[list[Row]]:
    """Rows after `after` up to `until` in blocks, one short read transaction each."""
    while after < until:
        rows = connection.execute(
            f"SELECT {COLUMNS} FROM rec WHERE seq>? AND seq<=? ORDER BY seq LIMIT ?",  # noqa: S608  # constant
            (after, until, block),
        ).fetchall()
        if not rows:
            return
        yield rows
        after = rows[-1][0]


def records(rows: Iterable[Row]) -> list[StoredRecord]:
    """The records in rows of `rec`."""
    return [record_of(row) for row in rows]


def _quoted(path: Path) -> str:
    return str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
