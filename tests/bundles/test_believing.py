"""What an import believes that it did not just verify: its staging and the trust of its first day, or not."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bundles.format.errors import BundleError
from bundles.importer.scrubbing import Pace, Scrubber
from bundles.importer.workplace import Workplace
from bundles.pipeline import State
from tests.bundles.making import Trust, make_bundle, manifest_of, replace_member, split
from tests.bundles.stores import bring, damaged_names, make_home, open_place, spoil, stored
from tests.bundles.test_resume import in_background, interrupt
from tests.bundles.test_standing import Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def place(tmp_path: Path, trust: Trust) -> Workplace:
    return open_place(make_home(tmp_path / "home", trust))


def _in_volumes(path: Path, trust: Trust, chunks: int) -> tuple[Path, Path]:
    """A bundle as two volumes that do not lie together, the first with so many chunks."""
    first = split(path, trust, chunks)
    medium = path.with_name(f"{path.name}.medium")
    medium.mkdir()
    return first, Path(shutil.move(first.with_suffix(".002"), medium))


def _digest(place: Workplace, path: str) -> str:
    return next(str(f["sha256"]) for f in place.ledger.versions()[0].files if f["path"] == path)


def test_trust_that_came_while_an_import_waited_stays_and_holds_for_it(tmp_path: Path, site: Site) -> None:
    trust = Trust(site.root, site.keys["root"], site.keys["release"], site.keys["publisher"])
    place = open_place(make_home(tmp_path / "home", trust))
    bring(place, site.trust_bundle("first", (), site.revocations(1)))
    first, second = _in_volumes(site.bundle(), trust, 3)
    thread, told, steering = in_background(place, first)
    newer = site.revocations(5, manifests=(told[-1].model_digest,))
    assert bring(place, site.trust_bundle("newer", (site.make_root(2),), newer)).state is State.COMMITTED
    steering.offer(second)
    thread.join(60)
    assert (told[-1].state, told[-1].reason) == (State.REJECTED, "MANIFEST_REVOKED")
    assert place.trust_in_force() == (2, 5)
    assert stored(place) == {}
    place.ledger.close()


def test_an_import_that_shares_a_file_found_damaged_meanwhile_does_not_call_it_repaired(
    place: Workplace, bundle: Path, tmp_path: Path, trust: Trust
) -> None:
    bring(place, bundle)
    first, second = _in_volumes(make_bundle(tmp_path / "second", trust, sequence=2), trust, 1)
    thread, told, steering = in_background(place, first)
    shared = _digest(place, "LICENSE")
    spoil(place.store.path_of(shared))
    Scrubber(place, Pace(0, 0)).scrub()
    steering.offer(second)
    thread.join(60)
    assert told[-1].reason == "STAGING_DAMAGED"
    assert [damage.sha256 for damage in place.ledger.damaged()] == damaged_names(place) == [shared]
    assert set(stored(place)) == place.ledger.listed(), "what was published of it is taken back"
    shutil.move(second, first.parent)
    assert bring(place, first).state is State.COMMITTED
    assert place.ledger.damaged() == ()
    assert damaged_names(place) == []


def test_a_file_repaired_while_an_import_waited_is_not_replaced_by_what_the_import_holds(
    place: Workplace, bundle: Path, tmp_path: Path, trust: Trust
) -> None:
    bring(place, bundle)
    first, second = _in_volumes(make_bundle(tmp_path / "second", trust, sequence=2), trust, 1)
    thread, told, steering = in_background(place, first)
    spoil(place.store.path_of(_digest(place, "LICENSE")))
    assert bring(place, bundle).state is State.COMMITTED
    steering.offer(second)
    thread.join(60)
    assert told[-1].state is State.COMMITTED
    assert damaged_names(place) == []


def test_a_file_that_staging_shares_with_the_store_is_hashed_again_when_an_import_is_resumed(
    place: Workplace, bundle: Path, tmp_path: Path, trust: Trust
) -> None:
    bring(place, bundle)
    second = make_bundle(tmp_path / "second", trust, sequence=2)
    interrupt(place, second, 9000)
    spoil(place.store.path_of(_digest(place, "LICENSE")))
    assert bring(place, second).state is State.COMMITTED
    assert damaged_names(place) == []


def test_the_record_of_a_file_that_staging_lost_does_not_speak_for_the_next_one(
    place: Workplace, bundle: Path, tmp_path: Path
) -> None:
    """The next one is complete in its size when its last chunk is refused, and nothing smaller is recorded."""
    at, file = next((i, f) for i, f in enumerate(manifest_of(bundle).files) if len(f.chunks) > 1)
    ended = interrupt(place, bundle, sum(f.size for f in manifest_of(bundle).files[: at + 1]))
    assert place.ledger.staged(ended.model_digest)[at] == file.size
    staged = place.store.root / "staging" / ended.model_digest / str(at)
    staged.unlink()
    place = replace(place, interval=1 << 30)
    bad = Path(shutil.copy(bundle, tmp_path / "bad"))
    replace_member(bad, f"c/{file.chunks[-1]}", lambda raw: bytes([raw[0] ^ 1]) + raw[1:])
    assert bring(place, bad).reason == "CHUNK_DIGEST"
    assert bring(place, bundle).state is State.COMMITTED
    assert damaged_names(place) == []


def test_what_was_published_of_an_import_that_failed_is_taken_back(
    place: Workplace, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise BundleError("STORE_SPACE", "the disk is full")

    monkeypatch.setattr(type(place), "keep_trust", full)
    assert bring(place, bundle).reason == "STORE_SPACE"
    assert stored(place) == {}
    monkeypatch.undo()
    ended = bring(place, bundle)
    assert (ended.state, ended.bytes_reused) == (State.COMMITTED, ended.bytes_total)
    assert damaged_names(place) == []


def test_an_import_that_waits_promises_only_what_it_has_still_to_write(
    place: Workplace, tmp_path: Path, trust: Trust
) -> None:
    first, second = _in_volumes(make_bundle(tmp_path / "b", trust), trust, 3)
    thread, told, steering = in_background(place, first)
    held = told[-1]
    assert held.bytes_done > 0
    assert place.desk.promised("another") == held.bytes_total - held.bytes_done
    steering.offer(second)
    thread.join(60)
    assert told[-1].state is State.COMMITTED
    assert place.desk.promised("another") == 0


def test_what_is_staged_and_not_recorded_is_freed_when_an_import_ends_and_at_the_next_start(
    place: Workplace, bundle: Path, tmp_path: Path
) -> None:
    ended = interrupt(place, bundle, 9000)
    staged = place.store.root / "staging" / ended.model_digest
    recorded = sum(place.ledger.staged(ended.model_digest).values())
    recorded_and_head = recorded + (staged / "head").stat().st_size
    assert place.store.staged_bytes() == recorded_and_head > 0
    with max(staged.glob("[0-9]*"), key=lambda path: path.stat().st_size).open("ab") as stream:
        stream.write(b"not recorded")
    (staged / "99").write_bytes(b"nor this")
    place.ledger.close()
    again = open_place(tmp_path / "home")
    assert again.store.staged_bytes() == recorded_and_head
    ended = bring(again, bundle)
    assert (ended.state, ended.bytes_reused) == (State.COMMITTED, recorded)
    assert damaged_names(again) == []
    again.ledger.close()
