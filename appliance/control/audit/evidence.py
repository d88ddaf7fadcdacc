"""Which record of a log that does not hold is the first bad one, and what happened to it.

Two witnesses are left beside the rows. The checkpoints, one of every commit, are signed: where the rows up to a
checkpoint make its root, all of them are genuine; where they do not, one of those since the last good checkpoint
is bad. The stored leaf hashes are not signed, and name the record exactly where whoever changed it left them be.
"""

import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

from appliance.control.audit import note, store
from appliance.control.audit.note import Checkpoint, NoteError
from appliance.control.audit.record import leaf_hash
from appliance.control.audit.store import Row
from appliance.control.audit.tree import Edge


class Span(NamedTuple):
    """Records of which at least one is bad; the first of them is named."""

    first: int
    message: str


def checkpoint(connection: sqlite3.Connection, size: int, origin: str, key: bytes) -> Checkpoint | None:
    """The checkpoint stored for this size, when its signature holds."""
    return _verified(store.read_note(connection, size), size, origin, key)


def first_bad(connection: sqlite3.Connection, until: int, head: Checkpoint, key: bytes) -> Span | None:
    """The first bad record up to `until`; None when all evidence speaks for the rows up to there.

    Args:
        connection: read-only.
        until: rows up to here hold by themselves: consecutive, and each with a body.
        head: what the head signs.
        key: Ed25519 public key of the log.
    """
    good, edge, bad = _gallop(connection, until, head, key)
    return _step(connection, _Range(good, bad or until), edge, head, key)


def classify(connection: sqlite3.Connection, sequence: int, head: Checkpoint) -> str:
    """What happened at a sequence number, the first bad one: stable code.

    Two questions decide: is what stands here a record of the log, and does the record that belongs here stand
    elsewhere? The stored leaf hashes say what belongs where; nothing belongs behind the head.
    """
    if sequence > head.size:
        return "RECORD_INSERTED"
    rightful = _stored_leaf(connection, sequence)
    here = _body_leaf(connection, sequence)
    if here == rightful and here is not None:
        return "RECORD_CHANGED"
    moved = rightful is not None and _stands_after(connection, sequence, rightful)
    if here is None:
        return "ORDER_CHANGED" if moved else "RECORD_MISSING"
    home = _home(connection, here)
    if home is None:
        return "RECORD_INSERTED" if moved else "RECORD_CHANGED"
    if not moved:
        return "RECORD_MISSING"
    doubled = home < sequence or _stands_after(connection, sequence, here)
    return "RECORD_INSERTED" if doubled else "ORDER_CHANGED"


class _Range(NamedTuple):
    good: int  # rows up to here are proven
    end: int  # look no further


def _gallop(
    connection: sqlite3.Connection, until: int, head: Checkpoint, key: bytes
) -> tuple[int, Edge, int | None]:
    """Size and edge at the last checkpoint found good, and the first found bad, looking at one in each block."""
    edge, good = Edge(), Edge()
    for rows in store.iterate(connection, 0, until):
        last = connection.execute(
            "SELECT max(size) FROM checkpoint WHERE size BETWEEN ? AND ?", (rows[0][0], rows[-1][0])
        ).fetchone()[0]
        for row in rows:
            edge.append(leaf_hash(row[11]))
            if row[0] == last:
                holds = _holds(connection, edge, head, key)
                if holds is False:
                    return good.size, good, edge.size
                good = edge.copy() if holds else good
    return good.size, good, None


def _step(connection: sqlite3.Connection, span: _Range, edge: Edge, head: Checkpoint, key: bytes) -> Span | None:
    """Go through a range record by record and checkpoint by checkpoint."""
    good, suspect = span.good, None
    for row in _rows(connection, span):
        leaf = leaf_hash(row[11])
        edge.append(leaf)
        if suspect is None and _stored_leaf(connection, row[0]) != leaf:
            suspect = row[0]
        holds = _holds(connection, edge, head, key)
        if holds:
            good, suspect = row[0], None
        elif holds is False:
            return _span(suspect, good + 1, row[0])
    return _span(suspect, suspect, suspect) if suspect else None


def _rows(connection: sqlite3.Connection, span: _Range) -> Iterator[Row]:
    for rows in store.iterate(connection, span.good, span.end):
        yield from rows


def _span(suspect: int | None, first: int, last: int) -> Span:
    if suspect is not None:
        return Span(suspect, f"record {suspect} is not the one whose leaf hash was stored")
    if first == last:
        return Span(first, f"record {first} is not the one its checkpoint signs")
    return Span(first, f"of records {first} to {last} at least one is not what their checkpoint signs")


def _holds(connection: sqlite3.Connection, edge: Edge, head: Checkpoint, key: bytes) -> bool | None:
    """Whether the signed statement about this size, if there is one, agrees with the rows."""
    signed = head if edge.size == head.size else checkpoint(connection, edge.size, head.origin, key)
    return None if signed is None else signed.root == edge.root()


def _verified(text: bytes | None, size: int, origin: str, key: bytes) -> Checkpoint | None:
    try:
        found = note.verify((text or b"").decode("utf-8", errors="replace"), key, head=False)
    except NoteError:
        return None
    return found if (found.origin, found.size) == (origin, size) else None


def _stored_leaf(connection: sqlite3.Connection, sequence: int) -> bytes | None:
    """The leaf hash the tree has for a sequence number."""
    found = connection.execute("SELECT hash FROM node WHERE level=0 AND idx=?", (sequence - 1,)).fetchone()
    return found[0] if found else None


def _body_leaf(connection: sqlite3.Connection, sequence: int) -> bytes | None:
    """The leaf hash of the body that stands at a sequence number."""
    found = connection.execute("SELECT body FROM rec WHERE seq=?", (sequence,)).fetchone()
    return leaf_hash(found[0] or b"") if found else None


def _home(connection: sqlite3.Connection, leaf: bytes) -> int | None:
    """The sequence number the tree has this leaf at."""
    found = connection.execute("SELECT idx FROM node WHERE level=0 AND hash=? ORDER BY idx", (leaf,)).fetchone()
    return found[0] + 1 if found else None


def _stands_after(connection: sqlite3.Connection, sequence: int, leaf: bytes) -> bool:
    """Whether a later row has the body with this leaf hash."""
    last = store.last_sequence(connection)
    blocks = store.iterate(connection, sequence, last)
    return any(leaf_hash(row[11] or b"") == leaf for rows in blocks for row in rows)
