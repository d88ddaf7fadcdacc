"""Whatever is changed behind the log's back, verification says so and names the first bad record."""

import base64
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.control.audit import AuditTamperedError, make_key
from appliance.control.audit.record import chain_hash, leaf_hash
from appliance.control.audit.tree import Edge
from appliance.control.audit.walk import NO_CHAIN
from tests.appliance.audit_logs import ORIGIN, Home, fill
from tests.appliance.test_audit_tree import merkle_tree_hash

SIZE = 12
Made = Callable[[list[int]], Home]
_TEMPLATES: dict[tuple[int, ...], Path] = {}
ONE_BY_ONE = [1] * SIZE
GROUPED = [3, 5, 4]
FIELDS = [
    "seq",
    "utc_ns",
    "mono_ns",
    "boot",
    "clock",
    "request_id",
    "kind",
    "phase",
    "tenant",
    "actor",
    "decision",
]
COLUMNS = {
    "seq": "100000",
    "utc_ns": "utc_ns+1",
    "mono_ns": "mono_ns+1",
    "boot": "'another'",
    "clock": "'confirmed'",
    "req_id": "x'7231'",
    "kind": "'inference.chat'",
    "phase": "'event'",
    "tenant": "NULL",
    "actor": "'app-9'",
    "decision": "'deny'",
    "body": "CAST(replace(CAST(body AS TEXT),'prompt_tokens','prompt_tokenz') AS BLOB)",
    "leaf": "zeroblob(32)",
    "chain": "zeroblob(32)",
}


@pytest.fixture
def made(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[int]], Home]:
    """A closed log written in group commits of these sizes; each kind is written once and copied."""

    def make(batches: list[int]) -> Home:
        shape = tuple(batches)
        if shape not in _TEMPLATES:
            _TEMPLATES[shape] = tmp_path_factory.mktemp("log")
            log = Home(_TEMPLATES[shape]).create()
            fill(log, batches)
            log.close()
        shutil.copytree(_TEMPLATES[shape], tmp_path, dirs_exist_ok=True)
        return Home(tmp_path)

    return make


def found(home: Home) -> tuple[str, int]:
    verdict = home.verify()
    assert not verdict.intact
    assert verdict.message
    return verdict.reason, verdict.first_bad_sequence


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """One closed log for tests that put back what they changed."""
    home = Home(tmp_path_factory.mktemp("shared"))
    log = home.create()
    fill(log, [3, 1, 5, 3])
    log.close()
    return home


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES: dict[str, st.SearchStrategy[object]] = {
    **dict.fromkeys(("utc_ns", "mono_ns"), st.integers(-(2**63), 2**63 - 1)),
    **dict.fromkeys(("boot", "clock", "kind", "actor", "decision"), TEXT),
    "phase": st.sampled_from(["intent", "outcome", "event"]),
    "tenant": st.none() | TEXT,
    "body": st.none() | st.binary(max_size=40),
    **dict.fromkeys(("req_id", "leaf", "chain"), st.binary(max_size=40)),
}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_value_in_any_cell_but_the_written_one_names_its_record(shared: Home, data: st.DataObject) -> None:
    column = data.draw(st.sampled_from(sorted(VALUES)))
    seq = data.draw(st.integers(1, SIZE))
    value = data.draw(VALUES[column])
    with closing(sqlite3.connect(shared.db, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous=OFF")
        old = connection.execute(f"SELECT {column} FROM rec WHERE seq=?", (seq,)).fetchone()[0]
        connection.execute(f"UPDATE rec SET {column}=? WHERE seq=?", (value, seq))
        try:
            verdict = shared.verify()
        finally:
            connection.execute(f"UPDATE rec SET {column}=? WHERE seq=?", (old, seq))
    expected = (True, 0, "") if value == old else (False, seq, "RECORD_CHANGED")
    assert (verdict.intact, verdict.first_bad_sequence, verdict.reason) == expected


def test_log_holds_by_the_documented_steps_alone(shared: Home) -> None:
    """A second verifier, from docs/audit.md: parsed bodies, the recursive tree, no code of the first."""
    with closing(sqlite3.connect(shared.db)) as connection:
        rows = connection.execute("SELECT * FROM rec ORDER BY seq").fetchall()
        nodes = {(level, idx): value for level, idx, value in connection.execute("SELECT * FROM node")}
        notes = connection.execute("SELECT size,note FROM checkpoint ORDER BY size").fetchall()
    chain = bytes(32)
    for number, row in enumerate(rows, 1):
        body = json.loads(row[11])
        assert number == body["seq"]
        assert [body[key] for key in FIELDS] == [*row[:5], row[5].decode(), *row[6:11]]
        leaf = hashlib.sha256(b"\0" + row[11]).digest()
        chain = hashlib.sha256(b"\2" + chain + leaf).digest()
        assert row[12:] == (leaf, chain)
    bodies = [row[11] for row in rows]
    for (level, idx), value in nodes.items():
        assert value == merkle_tree_hash(bodies[idx << level : (idx + 1) << level])
    assert len(nodes) == 2 * len(rows) - len(rows).bit_count()
    assert [size for size, _ in notes] == [3, 4, 9, 12]
    before = bytes(32)
    for size, note in [*notes, (SIZE, shared.head.read_text())]:
        root = base64.b64encode(merkle_tree_hash(bodies[:size])).decode()
        head = "cloister-audit-head\n" if "cloister-audit-head" in note else ""
        text, _, signature = note.partition("\n\n")
        assert f"{text}\n" == f"{ORIGIN}\n{size}\n{root}\n{base64.b64encode(before).decode()}\n{head}"
        before = hashlib.sha256(note.encode()).digest()
        raw = base64.b64decode(signature.split()[2])
        Ed25519PublicKey.from_public_bytes(shared.public_key).verify(raw[4:], f"{text}\n".encode())


def move(connection: sqlite3.Connection, pairs: dict[int, int]) -> None:
    """Give records other numbers, all at once."""
    connection.executemany("UPDATE rec SET seq=-? WHERE seq=?", [(old, old) for old in pairs])
    connection.executemany("UPDATE rec SET seq=? WHERE seq=-?", [(new, old) for old, new in pairs.items()])


def recompute(connection: sqlite3.Connection, *, nodes: bool) -> None:
    """Make leaf, chain and (with `nodes`) the tree fit the bodies; only the key is missing for the rest."""
    chain, edge, rows = NO_CHAIN, Edge(), []
    if nodes:
        connection.execute("DELETE FROM node")
    for seq, body in connection.execute("SELECT seq,body FROM rec ORDER BY seq").fetchall():
        leaf = leaf_hash(body)
        chain = chain_hash(chain, leaf)
        rows.append((leaf, chain, seq))
        if nodes:
            connection.executemany("INSERT INTO node VALUES(?,?,?)", edge.append(leaf))
    connection.executemany("UPDATE rec SET leaf=?,chain=? WHERE seq=?", rows)


def forge(seq: int) -> str:
    body = "CAST(replace(CAST(body AS TEXT),'temperature','temperaturf') AS BLOB)"
    return f"UPDATE rec SET body={body} WHERE seq={seq}"


@pytest.mark.parametrize("batches", [ONE_BY_ONE, GROUPED, [SIZE], []])
def test_untouched_log_is_intact(made: Made, batches: list[int]) -> None:
    home = made(batches)
    verdict = home.verify()
    assert (verdict.intact, verdict.size, verdict.reason, verdict.first_bad_sequence) == (
        True,
        sum(batches),
        "",
        0,
    )
    assert verdict.open_intents == 0


@pytest.mark.parametrize("record", [1, 2, 6, SIZE])
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("batches", [ONE_BY_ONE, [SIZE]], ids=["single", "group"])
def test_any_changed_column_names_its_record(made: Made, record: int, column: str, batches: list[int]) -> None:
    home = made(batches)
    home.change(f"UPDATE rec SET {column}={COLUMNS[column]} WHERE seq={record}")
    expected = "ORDER_CHANGED" if column == "seq" else "RECORD_CHANGED"
    assert found(home) == (expected, record)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("renumber", [False, True])
@pytest.mark.parametrize("first", [1, 5, SIZE])
def test_removed_records_are_missed(made: Made, first: int, count: int, renumber: bool) -> None:
    first = min(first, SIZE - count + 1)
    home = made(GROUPED)
    home.change(f"DELETE FROM rec WHERE seq BETWEEN {first} AND {first + count - 1}")
    if renumber:
        rest = range(first + count, SIZE + 1)
        home.change(lambda connection: move(connection, {old: old - count for old in rest}))
    tail = first + count > SIZE
    assert found(home) == ("TRUNCATED" if tail else "RECORD_MISSING", first)


@pytest.mark.parametrize("everything", [False, True], ids=["rec", "all tables"])
@pytest.mark.parametrize("left", [0, 5, 8, SIZE - 1])
def test_log_cut_off_at_the_end_is_truncated_and_not_opened(made: Made, left: int, everything: bool) -> None:
    home = made(GROUPED)
    home.change(f"DELETE FROM rec WHERE seq>{left}")
    if everything:
        home.change(f"DELETE FROM checkpoint WHERE size>{left}", lambda c: recompute(c, nodes=True))
    assert found(home) == ("TRUNCATED", left + 1)
    with pytest.raises(AuditTamperedError) as refused:
        home.open()
    assert (refused.value.code, refused.value.reason, refused.value.sequence) == (
        "AUDIT_TAMPERED",
        "TRUNCATED",
        left + 1,
    )


@pytest.mark.parametrize("pair", [(1, 2), (3, 10), (6, 7), (11, 12)])
@pytest.mark.parametrize("what", ["numbers", "bodies"])
def test_swapped_records_are_out_of_order(made: Made, pair: tuple[int, int], what: str) -> None:
    home, (a, b) = made(GROUPED), pair

    def swap(connection: sqlite3.Connection) -> None:
        if what == "numbers":
            move(connection, {a: b, b: a})
        else:
            bodies = dict(connection.execute("SELECT seq,body FROM rec"))
            connection.executemany("UPDATE rec SET body=? WHERE seq=?", [(bodies[a], b), (bodies[b], a)])

    home.change(swap)
    assert found(home) == ("ORDER_CHANGED", a)


@pytest.mark.parametrize("at", [1, 6, SIZE, SIZE + 1])
@pytest.mark.parametrize("copied", [False, True], ids=["forged", "copied"])
def test_inserted_record_is_found(made: Made, at: int, copied: bool) -> None:
    home = made(GROUPED)

    def insert(connection: sqlite3.Connection) -> None:
        move(connection, {old: old + 1 for old in range(at, SIZE + 1)})
        source = 3 if at > 3 else 5
        connection.execute(
            "INSERT INTO rec SELECT ?,utc_ns,mono_ns,boot,clock,req_id,kind,phase,tenant,actor,decision,"
            "body,leaf,chain FROM rec WHERE seq=?",
            (at, source),
        )
        if not copied:
            connection.execute(forge(at))

    home.change(insert)
    assert found(home) == ("RECORD_INSERTED", at)


@pytest.mark.parametrize("number", ["0", "-7", "4000"])
def test_record_with_a_number_outside_the_log_is_found(made: Made, number: str) -> None:
    home = made(GROUPED)
    home.change(
        f"INSERT INTO rec SELECT {number},utc_ns,mono_ns,boot,clock,req_id,kind,phase,tenant,actor,decision,"
        "body,leaf,chain FROM rec WHERE seq=3"
    )
    assert found(home) == ("RECORD_INSERTED", max(1, int(number)))


@pytest.mark.parametrize("record", [1, 2, 6, SIZE])
def test_consistent_forgery_without_the_key_is_named_by_the_checkpoints(made: Made, record: int) -> None:
    home = made(ONE_BY_ONE)
    home.change(forge(record), lambda connection: recompute(connection, nodes=True))
    assert found(home) == ("RECORD_CHANGED", record)


@pytest.mark.parametrize(("record", "first"), [(1, 1), (2, 1), (6, 4), (12, 9)])
def test_consistent_forgery_within_a_group_commit_is_named_to_its_group(
    made: Made, record: int, first: int
) -> None:
    home = made(GROUPED)
    home.change(forge(record), lambda connection: recompute(connection, nodes=True))
    assert found(home) == ("RECORD_CHANGED", first)


@pytest.mark.parametrize("record", [1, 2, 6, SIZE])
def test_forgery_that_leaves_the_tree_alone_is_named_exactly(made: Made, record: int) -> None:
    home = made([SIZE])
    home.change(forge(record), lambda connection: recompute(connection, nodes=False))
    assert found(home) == ("RECORD_CHANGED", record)


def test_consistent_forgery_without_checkpoints_is_still_found(made: Made) -> None:
    home = made(ONE_BY_ONE)
    home.change(forge(7), lambda connection: recompute(connection, nodes=True), "DELETE FROM checkpoint")
    assert found(home) == ("RECORD_CHANGED", 1)


@pytest.mark.parametrize("batches", [ONE_BY_ONE, [SIZE]], ids=["single", "group"])
@pytest.mark.parametrize("record", [1, 5, 6, SIZE])
def test_record_changed_with_its_own_hashes_is_named_not_the_one_after(
    made: Made, record: int, batches: list[int]
) -> None:
    home = made(batches)

    def change(connection: sqlite3.Connection) -> None:
        connection.execute(forge(record))
        body = connection.execute("SELECT body FROM rec WHERE seq=?", (record,)).fetchone()[0]
        before = connection.execute("SELECT chain FROM rec WHERE seq=?", (record - 1,)).fetchone()
        leaf = leaf_hash(body)
        values = (leaf, chain_hash(before[0] if before else NO_CHAIN, leaf), record)
        connection.execute("UPDATE rec SET leaf=?,chain=? WHERE seq=?", values)

    home.change(change)
    assert found(home) == ("RECORD_CHANGED", record)


@pytest.mark.parametrize(
    ("statement", "sequence"),
    [
        ("UPDATE node SET hash=zeroblob(32) WHERE level=0 AND idx=4", 5),
        ("UPDATE node SET hash=zeroblob(32) WHERE level=2 AND idx=1", 5),
        ("DELETE FROM node WHERE level=1 AND idx=3", 7),
        (f"INSERT INTO node VALUES(0,{SIZE},zeroblob(32))", SIZE + 1),
    ],
)
def test_changed_tree_under_good_records_is_found(made: Made, statement: str, sequence: int) -> None:
    home = made(GROUPED)
    home.change(statement)
    assert found(home) == ("TREE_CHANGED", sequence)


def test_old_checkpoint_does_not_serve_as_head_of_a_shortened_log(made: Made) -> None:
    home = made(GROUPED)

    def shorten(connection: sqlite3.Connection) -> None:
        home.head.write_text(connection.execute("SELECT note FROM checkpoint WHERE size=8").fetchone()[0])
        connection.execute("DELETE FROM rec WHERE seq>8")
        connection.execute("DELETE FROM checkpoint WHERE size>8")
        recompute(connection, nodes=True)

    home.change(shorten)
    assert home.verify().reason == "HEAD_INVALID"
    with pytest.raises(AuditTamperedError, match="HEAD_INVALID"):
        home.open()


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM checkpoint",
        "DELETE FROM checkpoint WHERE size=12",
        "DELETE FROM checkpoint WHERE size=8",
        "DELETE FROM checkpoint WHERE size=3",
        "DELETE FROM checkpoint WHERE size<12",
        "UPDATE checkpoint SET note='x'",
        "UPDATE checkpoint SET note='' WHERE size=12",
        "UPDATE checkpoint SET note=note||char(10) WHERE size=8",
        "UPDATE checkpoint SET note=CAST(x'ff00ff' AS TEXT) WHERE size=3",
        "UPDATE checkpoint SET note=(SELECT note FROM checkpoint WHERE size=3) WHERE size=8",
        "UPDATE checkpoint SET size=7 WHERE size=8",
        "INSERT INTO checkpoint SELECT 5,note FROM checkpoint WHERE size=8",
        "INSERT INTO checkpoint VALUES(13,'x')",
        "INSERT INTO checkpoint SELECT 99999,note FROM checkpoint WHERE size=12",
        "INSERT INTO checkpoint SELECT 0,note FROM checkpoint WHERE size=3",
        "INSERT INTO checkpoint SELECT -9223372036854775808,note FROM checkpoint WHERE size=3",
    ],
)
def test_checkpoints_that_are_not_as_written_are_found(made: Made, change: str) -> None:
    home = made(GROUPED)
    home.change(change)
    assert found(home) == ("CHECKPOINT_CHANGED", 0)


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM checkpoint",
        "UPDATE checkpoint SET note=note||char(10) WHERE size=12",
        "INSERT INTO checkpoint VALUES(13,'x')",
    ],
)
def test_log_whose_last_checkpoint_was_changed_is_not_opened(made: Made, change: str) -> None:
    home = made(GROUPED)
    home.change(change)
    with pytest.raises(AuditTamperedError, match="CHECKPOINT_CHANGED"):
        home.open()


def test_checkpoint_taken_out_beyond_the_head_is_found(made: Made) -> None:
    home = made([])
    old = home.head.read_text()
    log = home.open()
    fill(log, [3, 5, 4])
    log.close()
    home.head.write_text(old)
    assert home.verify().intact
    home.change("DELETE FROM checkpoint WHERE size=8")
    assert found(home) == ("CHECKPOINT_CHANGED", 0)
    with pytest.raises(AuditTamperedError, match="CHECKPOINT_CHANGED"):
        home.open()


@pytest.mark.parametrize("mark", ["application_id", "user_version"])
def test_changed_mark_of_the_file_is_found_and_the_log_not_opened(made: Made, mark: str) -> None:
    home = made(GROUPED)
    home.change(f"PRAGMA {mark}=77")
    assert found(home) == ("SCHEMA_CHANGED", 0)
    assert mark in home.verify().message
    with pytest.raises(AuditTamperedError, match=mark):
        home.open()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda home: home.head.unlink(), "HEAD_MISSING"),
        (lambda home: home.head.write_bytes(b"\xff" * 100), "HEAD_INVALID"),
        (lambda home: home.head.write_text(""), "HEAD_INVALID"),
        (lambda home: home.db.unlink(), "UNREADABLE"),
        (lambda home: home.db.write_bytes(b"x" * 8192), "UNREADABLE"),
        (lambda home: home.change("DROP TABLE rec"), "SCHEMA_CHANGED"),
        (lambda home: home.change("CREATE TRIGGER t AFTER INSERT ON rec BEGIN SELECT 1; END"), "SCHEMA_CHANGED"),
        (lambda home: home.change("DROP INDEX rec_tenant"), "SCHEMA_CHANGED"),
    ],
)
def test_damaged_files_have_their_reasons(made: Made, harm: Callable[[Home], None], reason: str) -> None:
    home = made(GROUPED)
    harm(home)
    assert not home.verify().intact
    assert home.verify().reason == reason


def test_log_of_another_key_is_refused(made: Made, tmp_path: Path) -> None:
    home = made(GROUPED)
    make_key(tmp_path / "other.pem", ORIGIN)
    shutil.copy(tmp_path / "other.pub", tmp_path / "audit.pub")
    assert home.verify().reason == "HEAD_INVALID"


def test_damaged_page_in_the_middle_names_where_reading_ended(made: Made) -> None:
    home = made([64] * 8)
    data = bytearray(home.db.read_bytes())
    start = data.index(b'"seq":300,') // 4096 * 4096
    data[start : start + 4096] = b"\x5a" * 4096
    home.db.write_bytes(data)
    verdict = home.verify()
    assert (verdict.intact, verdict.reason) == (False, "UNREADABLE")
    assert 1 <= verdict.first_bad_sequence <= 300


def test_verification_reads_blocks_and_counts_open_intents(made: Made) -> None:
    home = made([1000, 1000, 500, 1])
    assert home.verify().open_intents == 1
    home.change("UPDATE rec SET decision='deny' WHERE seq=2049")
    assert found(home) == ("RECORD_CHANGED", 2049)
