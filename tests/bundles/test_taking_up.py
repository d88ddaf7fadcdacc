"""Imports that a process left are taken up by the next: from where they were, without the media they had."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bundles.format.errors import BundleError
from bundles.importer.importing import take_up
from bundles.importer.ledger import MOST_DEATHS
from bundles.importer.records import Import
from bundles.importer.steering import Steering, StoppingError
from bundles.importer.workplace import Workplace
from bundles.pipeline import Progress, State
from bundles.trust import revocation
from bundles.trust.bundle import write_trust_bundle
from bundles.trust.signers import new_signer
from tests.bundles.making import CHUNK, Trust, make_bundle, make_delta, make_root, members_of, split, unpack
from tests.bundles.stores import bring, counted, damaged_names, go_on, make_home, open_place, spoil, stored


@pytest.fixture
def place(tmp_path: Path, trust: Trust) -> Workplace:
    return open_place(make_home(tmp_path / "home", trust))


class Told(list[Progress]):
    """What an import tells; whoever waits for a volume to be wanted is woken."""

    def __init__(self) -> None:
        self._changed = threading.Condition()

    def append(self, progress: Progress) -> None:
        with self._changed:
            super().append(progress)
            self._changed.notify_all()

    def wanted(self, volume: int, refused: str = "") -> Progress:
        """Until this volume is wanted, and one was refused for this."""

        def is_so() -> bool:
            return bool(self) and self[-1].volume_wanted == volume and self[-1].volume_refused.startswith(refused)

        with self._changed:
            assert self._changed.wait_for(is_so, 60), self[-1:]
            return self[-1]


def leave(place: Workplace, path: Path, bytes_done: int = 0) -> Import:
    """Import until so many bytes are verified, or a volume is wanted; then the importer stops."""
    steering = Steering()

    class Stops(list[Progress]):
        def append(self, progress: Progress) -> None:
            if progress.volume_wanted or (bytes_done and progress.bytes_done >= bytes_done):
                steering.end(StoppingError())

    assert bring(place, path, Stops(), steering).state is State.STREAMING
    (left,) = place.ledger.unfinished()
    return left


@contextmanager
def taken_up(place: Workplace) -> Iterator[tuple[Told, Steering]]:
    """The one import that was left, on a thread; it ends with the block."""
    (left,) = place.ledger.unfinished()
    told, steering = Told(), Steering()
    thread = threading.Thread(target=take_up, args=(place, left, told.append, steering))
    thread.start()
    try:
        yield told, steering
        thread.join(60)
        assert not thread.is_alive()
    finally:
        steering.end(StoppingError())
        thread.join(60)


def states(place: Workplace, import_id: str) -> list[State]:
    return [entry.state for entry in place.ledger.outbox(0) if entry.import_id == import_id and entry.state]


def media(folder: Path, trust: Trust, *counts: int, sequence: int = 1) -> list[Path]:
    """A bundle's volumes, each on a medium of its own."""
    made = folder / f"made{sequence}"
    made.mkdir()
    first = split(make_bundle(made / "b.bundle", trust, sequence=sequence), trust, *counts)
    volumes = []
    for index in range(1, len(counts) + 2):
        medium = folder / f"medium{sequence}-{index}"
        medium.mkdir()
        volumes.append(Path(shutil.move(first.with_suffix(f".{index:03}"), medium)))
    return volumes


def expected(folder: Path, trust: Trust, path: Path) -> dict[str, bytes]:
    """The store of a home that imported the same without a break."""
    whole = open_place(make_home(folder / "other", trust))
    assert bring(whole, path).state is State.COMMITTED
    whole.ledger.close()
    return stored(whole)


def unplugged(path: Path) -> Path:
    """The medium is taken out; where it is now."""
    return path.rename(path.with_name(f"drawer-{path.name}"))


def test_an_import_goes_on_in_the_next_process_with_its_id_and_reads_what_was_not_durable(
    place: Workplace, bundle: Path, tmp_path: Path, trust: Trust
) -> None:
    left = leave(place, bundle, 9000)
    place.ledger.close()
    again = open_place(tmp_path / "home")
    staged = sum(again.ledger.staged(left.progress.model_digest).values())
    assert staged >= 2 * CHUNK
    told: list[Progress] = []
    with counted() as read:
        (ended,) = go_on(again, told)
    assert (ended.state, ended.bytes_reused, ended.bytes_done) == (State.COMMITTED, staged, ended.bytes_total)
    sizes = {name: len(content) for name, content in members_of(bundle)}
    chunks = sum(size for name, size in sizes.items() if name.startswith("c/"))
    head = bundle.stat().st_size - chunks  # read twice: is it that bundle, and then as what is behind the chunks
    assert read.bytes_read <= chunks - staged + 2 * head
    assert states(again, left.import_id) == list(State)[:6]
    assert [p.state for p in told] == sorted([p.state for p in told], key=list(State).index), "it never goes back"
    assert told[0].model_version == "tiny@1.0.1"
    assert stored(again) == expected(tmp_path, trust, bundle)
    assert list((again.store.root / "staging").iterdir()) == []
    assert go_on(again) == []
    again.ledger.close()


def test_volumes_whose_chunks_are_durable_are_not_shown_again(
    place: Workplace, tmp_path: Path, trust: Trust
) -> None:
    first, second, third = media(tmp_path, trust, 3, 2)
    left = leave(place, first)
    unplugged(first)
    for volume, following in ((second, 3), (third, 0)):
        place.ledger.close()
        place = open_place(tmp_path / "home")
        with counted() as read, taken_up(place) as (told, steering):
            wanted = told.wanted(following - 1 if following else 3)
            assert (wanted.state, wanted.model_version) == (State.STREAMING, "tiny@1.0.1")
            assert wanted.bytes_done > 0, "what is durable counts at once"
            steering.offer(volume)
            if following:
                told.wanted(following)
                steering.end(StoppingError())
        assert read.sources == [], "the first volume is not opened"
        assert told[-1].state is (State.STREAMING if following else State.COMMITTED)
        unplugged(volume)
    assert states(place, left.import_id) == list(State)[:6]
    assert damaged_names(place) == []
    assert list((place.store.root / "staging").iterdir()) == []


def test_a_volume_that_was_handed_over_is_read_on_where_it_was(
    place: Workplace, tmp_path: Path, trust: Trust
) -> None:
    first, second, third = media(tmp_path, trust, 3, 4)
    leave(place, first)
    unplugged(first)
    steering, begun = Steering(), place.ledger.unfinished()[0]

    def told(progress: Progress) -> None:
        if progress.volume_wanted == 2:
            steering.offer(second)
        elif progress.bytes_done >= 6000 and not progress.volume_wanted:
            steering.end(StoppingError())

    assert take_up(place, begun, told, steering).bytes_done < begun.progress.bytes_total
    place.ledger.close()
    again = open_place(tmp_path / "home")
    assert again.ledger.unfinished()[0].offered == str(second)
    with taken_up(again) as (heard, steering):
        heard.wanted(3)
        assert {progress.volume_wanted for progress in heard} == {0, 3}
        steering.offer(third)
    assert heard[-1].state is State.COMMITTED
    assert damaged_names(again) == []
    again.ledger.close()


def test_where_all_is_durable_no_medium_is_wanted(place: Workplace, tmp_path: Path, trust: Trust) -> None:
    first, second = media(tmp_path, trust, 3)
    leave(place, first)
    steering = Steering()

    def told(progress: Progress) -> None:
        if progress.volume_wanted:
            steering.offer(second)
        if progress.state is State.STREAMING and progress.bytes_done == progress.bytes_total:
            steering.end(StoppingError())

    assert take_up(place, place.ledger.unfinished()[0], told, steering).state is State.STREAMING
    for volume in (first, second):
        unplugged(volume)
    assert [ended.state for ended in go_on(place)] == [State.COMMITTED]
    assert damaged_names(place) == []


def test_of_a_first_volume_that_was_half_read_the_rest_is_asked_for(
    place: Workplace, tmp_path: Path, trust: Trust
) -> None:
    first, second = media(tmp_path, trust, 7)
    other, _ = media(tmp_path, trust, 7, sequence=2)
    leave(place, first, 6000)
    elsewhere = unplugged(first)
    with taken_up(place) as (told, steering):
        assert told.wanted(1).volumes == 2
        for wrong, code in ((second, "VOLUME_ORDER"), (other, "VOLUME_MIXED"), (first, "SOURCE_UNREADABLE")):
            with pytest.raises(BundleError, match=code):
                steering.offer(wrong)
            told.wanted(1, code)
        steering.offer(elsewhere)
        told.wanted(2)
        steering.offer(second)
    assert told[-1].state is State.COMMITTED
    assert told[-1].bytes_reused >= CHUNK
    assert damaged_names(place) == []


def test_another_bundle_at_the_path_is_not_taken_for_the_one_that_was_left(
    place: Workplace, bundle: Path, tmp_path: Path, trust: Trust
) -> None:
    leave(place, bundle, 9000)
    right = unplugged(bundle)
    shutil.copy(make_bundle(tmp_path / "second", trust, sequence=2), bundle)
    with taken_up(place) as (told, steering):
        told.wanted(1, "VOLUME_MIXED")
        bundle.unlink()
        assert steering.look_again() == 0
        assert told[-1].volume_wanted == 1
        right.rename(bundle)
        assert steering.look_again() == 1
    assert [version.sequence for version in place.ledger.versions()] == [1]


def test_a_folder_is_taken_up_like_a_file(place: Workplace, bundle: Path, tmp_path: Path) -> None:
    leave(place, unpack(bundle, tmp_path / "folder"), 9000)
    assert [ended.state for ended in go_on(place)] == [State.COMMITTED]
    assert damaged_names(place) == []


def test_a_delta_is_taken_up_with_its_base_from_the_store(
    place: Workplace, bundle: Path, tmp_path: Path, trust: Trust
) -> None:
    assert bring(place, bundle).state is State.COMMITTED
    whole = make_bundle(tmp_path / "whole", trust, sequence=2)
    first = split(make_delta(whole, bundle, trust), trust, 2)
    second = unplugged(first.with_suffix(".002"))
    leave(place, first)
    unplugged(first)
    with taken_up(place) as (told, steering):
        told.wanted(2)
        steering.offer(second)
    assert told[-1].state is State.COMMITTED
    assert damaged_names(place) == []


def _head(place: Workplace, left: Import) -> Path:
    return place.store.staging(left.progress.model_digest) / "head"


@pytest.mark.parametrize("damage", ["torn", "flipped", "longer", "absent", "of another"])
def test_a_damaged_head_is_thrown_away_and_the_first_volume_asked_for(
    place: Workplace, tmp_path: Path, trust: Trust, damage: str
) -> None:
    first, second = media(tmp_path, trust, 5)
    head = _head(place, leave(place, first))
    raw = head.read_bytes()
    if damage == "of another":
        other, _ = media(tmp_path, trust, 5, sequence=2)
        elsewhere = open_place(make_home(tmp_path / "elsewhere", trust))
        raw = _head(elsewhere, leave(elsewhere, other)).read_bytes()
    head.write_bytes(
        {
            "torn": raw[: len(raw) // 2],
            "flipped": raw[:700] + bytes([raw[700] ^ 1]) + raw[701:],
            "longer": raw[:-1024] + bytes(512) + raw[-1024:],
            "absent": b"",
            "of another": raw,
        }[damage]
    )
    elsewhere_now = unplugged(first)
    with taken_up(place) as (told, steering):
        told.wanted(1)
        assert not head.exists()
        steering.offer(elsewhere_now)
        told.wanted(2)
        assert head.exists(), "it is kept anew"
        steering.offer(second)
    assert told[-1].state is State.COMMITTED
    assert damaged_names(place) == []


def test_trust_and_policy_are_judged_again_whatever_was_kept(tmp_path: Path, trust: Trust) -> None:
    revoker = new_signer("ed25519")
    roles = {"root": [trust.root_key], "release": [trust.release_key], "publisher": [trust.publisher_key]}
    keys = replace(trust, root=make_root(1, {**roles, "revocation": [revoker]}))
    place = open_place(make_home(tmp_path / "home", keys))
    first, second = media(tmp_path, keys, 5)
    left = leave(place, first)
    now = datetime.now(UTC)
    document = revocation.make(1, now, now + timedelta(days=9), manifests=[left.progress.model_digest])
    write_trust_bundle(tmp_path / "t", [keys.root], revocation.sign(document, [revoker]))
    assert bring(place, tmp_path / "t").state is State.COMMITTED
    shutil.move(second, first.parent)
    assert [ended.reason for ended in go_on(place)] == ["MANIFEST_REVOKED"]
    assert states(place, left.import_id) == [*list(State)[:4], State.REJECTED]
    assert place.ledger.outbox(0)[-1].model_version == "tiny@1.0.1"
    assert stored(place) == {}


def test_a_newer_release_that_came_first_ends_the_one_that_was_left(
    place: Workplace, tmp_path: Path, trust: Trust
) -> None:
    first, second = media(tmp_path, trust, 5)
    leave(place, first)
    assert bring(place, make_bundle(tmp_path / "newer", trust, sequence=2)).state is State.COMMITTED
    shutil.move(second, first.parent)
    assert [ended.reason for ended in go_on(place)] == ["ROLLBACK_REFUSED"]
    assert go_on(place) == []


def test_what_lies_staged_is_hashed_where_the_store_speaks_against_it(
    place: Workplace, tmp_path: Path, trust: Trust
) -> None:
    first, second = media(tmp_path, trust, 5)
    left = leave(place, first)
    spoil(place.store.staging(left.progress.model_digest) / "0")
    shutil.move(second, first.parent)
    go_on(place)
    bring(place, first)
    assert damaged_names(place) == []


def test_an_import_that_was_cancelled_or_refused_is_not_taken_up(
    place: Workplace, bundle: Path, tmp_path: Path
) -> None:
    steering = Steering()

    class Cancels(list[Progress]):
        def append(self, progress: Progress) -> None:
            if progress.bytes_done >= 9000:
                steering.end(BundleError("IMPORT_CANCELLED", "an operator ended it"))
                steering.end(StoppingError())

    assert bring(place, bundle, Cancels(), steering).reason == "IMPORT_CANCELLED"
    assert bring(place, tmp_path / "nothing").reason == "SOURCE_UNREADABLE"
    place.ledger.close()
    again = open_place(tmp_path / "home")
    assert again.ledger.unfinished() == ()
    assert go_on(again) == []
    again.ledger.close()


def test_whoever_imports_a_cancelled_bundle_again_need_not_show_its_first_volume_either(
    place: Workplace, tmp_path: Path, trust: Trust
) -> None:
    first, second = media(tmp_path, trust, 5)
    left = leave(place, first)
    with taken_up(place) as (told, steering):
        told.wanted(2)
        steering.end(BundleError("IMPORT_CANCELLED", "an operator ended it"))
    assert (told[-1].reason, told[-1].model_version) == ("IMPORT_CANCELLED", "tiny@1.0.1")
    unplugged(first)
    assert bring(place, first.with_name("another")).reason == "SOURCE_UNREADABLE"
    hasty = Steering()
    hasty.end(BundleError("IMPORT_CANCELLED", "an operator ended it before its turn"))
    assert bring(place, first, steering=hasty).model_digest == ""
    again, steering = Told(), Steering()
    thread = threading.Thread(target=bring, args=(place, first, again, steering))
    thread.start()
    again.wanted(2)
    steering.offer(second)
    thread.join(60)
    assert (again[-1].state, again[-1].model_digest) == (State.COMMITTED, left.progress.model_digest)
    assert bring(place, first).reason == "SOURCE_UNREADABLE", "nothing is staged of it any more"


def test_a_trust_bundle_is_taken_up(place: Workplace, tmp_path: Path, trust: Trust) -> None:
    path = tmp_path / "trust.bundle"
    keys = {"root": [trust.root_key], "release": [trust.release_key], "publisher": [trust.publisher_key]}
    second = make_root(2, keys)
    write_trust_bundle(path, [trust.root, second], None)
    place.ledger.begin("left", path)
    place.keep_trust((second,), None)
    assert [ended.state for ended in go_on(place)] == [State.COMMITTED]
    assert place.trust_in_force()[0] == 2
    assert states(place, "left") == [State.QUARANTINE, State.SIGNED, State.POLICY, State.COMMITTED]


def test_only_deaths_while_an_import_works_are_counted_and_after_three_it_waits_for_its_operator(
    place: Workplace, bundle: Path, tmp_path: Path, trust: Trust
) -> None:
    left = leave(place, bundle, 9000)
    for _ in range(5):  # it waited, or the importer was stopped: none of its doing
        place.ledger.close()
        place = open_place(tmp_path / "home")
    for death in range(MOST_DEATHS):
        assert [held.import_id for held in place.ledger.unfinished()] == [left.import_id], death
        place.ledger.works(left.import_id, True)
        for _ in range(2):  # the second dies of another, before this one's turn comes
            place.ledger.close()
            place = open_place(tmp_path / "home")
    assert place.ledger.unfinished() == ()
    ended = place.ledger.ended()[0]
    assert (ended.import_id, ended.progress.reason) == (left.import_id, "INTERRUPTED")
    assert ended.progress.model_version == "tiny@1.0.1"
    assert states(place, left.import_id) == [*list(State)[:4], State.REJECTED]
    by_hand = bring(place, bundle)
    assert (by_hand.state, by_hand.bytes_reused >= 2 * CHUNK) == (State.COMMITTED, True)
    place.ledger.close()


def test_an_import_is_at_work_but_for_where_it_waits_for_a_volume(
    place: Workplace, tmp_path: Path, trust: Trust
) -> None:
    first, second = media(tmp_path, trust, 5)
    left = leave(place, first)
    steering, at_work = Steering(), set()

    def told(progress: Progress) -> None:
        ((working,),) = place.ledger._db.rows("SELECT working FROM import")
        if progress.volume_wanted:
            steering.offer(second)
        elif (2, False) in at_work:
            steering.end(StoppingError())
        at_work.add((progress.volume_wanted, bool(working)))

    assert take_up(place, left, told, steering).state is State.STREAMING
    assert at_work == {(0, True), (2, False)}


def test_staging_of_an_import_under_way_is_kept_however_long_it_waits(
    place: Workplace, tmp_path: Path, trust: Trust
) -> None:
    first, _ = media(tmp_path, trust, 5)
    left = leave(place, first)
    place.ledger._db.execute("UPDATE staged SET changed_ns = changed_ns - 31 * 24 * 3600 * 1000000000")
    place.ledger.close()
    again = open_place(tmp_path / "home")
    assert _head(again, left).exists()
    assert again.store.staged_bytes() > CHUNK
    again.ledger.close()
