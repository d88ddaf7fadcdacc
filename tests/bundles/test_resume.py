"""Resuming: what is verified and durable is not read again; volumes and deltas; one import of a model at once."""

import shutil
import threading
from pathlib import Path

import pytest

from bundles.format.errors import BundleError
from bundles.importer.removal import remove_version
from bundles.importer.steering import Steering
from bundles.importer.workplace import Allowed, Workplace
from bundles.pipeline import Progress, State
from tests.bundles.making import (
    CHUNK,
    Trust,
    forge_manifest,
    make_bundle,
    make_delta,
    manifest_of,
    members_of,
    replace_member,
    split,
    unpack,
)
from tests.bundles.stores import (
    bring,
    counted,
    damaged_names,
    make_home,
    open_place,
    snapshot,
    spoil,
    stored,
)


@pytest.fixture
def place(tmp_path: Path, trust: Trust) -> Workplace:
    return open_place(make_home(tmp_path / "home", trust))


class StopAt(list[Progress]):
    """Ends an import once so many bytes are verified."""

    def __init__(self, steering: Steering, bytes_done: int) -> None:
        self._steering, self._bytes_done = steering, bytes_done

    def append(self, progress: Progress) -> None:
        super().append(progress)
        if progress.state is State.STREAMING and progress.bytes_done >= self._bytes_done:
            self._steering.end(BundleError("IMPORT_CANCELLED", "an operator ended it"))


def interrupt(place: Workplace, path: Path, bytes_done: int) -> Progress:
    """Import until so many bytes are verified, then cancel."""
    steering = Steering()
    ended = bring(place, path, StopAt(steering, bytes_done), steering)
    assert ended.reason == "IMPORT_CANCELLED"
    return ended


def _chunks_size(path: Path) -> int:
    return sum(len(content) for name, content in members_of(path) if name.startswith("c/"))


def _head_size(path: Path) -> int:
    """Bytes of a bundle that are no chunk: headers, documents, padding."""
    return path.stat().st_size - _chunks_size(path)


def test_a_resumed_import_reads_from_the_medium_only_what_was_not_recorded_and_ends_the_same(
    place: Workplace, bundle: Path, tmp_path: Path, trust: Trust
) -> None:
    whole = open_place(make_home(tmp_path / "other", trust))
    bring(whole, bundle)
    interrupt(place, bundle, 9000)
    staged = sum(place.ledger.staged(place.ledger.ended()[0].progress.model_digest).values())
    assert staged >= 2 * CHUNK
    told: list[Progress] = []
    with counted() as media:
        ended = bring(place, bundle, told)
    assert ended.state is State.COMMITTED
    padding = 512 * len(members_of(bundle))
    assert media.bytes_read <= _head_size(bundle) + _chunks_size(bundle) - staged + padding
    assert media.bytes_read < bundle.stat().st_size - staged + padding
    assert ended.bytes_reused == staged
    assert ended.bytes_done == ended.bytes_total
    assert stored(place) == stored(whole)
    assert list((place.store.root / "staging").iterdir()) == []


def test_of_what_is_staged_only_the_partly_written_file_is_hashed_again(place: Workplace, bundle: Path) -> None:
    ended = interrupt(place, bundle, 9000)
    sizes = [file.size for file in manifest_of(bundle).files]
    staged = place.ledger.staged(ended.model_digest)
    whole = sum(size for at, size in staged.items() if size == sizes[at])
    assert 0 < whole < sum(staged.values())
    told: list[Progress] = []
    bring(place, bundle, told)
    assert told[-1].bytes_hashed == told[-1].bytes_total - whole


def test_what_staging_lost_comes_from_the_medium_again(place: Workplace, bundle: Path) -> None:
    ended = interrupt(place, bundle, 9000)
    folder = place.store.root / "staging" / ended.model_digest
    largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[CHUNK] ^= 1
    largest.write_bytes(raw)
    assert bring(place, bundle).state is State.COMMITTED
    assert damaged_names(place) == []


def test_staging_that_is_gone_is_no_staging(place: Workplace, bundle: Path) -> None:
    ended = interrupt(place, bundle, 9000)
    shutil.rmtree(place.store.root / "staging" / ended.model_digest)
    again = bring(place, bundle)
    assert (again.state, again.bytes_reused) == (State.COMMITTED, 0)


def test_a_medium_that_changed_between_is_refused(
    place: Workplace, tmp_path: Path, trust: Trust, bundle: Path
) -> None:
    interrupt(place, bundle, 5000)
    chunks = [name for name, _ in members_of(bundle) if name.startswith("c/")]
    cut = shutil.copy(bundle, tmp_path / "cut")
    Path(cut).write_bytes(bundle.read_bytes()[: -2 * CHUNK])
    assert bring(place, Path(cut)).reason in ("CONTAINER_TRUNCATED", "CONTAINER_NO_END")
    other = Path(shutil.copy(bundle, tmp_path / "other"))
    replace_member(other, chunks[0], lambda raw: raw + b"!")
    assert bring(place, other).reason == "CONTAINER_MEMBER_SIZE"
    replace_member(bundle, chunks[-1], lambda raw: bytes([raw[0] ^ 1]) + raw[1:])
    assert bring(place, bundle).reason == "CHUNK_DIGEST"
    assert stored(place) == {}


def test_staging_is_kept_over_a_restart_and_thrown_away_after_thirty_days(
    place: Workplace, bundle: Path, tmp_path: Path
) -> None:
    ended = interrupt(place, bundle, 9000)
    place.ledger.close()
    again = open_place(tmp_path / "home")
    assert again.store.staged_bytes() > 2 * CHUNK
    again.ledger._db.execute("UPDATE staged SET changed_ns = changed_ns - 31 * 24 * 3600 * 1000000000")
    again.sweep()
    assert again.store.staged_bytes() == 0
    assert again.ledger.staged(ended.model_digest) == {}


def test_what_is_staged_of_a_model_can_be_removed_by_its_digest(place: Workplace, bundle: Path) -> None:
    ended = interrupt(place, bundle, 9000)
    staged = place.store.staged_bytes()
    assert remove_version(place, ended.model_digest) == ("", staged)
    assert list((place.store.root / "staging").iterdir()) == []
    with pytest.raises(BundleError, match="MODEL_VERSION_NOT_FOUND"):
        remove_version(place, ended.model_digest)


def test_a_model_whose_files_are_refused_leaves_no_staging(place: Workplace, tmp_path: Path, trust: Trust) -> None:
    path = make_bundle(tmp_path / "b", trust)
    forge_manifest(path, trust, lambda m: m["model"].update(architecture="GptNeoXForCausalLM"))
    assert bring(place, path).reason == "MODEL_DIFFERS"
    assert list((place.store.root / "staging").iterdir()) == []
    assert place.ledger.stagings() == {}


class Waits(list[Progress]):
    """Tells when an import waits for a volume."""

    def __init__(self) -> None:
        self.waiting = threading.Event()
        self.refused = threading.Event()

    def append(self, progress: Progress) -> None:
        super().append(progress)
        if progress.volume_wanted:
            self.waiting.set()
        if progress.volume_refused:
            self.refused.set()


def in_background(place: Workplace, path: Path) -> tuple[threading.Thread, Waits, Steering]:
    """An import that waits for a volume; its thread, what it tells, and how it is told."""
    told, steering = Waits(), Steering()
    thread = threading.Thread(target=bring, args=(place, path, told, steering))
    thread.start()
    assert told.waiting.wait(60)
    return thread, told, steering


def _volumes(tmp_path: Path, trust: Trust, sequence: int = 1) -> tuple[Path, Path, Path]:
    """A bundle's three volumes, each on a medium of its own."""
    made = tmp_path / f"made{sequence}"
    made.mkdir()
    first = split(make_bundle(made / "b.bundle", trust, sequence=sequence), trust, 5, 1)
    media = []
    for index in (1, 2, 3):
        medium = tmp_path / f"medium{sequence}-{index}"
        medium.mkdir()
        media.append(Path(shutil.move(first.with_suffix(f".{index:03}"), medium)))
    return media[0], media[1], media[2]


def test_volumes_that_lie_beside_the_first_are_taken_by_themselves(
    place: Workplace, bundle: Path, trust: Trust
) -> None:
    ended = bring(place, split(bundle, trust, 2, 3))
    assert (ended.state, ended.volumes, ended.volume_wanted) == (State.COMMITTED, 3, 0)
    assert damaged_names(place) == []


def test_an_import_waits_for_its_volumes_and_refuses_the_wrong_ones(
    place: Workplace, tmp_path: Path, trust: Trust, bundle: Path
) -> None:
    first, second, third = _volumes(tmp_path, trust)
    _, of_another, _ = _volumes(tmp_path, trust, sequence=2)
    thread, told, steering = in_background(place, first)
    assert (told[-1].state, told[-1].volume_wanted, told[-1].bytes_per_second) == (State.STREAMING, 2, 0)
    for wrong, code in (
        (third, "VOLUME_ORDER"),
        (of_another, "VOLUME_MIXED"),
        (tmp_path / "nothing", "SOURCE_UNREADABLE"),
    ):
        told.refused.clear()
        with pytest.raises(BundleError, match=code):
            steering.offer(wrong)
        assert told.refused.wait(60)
        assert told[-1].volume_refused.startswith(code)
    told.waiting.clear()
    steering.offer(second)
    assert told.waiting.wait(60)
    while told[-1].volume_wanted != 3:
        assert thread.is_alive()
    steering.offer(third)
    thread.join(60)
    assert told[-1].state is State.COMMITTED
    assert told[-1].volume_refused == ""
    with pytest.raises(BundleError, match="VOLUME_NOT_WANTED"):
        steering.offer(third)
    assert damaged_names(place) == []


def test_while_an_import_waits_others_are_done_and_the_same_model_is_refused(
    place: Workplace, tmp_path: Path, trust: Trust, bundle: Path
) -> None:
    first, _, _ = _volumes(tmp_path, trust)
    thread, told, steering = in_background(place, first)
    same = bring(place, first)
    assert same.reason == "IMPORT_RUNNING"
    newer = make_bundle(tmp_path / "newer", trust, sequence=2)
    assert bring(place, newer).state is State.COMMITTED
    steering.end(BundleError("IMPORT_CANCELLED", "an operator ended it"))
    thread.join(60)
    assert told[-1].reason == "IMPORT_CANCELLED"


def test_an_import_that_waited_while_a_newer_release_came_is_refused(
    place: Workplace, tmp_path: Path, trust: Trust
) -> None:
    first, second, third = _volumes(tmp_path, trust)
    thread, told, steering = in_background(place, first)
    assert bring(place, make_bundle(tmp_path / "newer", trust, sequence=2)).state is State.COMMITTED
    steering.offer(second)
    while told[-1].volume_wanted != 3:
        assert thread.is_alive()
    steering.offer(third)
    thread.join(60)
    assert told[-1].reason == "ROLLBACK_REFUSED"
    assert [version.sequence for version in place.ledger.versions()] == [2]


def test_cancelled_while_it_waits_it_goes_on_from_the_volume_it_had(
    place: Workplace, tmp_path: Path, trust: Trust
) -> None:
    first, second, third = _volumes(tmp_path, trust)
    thread, _, steering = in_background(place, first)
    steering.end(BundleError("IMPORT_CANCELLED", "an operator ended it"))
    thread.join(60)
    place.ledger.close()
    again = open_place(tmp_path / "home")
    for volume in (second, third):
        shutil.move(volume, first.parent)
    with counted() as media:
        ended = bring(again, first)
    assert (ended.state, ended.bytes_reused > CHUNK) == (State.COMMITTED, True)
    assert media.bytes_read <= _head_size(first) + 512 * len(members_of(first))


def test_a_bundle_as_a_folder_is_imported_and_resumed_like_a_file(
    place: Workplace, bundle: Path, tmp_path: Path
) -> None:
    folder = unpack(bundle, tmp_path / "folder")
    interrupt(place, folder, 9000)
    assert bring(place, folder).state is State.COMMITTED
    assert damaged_names(place) == []


def test_a_delta_takes_from_the_store_what_its_base_has(
    place: Workplace, tmp_path: Path, trust: Trust, bundle: Path
) -> None:
    whole = make_bundle(tmp_path / "whole", trust, sequence=2)
    delta = make_delta(Path(shutil.copy(whole, tmp_path / "delta")), bundle, trust)
    assert _chunks_size(delta) < _chunks_size(whole)
    assert bring(place, delta).reason == "BASE_ABSENT"
    bring(place, bundle)
    ended = bring(place, delta)
    assert (ended.state, ended.reason) == (State.COMMITTED, "")
    assert ended.bytes_reused > 0
    assert damaged_names(place) == []


def test_a_chunk_of_a_damaged_base_is_refused_and_named(place: Workplace, tmp_path: Path, trust: Trust) -> None:
    tail = b"\0" * (2 * CHUNK)

    def extend(model: Path) -> None:
        (model / "LICENSE").write_text("x" * 3 * CHUNK + model.parent.name + str(len(tail)))

    base = make_bundle(tmp_path / "base", trust, prepare=extend)
    bring(place, base)

    def change(model: Path) -> None:
        (model / "LICENSE").write_text("x" * 3 * CHUNK + "another end")

    delta = make_delta(make_bundle(tmp_path / "delta", trust, sequence=2, prepare=change), base, trust)
    licence = next(f for f in place.ledger.versions()[0].files if f["path"] == "LICENSE")
    spoil(place.store.path_of(str(licence["sha256"])))
    assert bring(place, delta).reason == "BASE_DAMAGED"
    assert bring(place, base).state is State.COMMITTED
    assert bring(place, delta).state is State.COMMITTED
    assert damaged_names(place) == []


def test_files_that_the_store_has_are_hashed_there_and_neither_read_nor_written(
    place: Workplace, tmp_path: Path, trust: Trust, bundle: Path
) -> None:
    bring(place, bundle)
    before = {path: path.stat().st_ino for path in place.store.root.glob("sha256/*/*")}
    second = make_bundle(tmp_path / "second", trust, sequence=2)
    with counted() as media:
        ended = bring(place, second)
    weights = next(f for f in place.ledger.versions()[1].files if f["path"] == "model.safetensors")
    assert ended.bytes_reused == ended.bytes_total - int(weights["size"])
    assert media.bytes_read < second.stat().st_size
    assert {path: path.stat().st_ino for path in before} == before
    assert all(path.stat().st_nlink == 1 for path in place.store.root.glob("sha256/*/*"))


def test_a_shared_file_that_rotted_comes_from_the_medium(
    place: Workplace, tmp_path: Path, trust: Trust, bundle: Path
) -> None:
    bring(place, bundle)
    shared = next(f for f in place.ledger.versions()[0].files if f["path"] == "tokenizer.json")
    spoil(place.store.path_of(str(shared["sha256"])))
    assert bring(place, make_bundle(tmp_path / "second", trust, sequence=2)).state is State.COMMITTED
    assert damaged_names(place) == []


def test_a_quota_counts_what_is_stored_and_staged(tmp_path: Path, trust: Trust, bundle: Path) -> None:
    home = make_home(tmp_path / "home", trust)
    small = open_place(home, allowed=Allowed(quota=10_000))
    ended = bring(small, bundle)
    assert ended.reason == "STORE_QUOTA"
    assert snapshot(home)["trust/1.root.json"] == trust.root.raw
    assert list((home / "store" / "staging").iterdir()) == []
    small.ledger.close()
    enough = open_place(home, allowed=Allowed(quota=40_000))
    assert bring(enough, bundle).state is State.COMMITTED
    second = make_bundle(tmp_path / "second", trust, sequence=2)
    third = make_bundle(tmp_path / "third", trust, sequence=3)
    assert bring(enough, second).state is State.COMMITTED
    assert bring(enough, third).reason == "STORE_QUOTA"
    remove_version(enough, "tiny@1.0.1")
    assert bring(enough, third).state is State.COMMITTED
    enough.ledger.close()


def test_a_licence_that_the_site_does_not_allow_is_refused(tmp_path: Path, trust: Trust) -> None:
    path = make_bundle(tmp_path / "b", trust, licence="MIT")
    home = make_home(tmp_path / "home", trust)
    strict = open_place(home, allowed=Allowed(licences=frozenset({"Apache-2.0"})))
    assert bring(strict, path).reason == "LICENCE_NOT_ALLOWED"
    strict.ledger.close()
    allowing = open_place(home, allowed=Allowed(licences=frozenset({"Apache-2.0", "MIT"})))
    assert bring(allowing, path).state is State.COMMITTED
    allowing.ledger.close()


def test_an_inspector_that_gives_no_verdict_costs_no_staging(
    place: Workplace, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tired(*_: object) -> None:
        raise BundleError("INSPECT_TIMEOUT", "engine-inspect took too long")

    monkeypatch.setattr(type(place.inspector), "inspect", tired)
    assert bring(place, bundle).reason == "INSPECT_TIMEOUT"
    monkeypatch.undo()
    ended = bring(place, bundle)
    assert (ended.state, ended.bytes_reused) == (State.COMMITTED, ended.bytes_total)
