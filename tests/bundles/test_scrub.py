"""Scrubs: what rotted is found and said once, slowly, from where a restart left off; importing again mends it."""

import asyncio
import sqlite3
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from bundles.format.errors import BundleError
from bundles.importer import workplace
from bundles.importer.records import Damage, Scrub
from bundles.importer.removal import remove_version
from bundles.importer.scrubbing import Pace, Scrubber, StoppedError
from bundles.importer.workplace import Workplace
from bundles.pipeline import Progress, State
from tests.bundles.making import Trust, make_bundle
from tests.bundles.stores import NOW, bring, make_home, open_place, spoil, stored


class Clock:
    """Time that passes when somebody pauses."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += max(0.0, seconds)


@pytest.fixture
def place(tmp_path: Path, trust: Trust, bundle: Path) -> Workplace:
    place = open_place(make_home(tmp_path / "home", trust))
    bring(place, bundle)
    return place


def _weights(place: Workplace) -> str:
    return next(str(f["sha256"]) for f in place.ledger.versions()[0].files if f["path"] == "model.safetensors")


def _events(place: Workplace, *names: str) -> list[tuple[str, str]]:
    return [(e.event, e.detail) for e in place.ledger.outbox(0, limit=1000) if e.event in names]


def test_a_scrub_finds_what_changed_and_what_is_gone_and_says_it_once(place: Workplace) -> None:
    weights = _weights(place)
    gone = next(str(f["sha256"]) for f in place.ledger.versions()[0].files if f["path"] == "config.json")
    spoil(place.store.path_of(weights))
    place.store.path_of(gone).unlink()
    scrubber = Scrubber(place, Pace(0, 0))
    scrubber.scrub()
    scrubber.scrub()
    found = {Damage(weights, "changed"), Damage(gone, "absent")}
    assert set(place.ledger.damaged()) == found
    assert sorted(_events(place, "damage")) == sorted(("damage", f"{d.sha256} {d.finding}") for d in found)


def test_importing_the_bundle_again_mends_what_a_scrub_found(place: Workplace, bundle: Path) -> None:
    weights = _weights(place)
    spoil(place.store.path_of(weights))
    Scrubber(place, Pace(0, 0)).scrub()
    assert bring(place, bundle).state is State.COMMITTED
    assert place.ledger.damaged() == ()
    assert _events(place, "damage", "repair") == [("damage", f"{weights} changed"), ("repair", weights)]


def test_a_file_that_is_found_well_again_is_repaired(place: Workplace) -> None:
    weights = _weights(place)
    place.ledger.found(weights, "unreadable")
    Scrubber(place, Pace(0, 0)).scrub()
    assert _events(place, "damage", "repair") == [("damage", f"{weights} unreadable"), ("repair", weights)]


def test_a_scrub_reads_no_faster_than_it_is_told(place: Workplace) -> None:
    clock = Clock()
    Scrubber(place, Pace(1000, 0), clock=clock, pause=clock.pause).scrub()
    size = place.store.usage().bytes
    assert clock.now == pytest.approx(size / 1000, rel=0.2)


def test_a_scrub_that_was_stopped_goes_on_behind_the_last_file_it_recorded(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bundles.importer.scrubbing._SAVED_BYTES", 1)
    listed = sorted(place.ledger.listed())
    seen: list[str] = []
    real = place.store.finding

    def finding(digest: str, read: object) -> str:
        if len(seen) == 3:
            raise StoppedError
        seen.append(digest)
        return real(digest, read)  # type: ignore[arg-type]  # handed on

    monkeypatch.setattr(place.store, "finding", finding)
    with pytest.raises(StoppedError):
        Scrubber(place, Pace(0, 0)).scrub()
    assert seen == listed[:3]
    place.ledger.close()
    again = open_place(tmp_path / "home")
    assert Scrubber(again, Pace(0, 0)).is_due(), "one that was interrupted goes on, whenever the next is due"
    monkeypatch.setattr(again.store, "finding", lambda digest, read: seen.append(digest) or "")
    Scrubber(again, Pace(0, 0)).scrub()
    assert seen == listed
    assert again.ledger.scrub() == Scrub("", 0, int(NOW.timestamp()), again.ledger.scrub().bytes_done)
    again.ledger.close()


def test_a_scrub_is_due_when_the_last_is_long_enough_ago(place: Workplace) -> None:
    assert not Scrubber(place, Pace(0, 30)).is_due(), "what was just imported was just hashed"
    later = replace(place, now=lambda: NOW + timedelta(days=31))
    assert Scrubber(later, Pace(0, 30)).is_due()
    assert not Scrubber(later, Pace(0, 0)).is_due()
    Scrubber(later, Pace(0, 30)).scrub()
    assert not Scrubber(later, Pace(0, 30)).is_due()


async def test_one_who_asks_joins_the_scrub_that_runs_and_sees_it_end(place: Workplace) -> None:
    spoil(place.store.path_of(_weights(place)))
    scrubber = Scrubber(place, Pace(0, 0))
    first = scrubber.ask()
    assert scrubber.ask() == first
    assert not scrubber.sweep(first).ended
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def changed() -> None:
        loop.call_soon_threadsafe(ended.set)

    scrubber.changed = changed
    scrubber.start()
    while not scrubber.sweep(first).ended:
        await asyncio.wait_for(ended.wait(), 60)
        ended.clear()
    assert [damage.finding for damage in scrubber.sweep(first).damaged] == ["changed"]
    assert scrubber.sweep(first).bytes_done == scrubber.sweep(first).bytes_total
    scrubber.stop()


async def test_a_scrub_that_ends_early_says_so_and_the_next_one_runs(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    scrubber, loop, ended = Scrubber(place, Pace(0, 0)), asyncio.get_running_loop(), asyncio.Event()

    def changed() -> None:
        loop.call_soon_threadsafe(ended.set)

    scrubber.changed = changed
    with monkeypatch.context() as broke:
        broke.setattr(place.ledger, "found", broken)
        asked = scrubber.ask()
        scrubber.start()
        await asyncio.wait_for(ended.wait(), 60)
        sweep = scrubber.sweep(asked)
        assert (sweep.ended, sweep.failed) == (True, True)
    ended.clear()
    asked = scrubber.ask()
    await asyncio.wait_for(ended.wait(), 60)
    sweep = scrubber.sweep(asked)
    assert (sweep.ended, sweep.failed, sweep.bytes_done) == (True, False, sweep.bytes_total)
    scrubber.stop()


def test_old_staging_is_thrown_away_while_the_importer_runs_unless_an_import_has_it(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for digest in ("a" * 64, "b" * 64):
        (place.store.root / "staging" / digest).mkdir()
        place.ledger.stage(digest, {0: 1})
    monkeypatch.setattr(workplace, "STAGING_KEPT_S", -1)
    with place.desk.claim("b" * 64):
        place.discard_expired()
    assert list(place.ledger.stagings()) == ["b" * 64]
    assert [path.name for path in (place.store.root / "staging").iterdir()] == ["b" * 64]


def test_removing_a_version_deletes_what_no_other_has_and_keeps_its_floor(
    place: Workplace, tmp_path: Path, trust: Trust, bundle: Path
) -> None:
    first = place.ledger.versions()[0]
    bring(place, make_bundle(tmp_path / "second", trust, sequence=2))
    second = place.ledger.find("tiny@1.0.2")
    assert second is not None
    before = stored(place)
    reference, freed = remove_version(place, "tiny@1.0.1")
    after = stored(place)
    assert reference == "tiny@1.0.1"
    assert set(after) == set(second.digests())
    assert freed == sum(map(len, before.values())) - sum(map(len, after.values()))
    assert set(first.digests()) - set(after), "the weights of the first are its own"
    assert place.ledger.find("tiny@1.0.1") is None
    assert bring(place, bundle).reason == "ROLLBACK_REFUSED"
    remove_version(place, second.model_digest)
    assert stored(place) == {}
    assert bring(place, bundle).reason == "ROLLBACK_REFUSED", "the floor outlives the version"
    with pytest.raises(BundleError, match="MODEL_VERSION_NOT_FOUND"):
        remove_version(place, "tiny@1.0.2")


def test_versions_that_a_lost_database_knew_are_found_again_by_their_bundle(
    place: Workplace, bundle: Path, tmp_path: Path
) -> None:
    before = stored(place)
    place.ledger.close()
    for path in (tmp_path / "home" / "store").glob("store.db*"):
        path.unlink()
    again = open_place(tmp_path / "home")
    assert stored(again) == before
    ended = bring(again, bundle)
    assert (ended.state, ended.bytes_reused) == (State.COMMITTED, ended.bytes_total)
    assert stored(again) == before
    again.ledger.close()


def test_a_model_that_an_adapter_works_with_is_not_removed_before_it(place: Workplace) -> None:
    base = place.ledger.versions()[0]
    need = {"name": base.name, "model_digest": base.model_digest}
    adapter = replace(
        base, name="tuned", version="1", kind="adapter", model_digest="a" * 64, requires=(need,), evidence={}
    )
    place.ledger.begin("adapter", Path("/adapter"))
    place.ledger.commit("adapter", Progress(State.COMMITTED), adapter, place.trust_in_force())
    with pytest.raises(BundleError, match=r"MODEL_REQUIRED.*tuned@1"):
        remove_version(place, base.reference)
    assert place.store.records() != ()
    remove_version(place, "tuned@1")
    remove_version(place, base.reference)
    assert stored(place) == {}
