"""Queries of the audit log: newest first, filtered, page by page, at a bounded cost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.control.audit import AuditLog, Record, store
from appliance.control.audit.query import Filter, Page, query
from appliance.control.audit.store import connect_reader
from tests.appliance.audit_logs import Home, ManualClock

T0 = ManualClock().utc_ns


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Thirty records, one a second: three tenants in turn, each fifth denied."""
    made = Home(tmp_path_factory.mktemp("log"))
    clock = ManualClock()
    log = made.create(clock=clock)
    for i in range(1, 31):
        record = Record(
            kind="inference.request" if i % 2 else "operator.change",
            phase="event",
            actor=f"spiffe://test/Tenant-{i % 3}",
            decision="allow" if i % 5 else "deny",
            request_id=f"r{i // 2}",
            tenant=f"t{i % 3}",
        )
        log.append(record).result(10)
        clock.wait(1)
    yield made
    log.close()


def ask(home: Home, before: int = 0, limit: int = 200, scan: int = 1000, **fields: Any) -> Page:
    return query(home.db, Filter(**fields), before, limit, scan)


def numbers(page: Page) -> list[int]:
    return [record.sequence for record in page.records]


def test_pages_are_newest_first_and_join_without_gap_or_overlap(home: Home) -> None:
    seen: list[int] = []
    before, pages = 0, 0
    while pages == 0 or before:
        page = ask(home, before, limit=7)
        seen += numbers(page)
        before, pages = page.next_before, pages + 1
    assert seen == list(range(30, 0, -1))
    assert pages == 5


@pytest.mark.parametrize(
    ("fields", "matches"),
    [
        ({"kind_prefix": "operator."}, lambda i: i % 2 == 0),
        ({"kind_prefix": "perator."}, lambda i: False),
        ({"kind_prefix": "%"}, lambda i: False),
        ({"tenant": "t1"}, lambda i: i % 3 == 1),
        ({"actor": "tenant-2"}, lambda i: i % 3 == 2),
        ({"actor": "TENANT"}, lambda i: True),
        ({"decision": "deny"}, lambda i: i % 5 == 0),
        ({"request_id": "r7"}, lambda i: i // 2 == 7),
        ({"request_id": "r7", "tenant": "t0"}, lambda i: i == 15),
        ({"since_ns": T0 + 10 * 10**9}, lambda i: i > 10),
        ({"until_ns": T0 + 10 * 10**9}, lambda i: i <= 10),
        ({"tenant": "t0", "decision": "deny", "since_ns": T0 + 20 * 10**9}, lambda i: i == 30),
        ({"tenant": "nobody"}, lambda i: False),
    ],
    ids=str,
)
def test_each_filter_takes_what_it_says(home: Home, fields: dict[str, Any], matches: Any) -> None:
    wanted = [i for i in range(30, 0, -1) if matches(i)]
    page = ask(home, **fields)
    assert (numbers(page), page.next_before) == (wanted, 0)
    # The same, from small pages and small scans put together.
    seen: list[int] = []
    before = 0
    for _ in range(40):
        page = ask(home, before, limit=2, scan=4, **fields)
        seen += numbers(page)
        before = page.next_before
        if not before:
            break
    assert (seen, before) == (wanted, 0)


def test_a_call_looks_at_a_bounded_part_of_the_log_and_says_where_to_go_on(home: Home) -> None:
    page = ask(home, scan=10, decision="nothing of the kind")
    assert (numbers(page), page.next_before) == ([], 21)
    page = ask(home, before=21, scan=10, request_id="r1")
    assert (numbers(page), page.next_before) == ([3, 2], 0)  # its index leaves out all the others


@pytest.mark.parametrize(
    ("condition", "index"),
    [("AND tenant='t1'", "rec_tenant"), ("AND req_id=x'72'", "rec_request"), ("", "PRIMARY KEY")],
)
def test_what_bounds_a_call_is_an_index(home: Home, condition: str, index: str) -> None:
    statement = f"EXPLAIN QUERY PLAN SELECT seq FROM rec WHERE seq<99 {condition} ORDER BY seq DESC LIMIT 5"
    plan = str(connect_reader(home.db).execute(statement).fetchall())
    assert index in plan
    assert "SCAN" not in plan


def test_a_page_that_is_soon_full_reads_no_more_than_it_shows(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def counted(path: Path) -> Any:
        connection = connect_reader(path)
        connection.set_progress_handler(lambda: steps.append(1), 1)
        return connection

    monkeypatch.setattr(store, "connect_reader", counted)
    costs = []
    for scan in (3, 30):
        steps.clear()
        assert numbers(ask(home, limit=2, scan=scan)) == [30, 29]
        costs.append(len(steps))
    assert costs[0] == costs[1]


def test_an_empty_log_has_an_empty_page(tmp_path: Path) -> None:
    empty = Home(tmp_path)
    log: AuditLog = empty.create()
    assert log.query(Filter(), 0, 10) == Page([], 0)
    log.close()
