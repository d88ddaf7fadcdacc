"""Database, tree edge and signed head, moved forward together by one thread.

Order of an append: records, nodes and a signed checkpoint in one transaction; then the head; then the caller is
told. So the head is never ahead of the database, what was acknowledged is covered by the head, and a database that
a crash left ahead of the head proves by its own checkpoint that the log wrote the difference. How far ahead a
crash can leave it is bounded, see `continuity`; an old head put in place of the present one serves no further.

After any error a ledger is spent: close it and `open` another, which derives everything from the disk again.
"""

import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from appliance.control.audit import note as notes
from appliance.control.audit.clock import Clock
from appliance.control.audit.continuity import BadCheckpoint, follow, refuse_stray, stale
from appliance.control.audit.errors import AuditTamperedError
from appliance.control.audit.head import HeadFile, Signer, read_head, sync_file
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

    def __init__(self, edge: Edge, chain: bytes, stamp: Stamp) -> None:
        self.edge, self.chain, self.stamp = edge.copy(), chain, stamp
        self.records: list[StoredRecord] = []
        self.nodes: list[Node] = []

    def add(self, item: Draft, nonce: bytes) -> Receipt:
        r, sequence = item.record, self.edge.size + 1
        body = encode(item, sequence, self.stamp, nonce)
        leaf = leaf_hash(body)
        self.chain = chain_hash(self.chain, leaf)
        self.nodes += self.edge.append(leaf)
        self.records.append(
            StoredRecord(
                sequence,
                *self.stamp,
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


class _Tail(NamedTuple):
    """Where the log ends: the tree's edge, the last row, the digest of the last checkpoint."""

    edge: Edge
    last: Row | None
    previous: bytes


class Ledger:
    """The log as one thread appends to it; `open` makes one.

    Attributes:
        size: records in the log.
        root: RFC 9162 root over them.
    """

    def __init__(self, place: Place, store: Store, tail: _Tail) -> None:
        self._place = place
        self._store = store
        self._head = HeadFile(place.head)
        self._edge, self._previous = tail.edge, tail.previous
        self._chain = tail.last[-1] if tail.last else NO_CHAIN
        self._utc_ns = tail.last[1] if tail.last else 0
        self.size, self.root = self._edge.size, self._edge.root()

    @staticmethod
    def create(place: Place) -> "Ledger":
        """Make an empty log and its head.

        Raises:
            FileExistsError: the database exists.
        """
        Store.create(place.db)
        head = HeadFile(place.head)
        head.write(place.signer.sign(0, Edge().root(), notes.FIRST, head=True), place.clock.read().mono_ns)
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
            ledger = Ledger(place, store, _verified_tail(place, store, head))
        except BaseException:
            store.close()
            raise
        try:
            ledger._take_up(head.size, fold)
        except BaseException:
            ledger.discard()
            raise
        return ledger

    def append(self, items: Sequence[Draft]) -> list[Receipt]:
        """Write records in one commit, all with the time it began; when this returns the head covers them.

        Raises:
            sqlite3.Error, OSError: the disk failed; whether the records got in shows when the log is opened again.
        """
        batch = _Batch(self._edge, self._chain, self._place.clock.read())
        nonces = os.urandom(16 * len(items))
        behind = self._utc_ns - batch.stamp.utc_ns
        if behind > _REGRESSION_NS:
            batch.add(_event("clock.regression", {"behind_ns": behind}), os.urandom(16))
        receipts = [batch.add(item, nonces[16 * i : 16 * i + 16]) for i, item in enumerate(items)]
        self._write(batch)
        return receipts

    def close(self) -> None:
        """Close the database and make the head durable."""
        self._store.close()
        self._head.sync(self._place.clock.read().mono_ns)
        self._head.close()

    def discard(self) -> None:
        """Close after an error, whatever state the files are in."""
        self._store.close()
        self._head.close()

    def _write(self, batch: _Batch) -> None:
        size, root, signer = batch.edge.size, batch.edge.root(), self._place.signer
        note = signer.sign(size, root, self._previous, head=False)
        previous = notes.digest(note.encode())
        self._head.settle(batch.stamp.mono_ns)
        self._store.commit(batch.records, batch.nodes, size, note)
        self._head.write(signer.sign(size, root, previous, head=True), batch.stamp.mono_ns)
        self._edge, self._chain, self._utc_ns = batch.edge, batch.chain, batch.stamp.utc_ns
        self.size, self.root, self._previous = size, root, previous

    def _take_up(self, head_size: int, fold: bool) -> None:
        """Make a head for what was found durable before anything follows; record what was out of the ordinary.

        In this order a head that cannot be written, however often it is tried, leaves the log no further ahead.
        """
        size = self.size
        if head_size == size and not fold:  # after a failed write, a sync that succeeds proves nothing
            sync_file(self._place.head)  # a killed process may have left it to the kernel
        else:
            signed = self._place.signer.sign(size, self.root, self._previous, head=True)
            self._head.write(signed, self._place.clock.read().mono_ns)
        if head_size < size or fold:
            cause = "WRITE_FAILED" if fold else "HEAD_BEHIND"
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


def _verified_tail(place: Place, store: Store, head: Checkpoint) -> _Tail:
    """The end of the log, proven by the head or by a checkpoint after it."""
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
    return _Tail(edge, store.last_row(), _last_checkpoint(store, head, size))


def _walk_from(store: Store, size: int) -> Walk:
    """A walk that begins one record before the head's last, so that the head's last is checked too."""
    before = next(store.rows(size - 2, size - 1), []) if size > 1 else []
    return Walk(before[0][0], before[0][-1]) if before else Walk()


def _check_continuation(place: Place, store: Store, found: Checkpoint, head_size: int) -> None:
    """Refuse records after the head unless the log itself signed them in the commit that wrote them."""
    try:
        note = (store.note(found.size) or b"").decode("utf-8", errors="replace")
        signed = notes.verify(note, place.signer.public_key, head=False)
    except NoteError:
        signed = None
    if signed is None or signed._replace(previous=found.previous) != found:
        raise AuditTamperedError(
            "RECORD_INSERTED",
            f"{found.size} records, the head signs {head_size} and no checkpoint signs the rest",
            head_size + 1,
        )
    (first,), (last,) = next(store.rows(head_size, head_size + 1)), next(store.rows(found.size - 1, found.size))
    too_far = stale(first, last)
    if too_far:
        raise AuditTamperedError("HEAD_STALE", too_far, first[0])


def _last_checkpoint(store: Store, head: Checkpoint, size: int) -> bytes:
    """The digest of the last checkpoint, once those since the head follow from it and none is beyond the log."""
    try:
        if head.size and notes.digest(store.note(head.size) or b"") != head.previous:
            raise BadCheckpoint(f"checkpoint {head.size} is not the one the head signs")
        refuse_stray(store.stray_checkpoint())
        return follow(store.notes(head.size, size), head.size, head.previous, size)
    except BadCheckpoint as bad:
        raise AuditTamperedError("CHECKPOINT_CHANGED", str(bad)) from None
