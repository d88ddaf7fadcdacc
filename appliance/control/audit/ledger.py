"""Database, tree edge and signed head, moved forward together by one thread.

Order of an append: records, nodes and a signed checkpoint in one transaction; then the head; then the caller is
told. So the head is never ahead of the database, what was acknowledged is covered by the head, and a database that
a crash left ahead of the head proves by its own checkpoint that the log wrote the difference.

After any error a ledger is spent: close it and `open` another, which derives everything from the disk again.
"""

import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.control.audit import note as notes
from appliance.control.audit.clock import Clock
from appliance.control.audit.errors import AuditTamperedError
from appliance.control.audit.head import HeadFile, Signer, read_head
from appliance.control.audit.note import Checkpoint, NoteError
from appliance.control.audit.record import (
    Draft,
    Json,
    Receipt,
    Record,
    Stamp,
    StoredRecord,
    chain_hash,
    draft,
    encode,
    leaf_hash,
)
from appliance.control.audit.store import Row, Store
from appliance.control.audit.tree import Edge, Node
from appliance.control.audit.walk import NO_CHAIN, BadRow, Walk

ACTOR = "control"
_REGRESSION_NS = 2_000_000_000


@dataclass(frozen=True)
class Place:
    """What a ledger works on.

    Attributes:
        db: the database.
        head: the signed head.
        signer: who signs.
        clock: who tells the time.
        factory: class of the writing connection.
    """

    db: Path
    head: Path
    signer: Signer
    clock: Clock
    factory: type[sqlite3.Connection] = sqlite3.Connection


class _Batch:
    """Records on their way into one transaction, and the state of the log after it."""

    def __init__(self, edge: Edge, chain: bytes, utc_ns: int) -> None:
        self.edge, self.chain, self.utc_ns = edge.copy(), chain, utc_ns
        self.records: list[StoredRecord] = []
        self.nodes: list[Node] = []

    def add(self, item: Draft, stamp: Stamp, nonce: bytes) -> Receipt:
        r, sequence = item.record, self.edge.size + 1
        body = encode(item, sequence, stamp, nonce)
        leaf = leaf_hash(body)
        self.chain, self.utc_ns = chain_hash(self.chain, leaf), stamp.utc_ns
        self.nodes += self.edge.append(leaf)
        self.records.append(
            StoredRecord(
                sequence,
                *stamp,
                r.request_id,
                r.kind,
                r.phase,
                r.tenant,
                r.actor,
                r.decision,
                body,
                leaf,
                self.chain,
            )
        )
        return Receipt(sequence, leaf)


class Ledger:
    """The log as one thread appends to it; `open` makes one.

    Attributes:
        size: records in the log.
        root: RFC 9162 root over them.
    """

    def __init__(self, place: Place, store: Store, edge: Edge, last: Row | None) -> None:
        self._place = place
        self._store = store
        self._head = HeadFile(place.head)
        self._edge = edge
        self._chain = last[-1] if last else NO_CHAIN
        self._utc_ns = last[1] if last else 0
        self.size, self.root = edge.size, edge.root()

    @staticmethod
    def create(place: Place) -> "Ledger":
        """Make an empty log and its head.

        Raises:
            FileExistsError: the database exists.
        """
        Store.create(place.db)
        head = HeadFile(place.head)
        head.write(place.signer.sign(0, Edge().root(), head=True))
        head.close()
        return Ledger.open(place)

    @staticmethod
    def open(place: Place, *, fold: bool = False) -> "Ledger":
        """Open a log: its tail must be what the head signs, or a signed continuation of that.

        Args:
            place: where it lies.
            fold: empty the write-ahead log first, as is due after a failed write.

        Raises:
            AuditTamperedError: it is not.
            sqlite3.Error, OSError: the disk fails.
        """
        head = _head(place)
        store = Store(place.db, place.factory)
        try:
            if fold:
                store.fold()
            edge, last = _verified_tail(place, store, head)
            ledger = Ledger(place, store, edge, last)
            if head.size < edge.size or fold:
                ledger._resume(head.size, edge.size, "WRITE_FAILED" if fold else "HEAD_BEHIND")
        except BaseException:
            store.close()
            raise
        return ledger

    def append(self, items: Sequence[Draft]) -> list[Receipt]:
        """Write records; when this returns they are durable and the head covers them.

        Raises:
            sqlite3.Error, OSError: the disk failed; whether the records got in shows when the log is opened again.
        """
        batch = _Batch(self._edge, self._chain, self._utc_ns)
        nonces = os.urandom(16 * len(items))
        receipts = []
        for i, item in enumerate(items):
            stamp = self._place.clock.read()
            behind = batch.utc_ns - stamp.utc_ns
            if behind > _REGRESSION_NS:
                batch.add(_event("clock.regression", {"behind_ns": behind}), stamp, os.urandom(16))
            receipts.append(batch.add(item, stamp, nonces[16 * i : 16 * i + 16]))
        self._write(batch)
        return receipts

    def close(self) -> None:
        """Close the database and make the head durable."""
        self._store.close()
        self._head.sync()
        self._head.close()

    def discard(self) -> None:
        """Close after an error, whatever state the files are in."""
        self._store.close()
        self._head.close()

    def _write(self, batch: _Batch) -> None:
        size, root, signer = batch.edge.size, batch.edge.root(), self._place.signer
        self._store.commit(batch.records, batch.nodes, size, signer.sign(size, root, head=False))
        self._head.write(signer.sign(size, root, head=True))
        self._edge, self._chain, self._utc_ns = batch.edge, batch.chain, batch.utc_ns
        self.size, self.root = size, root

    def _resume(self, head_size: int, size: int, cause: str) -> None:
        """Record that the log was found ahead of its head or is back after a failure; this also signs it anew."""
        facts: dict[str, Json] = {"cause": cause, "head_size": head_size, "size": size}
        self.append([_event("audit.resumed", facts)])


def _event(kind: str, facts: dict[str, Json]) -> Draft:
    return draft(Record(kind, "event", ACTOR, "observed", facts=facts))


def _head(place: Place) -> Checkpoint:
    try:
        head = read_head(place.head, place.signer.public_key)
    except FileNotFoundError:
        raise AuditTamperedError("HEAD_MISSING", f"{place.head} is not there") from None
    except NoteError as error:
        raise AuditTamperedError("HEAD_INVALID", f"{place.head}: {error}") from None
    if head.origin != place.signer.origin:
        raise AuditTamperedError("HEAD_INVALID", f"{place.head} is of log {head.origin}")
    return head


def _verified_tail(place: Place, store: Store, head: Checkpoint) -> tuple[Edge, Row | None]:
    """The tree's edge and the last row, both proven by the head or by a checkpoint after it."""
    changed = store.schema_differences()
    if changed:
        raise AuditTamperedError("SCHEMA_CHANGED", f"not as this version makes them: {', '.join(changed)}")
    size = store.size()
    if size < head.size:
        raise AuditTamperedError("TRUNCATED", f"{size} records, the head signs {head.size}", size + 1)
    edge = store.edge(head.size)
    if edge is None or edge.root() != head.root:
        raise AuditTamperedError("TREE_CHANGED", f"the nodes over {head.size} records do not make the signed root")
    walk = _walk_from(store, head.size)
    try:
        for rows in store.rows(walk.sequence, size):
            for leaf in walk.block(rows)[max(0, head.size - rows[0][0] + 1) :]:
                edge.append(leaf)
    except BadRow as bad:
        raise AuditTamperedError("RECORD_CHANGED", str(bad), bad.sequence) from None
    if size > head.size:
        _check_continuation(place, store, Checkpoint(head.origin, size, edge.root()), head.size)
    return edge, store.last_row()


def _walk_from(store: Store, size: int) -> Walk:
    """A walk that begins one record before the head's last, so that the head's last is checked too."""
    before = next(store.rows(size - 2, size - 1), []) if size > 1 else []
    return Walk(before[0][0], before[0][-1]) if before else Walk()


def _check_continuation(place: Place, store: Store, found: Checkpoint, head_size: int) -> None:
    """Refuse records after the head unless the log itself signed them in the commit that wrote them."""
    try:
        signed = notes.verify(store.note(found.size) or "", place.signer.public_key, head=False)
    except NoteError:
        signed = None
    if signed != found:
        raise AuditTamperedError(
            "RECORD_INSERTED",
            f"{found.size} records, the head signs {head_size} and no checkpoint signs the rest",
            head_size + 1,
        )
