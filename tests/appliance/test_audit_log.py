"""The log as its callers meet it: durable before acknowledged, in order, one writer, readable, honest at start."""

import asyncio
import json
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.control.audit import AuditLog, AuditRecordError, AuditTamperedError, Record, SystemClock
from appliance.control.audit.record import leaf_hash
from appliance.control.audit.store import TABLES
from appliance.errors import CloisterError
from tests.appliance.audit_logs import Home, ManualClock, fill, numbered


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def log(home: Home) -> Iterator[AuditLog]:
    log = home.create()
    yield log
    log.close()


async def test_receipt_names_the_stored_record_and_its_leaf(log: AuditLog) -> None:
    receipt = await log.record(numbered(1))
    (stored,) = log.read(0, 10)
    assert (
        (receipt.sequence, receipt.leaf_hash) == (stored.sequence, stored.leaf_hash) == (1, leaf_hash(stored.body))
    )
    assert (stored.kind, stored.phase, stored.tenant) == ("inference.generate", "intent", "acme")
    assert (stored.actor, stored.decision, stored.request_id) == ("app-1", "allow", "r-1")
    assert stored.facts == numbered(1).facts


async def test_body_is_canonical_json(log: AuditLog) -> None:
    await log.record(numbered(1))
    body = log.read(0, 1)[0].body
    fields = json.loads(body)
    assert json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() == body
    assert len(bytes.fromhex(fields["nonce"])) == 16


def test_nonces_differ_between_equal_records(log: AuditLog) -> None:
    for _ in range(50):
        log.append(numbered(1)).result()
    assert len({json.loads(record.body)["nonce"] for record in log.read(0, 100)}) == 50


def test_acknowledged_record_is_in_the_file_and_under_the_head(home: Home, log: AuditLog, tmp_path: Path) -> None:
    for number in range(1, 8):
        receipt = log.append(numbered(number)).result()
        copy = Home(tmp_path / f"copy-{number}")
        shutil.copytree(tmp_path, copy.path, ignore=shutil.ignore_patterns("copy-*"))
        verdict = copy.verify()
        assert (verdict.intact, verdict.size, verdict.root) == (True, receipt.sequence, log.root)


def test_records_of_one_caller_keep_their_order_and_many_callers_share_commits(home: Home, log: AuditLog) -> None:
    def call(name: str) -> None:
        futures = [log.append(Record("test.order", "event", name, "done", facts={"n": n})) for n in range(200)]
        assert [f.result().sequence for f in futures] == sorted(f.result().sequence for f in futures)

    callers = [threading.Thread(target=call, args=(f"caller-{i}",)) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    seen: dict[str, list[object]] = {}
    for record in log.read(0, 2000):
        seen.setdefault(record.actor, []).append(record.facts["n"])
    assert seen == {f"caller-{i}": list(range(200)) for i in range(8)}
    connection = sqlite3.connect(f"file:{home.db}?mode=ro", uri=True)
    assert connection.execute("SELECT count(*) FROM checkpoint").fetchone()[0] < 1600
    connection.close()
    assert home.verify().intact


def test_log_is_verified_while_it_is_written(home: Home, log: AuditLog) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            log.append(numbered(1)).result()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        verdicts = [home.verify() for _ in range(20)]
    finally:
        stop.set()
        writer.join()
    assert all(verdict.intact for verdict in verdicts), verdicts


def test_intents_stay_open_until_their_outcome(home: Home, log: AuditLog) -> None:
    for number in (1, 2, 3, 5):  # r-1 has both halves, r-2 and r-3 only intents
        log.append(numbered(number)).result()
    assert [record.request_id for record in log.open_intents()] == ["r-2", "r-3"]
    assert [record.request_id for record in log.open_intents(after=3)] == ["r-3"]
    assert home.verify().open_intents == 2


def test_lookup_by_kind_and_request(log: AuditLog) -> None:
    log.append(numbered(1)).result()
    assert log.has("inference.generate", "r-1")
    assert not log.has("inference.generate", "r-2")
    assert not log.has("inference.chat", "r-1")


@pytest.mark.parametrize(
    "record",
    [
        Record("Upper", "event", "a", "b"),
        Record("kind", "later", "a", "b"),  # type: ignore[arg-type]  # what the test is about
        Record("kind", "intent", "a", "b"),
        Record("kind", "event", "", "b"),
        Record("kind", "event", "a", "b", tenant="x" * 2000),
        Record("kind", "event", "a", "\ud800"),
        Record("kind", "event", "a", "b", facts={"price": 1.5}),  # type: ignore[dict-item]  # likewise
        Record("kind", "event", "a", "b", facts={"n": 2**63}),
        Record("kind", "event", "a", "b", facts={"é": 1}),
        Record("kind", "event", "a", "b", facts={"deep": [[[[[[[[[1]]]]]]]]]}),
        Record("kind", "event", "a", "b", facts={"long": "x" * 70_000}),
        Record("kind", "event", "a", "b", facts={"raw": b"x"}),  # type: ignore[dict-item]  # likewise
    ],
)
def test_record_that_cannot_be_written_is_refused_at_once(log: AuditLog, record: Record) -> None:
    with pytest.raises(AuditRecordError):
        log.append(record)
    assert log.size == 0


def test_refusal_of_a_fact_does_not_repeat_its_value(log: AuditLog) -> None:
    with pytest.raises(AuditRecordError) as refused:
        log.append(Record("kind", "event", "a", "b", facts={"secret": {"x": object(), "y": "CANARY"}}))  # type: ignore[dict-item]  # likewise
    assert "CANARY" not in str(refused.value)


def test_second_writer_is_refused_while_the_first_lives(home: Home) -> None:
    first = home.create()
    with pytest.raises(CloisterError) as refused:
        home.open()
    assert refused.value.code == "AUDIT_IN_USE"
    first.close()
    home.open().close()


def test_new_log_never_replaces_one(home: Home, log: AuditLog) -> None:
    with pytest.raises(CloisterError) as refused:
        AuditLog.create(home.db, home.head, home.key, "cloister/test/audit")
    assert refused.value.code == "AUDIT_EXISTS"


def test_log_continues_where_it_was_closed(home: Home) -> None:
    first = home.create()
    first.append(numbered(1)).result()
    root = first.root
    first.close()
    again = home.open()
    assert (again.size, again.root) == (1, root)
    assert again.append(numbered(2)).result().sequence == 2
    again.close()
    assert not home.db.with_name("audit.db-wal").exists()
    assert home.verify().intact


@pytest.mark.parametrize("harm", [Path.unlink, lambda head: head.rename(head.with_suffix(".old"))])
def test_head_that_somebody_took_away_is_written_again(home: Home, harm: Callable[[Path], object]) -> None:
    log = home.create()
    for number in range(1, 12):
        log.append(numbered(number)).result()
    harm(home.head)
    log._writer._ledger._head._synced_ns = 0  # a second has passed
    log.append(numbered(12)).result()
    log.append(numbered(13)).result()
    assert home.verify().intact
    log.close()


def test_closed_log_refuses_and_what_was_handed_over_is_written(home: Home) -> None:
    log = home.create()
    futures = [log.append(numbered(n)) for n in range(1, 100)]
    log.close()
    assert [f.result().sequence for f in futures] == list(range(1, 100))
    with pytest.raises(CloisterError, match="AUDIT_BLOCKED"):
        log.append(numbered(1)).result()


def test_database_that_a_crash_left_ahead_of_its_head_is_taken_up_and_recorded(home: Home) -> None:
    log = home.create()
    fill(log, [1, 4])
    old = home.head.read_text()
    fill(log, [2, 9])
    log.close()
    home.head.write_text(old)
    assert home.verify().intact  # its own checkpoint signs the rest
    again = home.open()
    resumed = again.read(16, 10)[0]
    assert (resumed.kind, resumed.phase) == ("audit.resumed", "event")
    assert resumed.facts == {"cause": "HEAD_BEHIND", "head_size": 5, "size": 16}
    again.close()
    verdict = home.verify()
    assert (verdict.intact, verdict.size) == (True, 17)


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM checkpoint WHERE size=16",
        "UPDATE checkpoint SET note=(SELECT note FROM checkpoint WHERE size=7) WHERE size=16",
        "UPDATE rec SET actor='app-9' WHERE seq=11",
        "DELETE FROM rec WHERE seq=11",
    ],
)
def test_records_after_the_head_that_the_log_did_not_sign_are_refused(home: Home, change: str) -> None:
    log = home.create()
    fill(log, [1, 4])
    old = home.head.read_text()
    fill(log, [2, 9])
    log.close()
    home.head.write_text(old)
    home.change(change)
    with pytest.raises(AuditTamperedError):
        home.open()
    assert not home.verify().intact


def test_changed_last_record_is_noticed_at_start(home: Home) -> None:
    log = home.create()
    fill(log, [3])
    log.close()
    home.change("UPDATE rec SET decision='deny' WHERE seq=3")
    with pytest.raises(AuditTamperedError, match="record 3"):
        home.open()


def test_clock_set_back_keeps_the_order_and_is_recorded(home: Home) -> None:
    clock = ManualClock()
    log = home.create(clock=clock)
    log.append(numbered(1)).result()
    clock.utc_ns -= 365 * 86_400 * 10**9
    log.append(numbered(2)).result()
    log.append(numbered(3)).result()
    log.close()
    kinds = [(record.sequence, record.kind) for record in log.read(0, 10)]
    assert kinds == [
        (1, "inference.generate"),
        (2, "clock.regression"),
        (3, "inference.generate"),
        (4, "inference.generate"),
    ]
    assert log.read(1, 1)[0].facts == {"behind_ns": 365 * 86_400 * 10**9}
    assert home.verify().intact


def test_machine_clock_knows_boot_and_state() -> None:
    first, second = SystemClock().read(), SystemClock().read()
    assert first.boot == second.boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert first.clock in {"synchronised", "unsynchronised", "unknown"}
    assert second.mono_ns >= first.mono_ns


async def test_caller_that_is_cancelled_does_not_take_its_record_back(log: AuditLog) -> None:
    task = asyncio.create_task(log.record(numbered(1)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log.append(numbered(2)).result().sequence == 2


def test_tables_are_as_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    for statement in TABLES:
        assert f"{statement};" in text
