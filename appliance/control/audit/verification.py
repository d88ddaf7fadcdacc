"""Judge an audit log from its files alone: is it what was signed, and if not, which record is the first bad one?

One pass checks every row by itself and computes the tree; the signed head then vouches for all of it. Only when
that fails does `evidence` look for the first bad record. Memory is bounded by a block of rows, and no read
transaction outlives a block, so a log may be verified while it is written.

Source: RFC 9162; docs/audit.md.
"""

import sqlite3
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from appliance.control.audit import evidence, store
from appliance.control.audit.continuity import BadCheckpoint, follow, refuse_stray, stale
from appliance.control.audit.head import read_head
from appliance.control.audit.note import FIRST, Checkpoint, NoteError
from appliance.control.audit.tree import EMPTY_ROOT, node_hash
from appliance.control.audit.walk import BadRow, Walk

_STALE_READS = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verification found.

    Attributes:
        intact: the log is what was signed.
        size: records in the database.
        root: RFC 9162 root over the records verified; empty when there are none to speak of.
        first_bad_sequence: the first record that is bad, missing or not the log's; 0 when intact or not known.
        reason: stable code, empty when intact: RECORD_CHANGED, RECORD_MISSING, RECORD_INSERTED, ORDER_CHANGED,
            TRUNCATED, TREE_CHANGED, CHECKPOINT_CHANGED, SCHEMA_CHANGED, HEAD_STALE, HEAD_INVALID, HEAD_MISSING,
            UNREADABLE.
        message: what was found.
        open_intents: intents without an outcome among the records verified.
    """

    intact: bool
    size: int = 0
    root: bytes = b""
    first_bad_sequence: int = 0
    reason: str = ""
    message: str = ""
    open_intents: int = 0


class _Bad(Exception):  # noqa: N818  # a finding, not a failure
    def __init__(self, reason: str, sequence: int, message: str) -> None:
        super().__init__(message)
        self.reason, self.sequence = reason, sequence


def verify(db: Path, head: Path, public_key: bytes) -> Verdict:
    """Verify a whole log against its head. Writes nothing; needs no process; works beside a writing one.

    Args:
        db: the database, with its `-wal` file if there is one.
        head: the signed head.
        public_key: Ed25519, 32 bytes.
    """
    for _ in range(_STALE_READS - 1):
        verdict = _verify(db, head, public_key)
        if verdict.reason != "HEAD_STALE":
            return verdict
    return _verify(db, head, public_key)


def _verify(db: Path, head: Path, public_key: bytes) -> Verdict:
    """Verify once. Between head and database a held-up process may see a running log write for seconds."""
    try:
        signed = read_head(head, public_key)  # before the database: the head is never ahead of it
    except FileNotFoundError:
        return Verdict(False, reason="HEAD_MISSING", message=f"{head} is not there")
    except (NoteError, OSError) as error:
        return Verdict(False, reason="HEAD_INVALID", message=f"{head}: {error}")
    try:
        with closing(store.connect_reader(db)) as connection:
            return _Verification(connection, signed, public_key).verdict()
    except (sqlite3.Error, OSError) as error:
        return Verdict(False, reason="UNREADABLE", message=f"{db}: {error}")


class _Verification:
    """One run over one database."""

    def __init__(self, connection: sqlite3.Connection, head: Checkpoint, public_key: bytes) -> None:
        self._connection = connection
        self._head = head
        self._key = public_key
        self._walk = Walk()
        self._tree = _Tree(connection)
        self._size = 0

    def verdict(self) -> Verdict:
        """The verdict; findings become part of it."""
        try:
            self._check()
        except _Bad as bad:
            return replace(
                self._found(False), first_bad_sequence=bad.sequence, reason=bad.reason, message=str(bad)
            )
        except sqlite3.Error as error:
            at = self._walk.sequence + 1
            message = f"record {at} or what leads to it cannot be read: {error}"
            return replace(self._found(False), first_bad_sequence=at, reason="UNREADABLE", message=message)
        return self._found(True)

    def _found(self, intact: bool) -> Verdict:
        return Verdict(intact, self._size, self._tree.root(), open_intents=len(self._walk.open_intents))

    def _check(self) -> None:
        changed = store.schema_differences(self._connection)
        if changed:
            raise _Bad("SCHEMA_CHANGED", 0, f"not as this version makes them: {', '.join(changed)}")
        lowest, self._size, nodes = store.extent(self._connection)
        if lowest < 1 and self._size:
            raise _Bad("RECORD_INSERTED", 1, f"a record numbered {lowest} stands before the first")
        self._check_rows(min(self._head.size, self._size))
        self._check_signed()
        self._check_continuation()
        self._tree.check_count(nodes)
        self._check_checkpoints()

    def _check_rows(self, until: int) -> None:
        """Walk up to a sequence number; what does not hold is located and raised."""
        try:
            for rows in store.iterate(self._connection, self._walk.sequence, until):
                self._tree.extend(self._walk.block(rows))
            if self._walk.sequence < until:
                raise BadRow(self._walk.sequence + 1, None, "it is not there")
        except BadRow as bad:
            if bad.row and bad.row[0] > bad.sequence > self._head.size:
                message = f"record {bad.row[0]}: the log ends before it"
                raise _Bad("RECORD_INSERTED", bad.row[0], message) from None
            self._raise_located(bad)

    def _check_signed(self) -> None:
        """The rows make the root the head signs, as many as it signs, and the stored nodes are theirs."""
        if self._size < self._head.size:
            self._raise_located(None)
            message = f"{self._size} records, the head signs {self._head.size}"
            raise _Bad("TRUNCATED", self._size + 1, message)
        if self._tree.root() != self._head.root:
            self._raise_located(None)
            raise _Bad("RECORD_CHANGED", 1, "the records do not make the signed root")
        self._tree.raise_mismatch()

    def _check_continuation(self) -> None:
        """Rows after the head are the log's own when the checkpoint of their commit says so."""
        if self._size == self._head.size:
            return
        self._check_rows(self._size)
        self._tree.raise_mismatch()
        signed = evidence.checkpoint(self._connection, self._size, self._head.origin, self._key)
        if signed is None or signed.root != self._tree.root():
            message = f"{self._size} records, the head signs {self._head.size} and no checkpoint signs the rest"
            raise _Bad("RECORD_INSERTED", self._head.size + 1, message)
        (first,), (last,) = (store.read_rows(self._connection, n, 1) for n in (self._head.size, self._size - 1))
        too_far = stale(first, last)
        if too_far:
            raise _Bad("HEAD_STALE", first[0], too_far)

    def _check_checkpoints(self) -> None:
        """Every commit's checkpoint is as it was written, and there is no other."""
        head, size = self._head, self._size
        try:
            refuse_stray(store.stray_checkpoint(self._connection))
            until_head = store.iterate_notes(self._connection, 0, head.size)
            if follow(until_head, 0, FIRST, head.size) != head.previous:
                raise BadCheckpoint(f"checkpoint {head.size} is not the one the head signs")
            follow(store.iterate_notes(self._connection, head.size, size), head.size, head.previous, size)
        except BadCheckpoint as bad:
            raise _Bad("CHECKPOINT_CHANGED", 0, str(bad)) from None

    def _raise_located(self, bad: BadRow | None) -> None:
        """Raise what the evidence says about a log that does not hold; return when it says nothing."""
        limit = self._walk.sequence
        span = evidence.first_bad(self._connection, limit, self._head, self._key)
        if span is not None and (bad is None or span.first < bad.sequence):
            raise self._bad(span.first, span.message) from None
        if bad is not None:
            raise self._bad(bad.sequence, str(bad)) from None

    def _bad(self, sequence: int, message: str) -> _Bad:
        return _Bad(evidence.classify(self._connection, sequence, self._head), sequence, message)


class _Tree:
    """The tree over the rows seen so far, level by level, held against the stored nodes."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._single: list[bytes | None] = []  # per level, the node that still waits for its right sibling
        self._counts: list[int] = []  # per level, complete nodes so far
        self._mismatch: tuple[int, int] | None = None

    def extend(self, leaves: list[bytes]) -> None:
        """Add leaf hashes."""
        new, level = leaves, 0
        while new:
            if level == len(self._counts):
                self._counts.append(0)
                self._single.append(None)
            self._compare(level, new)
            self._counts[level] += len(new)
            waiting = self._single[level]
            row = new if waiting is None else [waiting, *new]
            self._single[level] = row[-1] if len(row) % 2 else None
            new = [node_hash(left, right) for left, right in zip(row[::2], row[1::2], strict=False)]
            level += 1

    def root(self) -> bytes:
        """The root over all leaves so far."""
        value: bytes | None = None
        for single in self._single:
            if single is not None:
                value = single if value is None else node_hash(single, value)
        return EMPTY_ROOT if value is None else value

    def raise_mismatch(self) -> None:
        """Raise when a stored node was not the computed one."""
        if self._mismatch is not None:
            level, position = self._mismatch
            first = (position << level) + 1
            message = f"the stored node over records {first} to {first + (1 << level) - 1} is not theirs"
            raise _Bad("TREE_CHANGED", first, message)

    def check_count(self, stored: int) -> None:
        """Raise when more nodes are stored than the tree has."""
        if stored != sum(self._counts):
            message = f"{stored} nodes are stored, the tree has {sum(self._counts)}"
            raise _Bad("TREE_CHANGED", self._counts[0] + 1 if self._counts else 1, message)

    def _compare(self, level: int, new: list[bytes]) -> None:
        start = self._counts[level]
        query = "SELECT hash FROM node WHERE level=? AND idx>=? AND idx<? ORDER BY idx"
        stored = [row[0] for row in self._connection.execute(query, (level, start, start + len(new)))]
        if stored != new and self._mismatch is None:
            same = next(
                (i for i, pair in enumerate(zip(stored, new, strict=False)) if pair[0] != pair[1]), len(stored)
            )
            self._mismatch = (level, start + same)
