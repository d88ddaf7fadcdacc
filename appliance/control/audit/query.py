"""Records that match a filter, newest first, page by page; a call reads a bounded part of the log only.

One call looks at `SCAN` records at most, so a call costs the same in a log of any length; where the bound is met
first, the answer says from where to go on, and may hold few records or none. A request id is looked up in its
index and a tenant's records in theirs, so that only those count towards the bound. Times are compared record by
record: the clock of a machine may have been set back, so they need not rise with the sequence.

Reads beside the writer on a read-only connection, as everything else that reads; works while the log is blocked.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from appliance.control.audit import store
from appliance.control.audit.record import StoredRecord

SCAN = 100_000
_NEWEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Filter:
    """Which records; an empty or None field takes all.

    Attributes:
        kind_prefix: of kinds that begin so.
        tenant: of this tenant.
        actor: whose actor holds this, whatever the case (of ASCII letters).
        decision: with this decision.
        request_id: of this request or action.
        since_ns: not before, nanoseconds since the epoch.
        until_ns: before, likewise.
    """

    kind_prefix: str = ""
    tenant: str = ""
    actor: str = ""
    decision: str = ""
    request_id: str = ""
    since_ns: int | None = None
    until_ns: int | None = None


class Page(NamedTuple):
    """A page: records newest first, and the sequence number before which the next page begins; 0 for none."""

    records: list[StoredRecord]
    next_before: int


def query(db: Path, wanted: Filter, before: int, limit: int, scan: int = SCAN) -> Page:
    """The newest records before a sequence number that match.

    Args:
        db: audit.db.
        wanted: the filter.
        before: sequence number; 0 begins with the newest record.
        limit: most records to return.
        scan: most records to look at.

    Raises:
        sqlite3.Error: the database cannot be read.
    """
    with closing(store.connect_reader(db)) as connection:
        connection.execute("BEGIN")  # one state of the log for both statements
        first = before or _NEWEST
        lowest = _lowest(connection, wanted, first, scan)
        if lowest is None:
            return Page([], 0)
        conditions = ["seq>=?", "seq<?"]
        values: list[object] = [lowest, first]
        for condition, value in _conditions(wanted):
            conditions.append(condition)
            values.append(value)
        where = " AND ".join(conditions)
        statement = f"SELECT {store.COLUMNS} FROM rec WHERE {where} ORDER BY seq DESC LIMIT ?"  # noqa: S608  # ours
        records = store.records(connection.execute(statement, (*values, limit)))
        reached = records[-1].sequence if len(records) == limit else lowest
        return Page(records, reached if _has_older(connection, wanted, reached) else 0)


def _lowest(connection: sqlite3.Connection, wanted: Filter, first: int, scan: int) -> int | None:
    """The lowest sequence number to look at, `scan` records down the index in use; None for no record.

    Without an index nothing is counted, as a log has no gaps: counting would read every record on the way.
    """
    condition, values = _indexed(wanted)
    if not condition:
        return max(1, min(first, store.last_sequence(connection) + 1) - scan)
    statement = f"SELECT min(seq) FROM (SELECT seq FROM rec WHERE seq<?{condition} ORDER BY seq DESC LIMIT ?)"  # noqa: S608  # ours
    lowest: int | None = connection.execute(statement, (first, *values, scan)).fetchone()[0]
    return lowest


def _has_older(connection: sqlite3.Connection, wanted: Filter, before: int) -> bool:
    """Whether any record that may match is older."""
    condition, values = _indexed(wanted)
    statement = f"SELECT 1 FROM rec WHERE seq<?{condition} LIMIT 1"  # noqa: S608  # ours
    return connection.execute(statement, (before, *values)).fetchone() is not None


def _indexed(wanted: Filter) -> tuple[str, tuple[object, ...]]:
    """The condition that an index answers."""
    if wanted.request_id:
        return " AND req_id=?", (wanted.request_id.encode(),)
    if wanted.tenant:
        return " AND tenant=?", (wanted.tenant,)
    return "", ()


def _conditions(wanted: Filter) -> Iterator[tuple[str, object]]:
    """SQL conditions with their values, for the fields that are set; `instr` knows no wildcards."""
    fields: tuple[tuple[str, object, bool], ...] = (
        ("instr(kind,?)=1", wanted.kind_prefix, bool(wanted.kind_prefix)),
        ("tenant=?", wanted.tenant, bool(wanted.tenant)),
        ("instr(lower(actor),lower(?))>0", wanted.actor, bool(wanted.actor)),
        ("decision=?", wanted.decision, bool(wanted.decision)),
        ("req_id=?", wanted.request_id.encode(), bool(wanted.request_id)),
        ("utc_ns>=?", wanted.since_ns, wanted.since_ns is not None),
        ("utc_ns<?", wanted.until_ns, wanted.until_ns is not None),
    )
    return ((condition, value) for condition, value, is_set in fields if is_set)
