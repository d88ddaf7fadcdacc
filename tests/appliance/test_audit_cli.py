"""`cloister audit`: what it prints, and exit 3 with a code when the log is not what was signed."""

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from appliance.cli.main import main
from appliance.protos import admin_pb2
from tests.appliance.audit_logs import Home, fill
from tests.appliance.control_house import House, new_house


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    log = home.create()
    fill(log, [3, 2])
    log.close()
    return home


def run(home: Home, *words: str) -> int:
    key = str(home.path / "audit.pub")
    return main(["audit", "verify", "--file", str(home.db), "--key", key, *words])


def test_intact_log_exits_0_and_prints_size_and_root(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home) == 0
    shown = capsys.readouterr().out
    assert "intact" in shown
    assert "open intents  1" in shown
    assert home.verify().root.hex() in shown


def test_changed_log_exits_3_and_names_the_record(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    home.change("UPDATE rec SET decision='deny' WHERE seq=4")
    assert run(home) == 3
    shown = capsys.readouterr()
    assert "first bad     4" in shown.out
    assert shown.err.startswith("error: AUDIT_TAMPERED: RECORD_CHANGED: record 4:")


def test_json_verdict_is_one_object_with_the_codes(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    home.change("DELETE FROM rec WHERE seq>3")
    assert run(home, "--json") == 3
    shown = capsys.readouterr()
    verdict = json.loads(shown.out)
    assert (verdict["intact"], verdict["reason"], verdict["first_bad_sequence"]) == (False, "TRUNCATED", 4)
    assert json.loads(shown.err)["error"]["metadata"] == {"reason": "TRUNCATED", "sequence": "4"}


@pytest.mark.parametrize(
    "words",
    [
        ["--file", "/nonexistent/audit.db", "--key", "/nonexistent/key"],
        ["--file", "{db}"],
        ["--file", "{db}", "--key", "{db}"],
        ["--key", "{db}"],
    ],
)
def test_files_that_make_no_sense_are_bad_usage(home: Home, words: list[str]) -> None:
    assert main(["audit", "verify", *(word.format(db=home.db) for word in words)]) == 2


async def cloister(house: House, *words: str) -> int:
    """`cloister audit` against the running control plane."""
    return await asyncio.to_thread(main, ["--home", str(house.home.root), "audit", *words])


async def test_tail_prints_the_newest_records_oldest_first(capsys: pytest.CaptureFixture[str]) -> None:
    async with new_house() as house:
        for name in ("ward-1", "ward-2"):
            await house.tenants.AddTenant(admin_pb2.AddTenantRequest(tenant=admin_pb2.Tenant(name=name)))
        before = house.plane.journal.log.size
        assert await cloister(house, "tail", "-n", "3") == 0
    numbers = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(numbers) == 3
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    assert numbers[-1] >= before


async def test_tail_as_json_holds_the_parsed_body(capsys: pytest.CaptureFixture[str]) -> None:
    async with new_house() as house:
        assert await cloister(house, "tail", "-n", "1000", "--json") == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (first["sequence"], first["body"]["kind"]) == (1, "appliance.genesis")
    assert first["body"]["facts"]["profile"] == "demo"


async def test_running_appliance_verifies_its_log_and_names_the_changed_record(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with new_house() as house:
        assert await cloister(house, "verify", "--json") == 0
        assert json.loads(capsys.readouterr().out)["intact"] is True
        with closing(sqlite3.connect(house.home.audit_database, isolation_level=None)) as connection:
            connection.execute("UPDATE rec SET decision='another' WHERE seq=1")
        assert await cloister(house, "verify") == 3
    shown = capsys.readouterr()
    assert "first bad     1" in shown.out
    assert "AUDIT_TAMPERED: RECORD_CHANGED" in shown.err
