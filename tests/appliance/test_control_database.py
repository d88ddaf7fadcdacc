"""control.db: migrations, group commit, and jobs that are all or nothing."""

import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from appliance.control.db.database import NEWEST_REVISION, Database
from appliance.control.db.migrating import scripts
from appliance.control.db.models import Base, Meta
from appliance.errors import CloisterError


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "control.db")
    yield opened
    opened.close()


def put(name: str, value: str) -> object:
    return lambda session: session.add(Meta(name=name, value=value)) or session.flush()


def names(session: Session) -> list[str]:
    return list(session.scalars(select(Meta.name).order_by(Meta.name)))


def test_the_migrations_make_exactly_the_tables_that_the_models_describe(tmp_path: Path) -> None:
    Database(tmp_path / "control.db").close()
    with create_engine(f"sqlite:///{tmp_path}/control.db").connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_a_file_of_the_newest_revision_is_opened_without_alembic(tmp_path: Path) -> None:
    assert scripts().get_current_head() == NEWEST_REVISION
    path = tmp_path / "control.db"
    Database(path).close()
    code = (
        "import pathlib, sys; from appliance.control.db.database import Database; "
        "Database(pathlib.Path(sys.argv[1])).close(); assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True)


def test_a_file_written_by_an_unknown_revision_is_refused_and_left_alone(tmp_path: Path) -> None:
    Database(tmp_path / "control.db").close()
    with sqlite3.connect(tmp_path / "control.db") as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(CloisterError, match="DATABASE_REVISION_UNKNOWN"):
        Database(tmp_path / "control.db")
    with sqlite3.connect(tmp_path / "control.db") as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchall() == [("9999",)]


async def test_a_job_that_fails_takes_back_its_own_changes_and_no_other_s(database: Database) -> None:
    def half_done(session: Session) -> None:
        session.add(Meta(name="half", value=""))
        session.flush()
        raise RuntimeError("stop here")

    results = await asyncio.gather(
        database.run(put("first", "")), database.run(half_done), database.run(put("second", "")),
        database.run(put("first", "again")), return_exceptions=True,
    )  # fmt: skip
    assert [type(r) for r in results] == [type(None), RuntimeError, type(None), IntegrityError]
    assert await database.run(names) == ["first", "second"]


async def test_jobs_that_wait_together_share_one_commit(database: Database) -> None:
    commits = []

    def watch(session: Session) -> None:
        event.listen(session.get_bind(), "commit", lambda _connection: commits.append(1))

    await database.run(watch)
    before = len(commits)
    await asyncio.gather(*(database.run(put(f"n{i}", "")) for i in range(32)))
    assert len(commits) - before < 32
    assert len(await database.run(names)) == 32


async def test_what_was_answered_is_there_after_the_file_is_opened_again(tmp_path: Path) -> None:
    first = Database(tmp_path / "control.db")
    await first.run(put("kept", "yes"))
    first.close()
    second = Database(tmp_path / "control.db")
    assert await second.run(names) == ["kept"]
    second.close()


def limit_pages(session: Session) -> None:
    """Let the file grow by two pages more, as on a disk that is nearly full."""
    pages = session.scalar(text("PRAGMA page_count"))
    session.execute(text(f"PRAGMA max_page_count={pages + 2}"))


def test_no_job_of_a_transaction_that_a_full_disk_rolled_back_is_answered_as_done(database: Database) -> None:
    database.submit(limit_pages).result()
    together = threading.Event()
    waiting = [database.submit(lambda _: together.wait())]
    waiting += [database.submit(put(*job)) for job in (("first", ""), ("big", "x" * 60_000), ("third", ""))]
    together.set()
    errors = dict(zip(("gate", "first", "big", "third"), (f.exception() for f in waiting), strict=True))
    assert errors["third"] is None, "what came after the lost transaction has one of its own"
    assert all(isinstance(errors[lost], CloisterError) for lost in ("first", "big"))
    assert {e.code for e in errors.values() if isinstance(e, CloisterError)} == {"DATABASE_FAILED"}
    assert database.submit(names).result() == ["third"]


def test_who_only_reads_is_answered_though_the_disk_takes_nothing_of_the_same_transaction(
    database: Database,
) -> None:
    database.submit(put("before", "")).result()
    database.submit(limit_pages).result()
    together = threading.Event()
    database.submit(lambda _: together.wait())
    waiting = [database.submit(job) for job in (names, put("big", "x" * 60_000), names)]
    together.set()
    assert [getattr(f.exception(), "code", "") for f in waiting] == ["", "DATABASE_FAILED", ""]
    assert [waiting[0].result(), waiting[2].result()] == [["before"], ["before"]]


def test_a_job_that_was_refused_keeps_its_refusal_when_the_transaction_is_lost(database: Database) -> None:
    def refused(_session: Session) -> None:
        raise CloisterError("KEY_UNKNOWN", "no such key")

    database.submit(limit_pages).result()
    together = threading.Event()
    database.submit(lambda _: together.wait())
    waiting = [database.submit(refused), database.submit(put("big", "x" * 60_000))]
    together.set()
    assert [getattr(f.exception(), "code", "") for f in waiting] == ["KEY_UNKNOWN", "DATABASE_FAILED"]


def test_a_thread_that_fails_in_a_way_nobody_foresaw_ends_its_process(tmp_path: Path) -> None:
    """Or every request would wait for an answer that nobody gives."""
    program = """
import pathlib, sys
from appliance.control.db import database
opened = database.Database(pathlib.Path(sys.argv[1]))
database._carry_out = None
opened.submit(lambda session: 1).result(timeout=20)
"""
    root = Path(__file__).parents[2]
    place = tmp_path / "control.db"
    done = subprocess.run(
        [sys.executable, "-c", program, place], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, "the thread of control.db failed" in done.stderr) == (1, True)
