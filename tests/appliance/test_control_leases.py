"""The lease book on an audit log whose disk is slow or fails: one outcome a request, whatever the log does."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from appliance.control import records
from appliance.control.admission.leases import SILENCE_S, LeaseBook
from appliance.control.admission.reservations import Ending, Reservation, Size
from appliance.control.audit import AuditLog, make_key
from appliance.control.db.database import Database
from appliance.control.journal import Journal
from appliance.errors import CloisterError

DONE = Ending("completed", "", 3, 5)


class Disk:
    """What the next commits of the audit log meet."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.fails = ""

    def factory(self) -> type[sqlite3.Connection]:
        """A connection class that commits as this disk lets it."""
        disk = self

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
                if sql != "COMMIT":
                    return super().execute(sql, *parameters)
                disk.go_on.wait()
                fails, disk.fails = disk.fails, ""
                if fails == "before":
                    raise sqlite3.OperationalError("disk I/O error")
                done = super().execute(sql, *parameters)
                if fails == "after":
                    raise sqlite3.OperationalError("disk I/O error")
                return done

        return Connection


@dataclass
class Desk:
    """A lease book and what is under it."""

    book: LeaseBook
    log: AuditLog
    journal: Journal
    disk: Disk

    async def lease(self, name: str, gateway_id: str = "gateway-1") -> None:
        """Open a lease whose intent is durable."""
        request_id = f"11111111-1111-1111-1111-{name:>012}"
        reservation = Reservation(name, "ward", "app", "k", request_id, "notes", "d", 1, Size(3, 5))
        admitted = records.Admitted("somebody", b"", "method", "mac", {})
        intent = self.journal.begin(records.request_intent(reservation, admitted))
        self.book.open(reservation, "somebody", gateway_id, intent)
        await asyncio.wrap_future(intent)

    def outcomes(self) -> list[str]:
        """The decisions of all outcomes on record."""
        return [record.decision for record in self.log.read(0, 1000) if record.phase == "outcome"]


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    disk, key = Disk(), tmp_path / "key"
    make_key(key, "cloister/test/audit")
    log = AuditLog.create(
        tmp_path / "audit.db", tmp_path / "audit.head", key, "cloister/test/audit", factory=disk.factory()
    )
    database, journal = Database(tmp_path / "control.db"), Journal(log, 2.0)
    yield Desk(LeaseBook(database, journal), log, journal, disk)
    disk.go_on.set()
    database.close()
    log.close()


async def test_a_commit_slower_than_anybody_waits_leaves_one_outcome_of_a_request_settled_again_and_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await desk.lease("1")
    monkeypatch.setattr(desk.journal, "_wait_s", 0.01)
    desk.disk.go_on.clear()
    for _ in range(4):
        with pytest.raises(CloisterError, match="AUDIT_BLOCKED"):
            await desk.book.settle("1", DONE)
    await desk.book.sweep()
    monkeypatch.undo()
    desk.disk.go_on.set()
    receipt = await desk.book.settle("1", DONE)
    assert desk.outcomes() == ["completed"]
    assert receipt.sequence == desk.log.size
    assert desk.book.open_leases == 0


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_an_outcome_whose_commit_failed_is_on_record_once_whether_it_reached_the_disk_or_not(
    desk: Desk, moment: str
) -> None:
    await desk.lease("1")
    desk.disk.fails = moment
    with pytest.raises(CloisterError, match="AUDIT_BLOCKED"):
        await desk.book.settle("1", DONE)
    while desk.book.open_leases:
        await desk.book.sweep()
        await asyncio.sleep(0.01)
    assert desk.outcomes() == ["completed"]
    receipt = await desk.book.settle("1", DONE)
    (outcome,) = [record for record in desk.log.read(0, 1000) if record.phase == "outcome"]
    assert (receipt.sequence, receipt.leaf_hash) == (outcome.sequence, outcome.leaf_hash)


async def test_a_lease_whose_intent_is_not_on_record_is_abandoned_at_no_charge(desk: Desk) -> None:
    desk.disk.fails = "before"
    with pytest.raises(CloisterError, match="AUDIT_BLOCKED"):
        await desk.lease("1")
    while desk.log.blocked:
        await asyncio.sleep(0.01)
    await desk.book.abandon_all("CONTROL_STOPPED")
    outcome = desk.log.read(0, 1000)[-1]
    assert (outcome.facts["reason"], outcome.facts["prompt_tokens"], outcome.facts["charged"]) == (
        "NEVER_STARTED", 0, "nothing",
    )  # fmt: skip


async def test_a_sweep_and_a_heartbeat_may_find_the_same_gateway_gone(desk: Desk) -> None:
    await desk.lease("1", "gateway-1")
    await desk.lease("2", "gateway-2")
    await desk.book.heartbeat("gateway-1", "127.0.0.1:1")
    await desk.book.heartbeat("gateway-2", "127.0.0.1:2")
    now = desk.book._monotonic()
    desk.book._monotonic = lambda: now + SILENCE_S + 1
    await asyncio.gather(desk.book.sweep(), desk.book.heartbeat("gateway-3", "127.0.0.1:2"))
    assert desk.outcomes() == ["abandoned", "abandoned"]
    assert desk.book.open_leases == 0


async def test_a_gateway_heard_again_while_others_are_swept_keeps_its_leases(desk: Desk) -> None:
    await desk.lease("1", "gateway-1")
    await desk.lease("2", "gateway-2")
    now = desk.book._monotonic()
    desk.book._monotonic = lambda: now + SILENCE_S + 1
    sweeping = asyncio.create_task(desk.book.sweep())
    await asyncio.sleep(0)
    assert await desk.book.heartbeat("gateway-2", "127.0.0.1:2", ["2"]) == []
    await sweeping
    assert desk.book.open_leases == 1


async def test_a_lease_that_its_living_gateway_does_not_name_is_abandoned_and_one_that_it_names_is_not(
    desk: Desk,
) -> None:
    await desk.lease("1")
    await desk.lease("2")
    start = desk.book._monotonic()
    for seconds in range(int(SILENCE_S) + 2):
        desk.book._monotonic = lambda now=start + seconds: now
        assert await desk.book.heartbeat("gateway-1", "127.0.0.1:1", ["2"]) == []
        await desk.book.sweep()
    assert desk.book.open_leases == 1
    outcome = desk.log.read(0, 1000)[-1]
    assert (outcome.facts["lease"], outcome.facts["reason"]) == ("1", "UNCLAIMED")
    assert await desk.book.heartbeat("gateway-1", "127.0.0.1:1", ["1", "2"]) == ["1"]
