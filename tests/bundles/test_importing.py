"""Importing: a bundle ends in the store whole, or leaves it as it was; nothing goes back."""

import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bundles.builder import Signing, build, sign
from bundles.content.files import ModelFiles
from bundles.content.inspector import Inspector, Verdict
from bundles.format.errors import BundleError
from bundles.format.manifest import Kind
from bundles.importer import floors
from bundles.importer.importing import import_bundle
from bundles.importer.ledger import Ledger
from bundles.importer.workplace import Workplace
from bundles.pipeline import Progress, State
from bundles.trust import dsse
from bundles.trust.signers import new_signer
from tests.bundles.making import (
    INSPECTOR,
    Trust,
    forge_manifest,
    make_bundle,
    make_model,
    make_release,
    make_root,
    members_of,
    replace_member,
    sha256,
)


@pytest.fixture
def home(tmp_path: Path, trust: Trust) -> Path:
    home = tmp_path / "home"
    (home / "trust").mkdir(parents=True)
    (home / "trust" / "1.root.json").write_bytes(trust.root.raw)
    return home


@pytest.fixture
def place(home: Path) -> Iterator[Workplace]:
    place = Workplace.open(home, INSPECTOR)
    yield place
    place.ledger.close()


def _import(place: Workplace, path: Path, told: list[Progress] | None = None) -> Progress:
    return import_bundle(place, secrets.token_hex(4), path, (told if told is not None else []).append)


def _stored(place: Workplace) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in place.store.root.glob("sha256/*/*")}


def test_an_imported_bundle_is_in_the_store_under_its_digests(place: Workplace, bundle: Path, home: Path) -> None:
    told: list[Progress] = []
    ended = _import(place, bundle, told)
    assert (ended.state, ended.model_version) == (State.COMMITTED, "tiny@1.0.1")
    assert list(dict.fromkeys(p.state for p in told)) == list(State)[:6]
    stored = _stored(place)
    assert all(sha256(content) == name for name, content in stored.items())
    version = place.ledger.find("tiny")
    assert version is not None
    assert version.model_digest == ended.model_digest
    assert {str(f["sha256"]) for f in version.files} <= stored.keys()
    assert stored[version.evidence["oms.sig"]] == dict(members_of(bundle))["oms.sig"]
    assert all(p.stat().st_mode & 0o777 == 0o444 for p in place.store.root.glob("sha256/*/*"))
    assert list((home / "store" / "staging").iterdir()) == []
    assert (
        json.loads((home / "store" / "models" / "tiny" / "1.json").read_text())["model_digest"]
        == ended.model_digest
    )
    assert [place.ledger.find(r) for r in ("tiny@1.0.1", ended.model_digest, "tony")] == [version, version, None]


def test_every_state_is_in_the_outbox_until_it_is_acknowledged(place: Workplace, bundle: Path) -> None:
    _import(place, bundle)
    entries = place.ledger.outbox(0)
    assert [entry.state for entry in entries] == list(State)[:6]
    assert [entry.sequence for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert entries[-1].model_version == "tiny@1.0.1"
    place.ledger.acknowledge(4)
    assert [entry.sequence for entry in place.ledger.outbox(0)] == [5, 6]
    place.ledger.acknowledge(6)
    bundle.unlink()
    _import(place, bundle)
    assert [(e.sequence, e.reason) for e in place.ledger.outbox(0)] == [(7, ""), (8, "SOURCE_UNREADABLE")]


def test_the_same_bundle_again_is_committed_without_reading_its_payload(place: Workplace, bundle: Path) -> None:
    first = _import(place, bundle)
    told: list[Progress] = []
    again = _import(place, bundle, told)
    assert (again.state, again.model_digest) == (State.COMMITTED, first.model_digest)
    assert State.STREAMING not in [p.state for p in told]
    assert len(place.ledger.versions()) == 1


def test_a_damaged_store_is_filled_again_from_the_same_bundle(place: Workplace, bundle: Path) -> None:
    _import(place, bundle)
    before = _stored(place)
    version = place.ledger.versions()[0]
    place.store.path_of(str(version.files[0]["sha256"])).unlink()
    assert _import(place, bundle).state is State.COMMITTED
    assert _stored(place) == before
    assert place.ledger.versions() == (version,)


def test_a_bit_that_flipped_in_the_store_is_mended_by_importing_the_bundle_again(
    place: Workplace, bundle: Path
) -> None:
    _import(place, bundle)
    before, version = _stored(place), place.ledger.versions()[0]
    for digest in (str(version.files[0]["sha256"]), version.evidence["manifest.dsse.json"]):
        path = place.store.path_of(digest)
        path.chmod(0o600)
        path.write_bytes(b"!" + path.read_bytes()[1:])
        assert _stored(place) != before
        told: list[Progress] = []
        assert _import(place, bundle, told).state is State.COMMITTED
        assert State.STREAMING in [p.state for p in told]
        assert _stored(place) == before
    assert place.ledger.versions() == (version,)


def test_reading_the_store_before_an_import_can_be_interrupted(place: Workplace, bundle: Path) -> None:
    _import(place, bundle)

    def told(progress: Progress) -> None:
        if progress.state is State.SIGNED and progress.bytes_done:
            raise BundleError("INTERRUPTED", "the importer is stopping")

    assert import_bundle(place, "again", bundle, told).reason == "INTERRUPTED"


def test_a_damaged_store_is_not_mended_from_a_damaged_bundle(place: Workplace, bundle: Path) -> None:
    _import(place, bundle)
    path = place.store.path_of(str(place.ledger.versions()[0].files[0]["sha256"]))
    path.unlink()
    chunk = next(name for name, _ in members_of(bundle) if name.startswith("c/"))
    replace_member(bundle, chunk, lambda raw: b"!" + raw[1:])
    assert _import(place, bundle).reason == "CHUNK_DIGEST"
    assert not path.exists()


def test_more_signatures_of_one_manifest_are_kept_when_the_store_is_mended(
    place: Workplace, bundle: Path, trust: Trust
) -> None:
    _import(place, bundle)
    version = place.ledger.versions()[0]
    sign(bundle, Signing(trust.root, (trust.release_key,)))
    replace_member(
        bundle,
        "manifest.dsse.json",
        lambda raw: dsse.parse(raw, "it").signed_by(new_signer("ed25519")).encode(),
    )
    place.store.path_of(version.evidence["manifest.dsse.json"]).unlink()
    assert _import(place, bundle).state is State.COMMITTED
    told: list[Progress] = []
    _import(place, bundle, told)
    assert State.STREAMING not in [p.state for p in told]


def test_an_import_that_stumbles_over_a_defect_is_recorded(place: Workplace, bundle: Path, home: Path) -> None:
    class Defective(Inspector):
        def inspect(self, files: ModelFiles, kind: Kind) -> Verdict:
            raise ValueError("nobody foresaw this")

    told: list[Progress] = []
    ended = _import(replace(place, inspector=Defective()), bundle, told)
    assert (ended.state, ended.reason, told[-1]) == (State.REJECTED, "INTERNAL", ended)
    assert "nobody" not in ended.message
    entry = place.ledger.outbox(0)[-1]
    assert (entry.state, entry.reason, entry.model_version) == (State.REJECTED, "INTERNAL", "tiny@1.0.1")


def test_what_fails_after_the_commit_does_not_take_it_back(
    place: Workplace, bundle: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(floors, "save", broken)
    assert _import(place, bundle).state is State.COMMITTED
    assert place.ledger.outbox(0)[-1].state is State.COMMITTED
    monkeypatch.undo()
    place.ledger.close()
    again = Workplace.open(home, INSPECTOR)
    assert floors.load(home / "trust" / "floors.json").models["tiny"].sequence == 1
    again.ledger.close()


def test_a_bundle_for_this_appliance_is_imported_and_one_for_another_is_not(
    place: Workplace, home: Path, tmp_path: Path, trust: Trust
) -> None:
    path = make_bundle(tmp_path / "b", trust, targets=("ward-3",))
    assert _import(place, path).reason == "WRONG_TARGET", "an appliance without a name is nobody's target"
    place.ledger.close()
    for name, expected in (("ward-4", State.REJECTED), ("ward-3", State.COMMITTED)):
        (home / "trust" / "site").write_text(f"{name}\n")
        named = Workplace.open(home, INSPECTOR)
        assert _import(named, path).state is expected
        named.ledger.close()


def test_a_damaged_bundle_leaves_nothing_that_could_be_loaded(place: Workplace, bundle: Path, home: Path) -> None:
    chunk = [name for name, _ in members_of(bundle) if name.startswith("c/")][-1]
    replace_member(bundle, chunk, lambda raw: b"!" + raw[1:])
    told: list[Progress] = []
    ended = _import(place, bundle, told)
    assert (ended.state, ended.reason, told[-1]) == (State.REJECTED, "CHUNK_DIGEST", ended)
    assert _stored(place) == {}
    assert place.ledger.versions() == ()
    assert place.ledger.outbox(0)[-1].reason == "CHUNK_DIGEST"
    assert floors.load(home / "trust" / "floors.json").models == {}


def test_an_unknown_architecture_is_refused_with_the_inspector_s_code(
    place: Workplace, tmp_path: Path, trust: Trust
) -> None:
    path = make_bundle(tmp_path / "b", trust)
    model = make_model(tmp_path / "m")
    (model / "config.json").write_text('{"architectures": ["x"], "exit": 1}')
    with pytest.raises(BundleError, match="INSPECT_FAILED"):
        build(make_release(), model, tmp_path / "c", inspector=INSPECTOR)
    forge_manifest(path, trust, lambda m: m["model"].update(architecture="GptNeoXForCausalLM"))
    assert _import(place, path).reason == "MODEL_DIFFERS"


def test_releases_only_go_forward(place: Workplace, tmp_path: Path, trust: Trust, home: Path) -> None:
    old, new = (make_bundle(tmp_path / f"{n}.bundle", trust, sequence=n) for n in (1, 2))
    other = make_bundle(
        tmp_path / "other.bundle", trust, sequence=2, issued_at=datetime.now(UTC) - timedelta(days=1)
    )
    renamed = make_bundle(tmp_path / "renamed.bundle", trust, sequence=3, version="1.0.2")
    assert _import(place, new).state is State.COMMITTED
    assert _import(place, old).reason == "ROLLBACK_REFUSED"
    assert _import(place, other).reason == "SEQUENCE_REUSED"
    assert _import(place, renamed).reason == "VERSION_REUSED"
    assert [v.reference for v in place.ledger.versions()] == ["tiny@1.0.2"]
    (home / "store" / "store.db").rename(tmp_path / "lost.db")
    restored = Workplace.open(home, INSPECTOR)
    assert _import(restored, old).reason == "ROLLBACK_REFUSED", "floors outlive the database"
    restored.ledger.close()


def test_a_clock_set_back_is_noticed(place: Workplace, bundle: Path, tmp_path: Path, trust: Trust) -> None:
    _import(place, bundle)
    back = Workplace(
        place.trust, place.store, place.ledger, INSPECTOR, now=lambda: datetime.now(UTC) - timedelta(days=3)
    )
    path = make_bundle(tmp_path / "n", trust, sequence=2, issued_at=datetime.now(UTC) - timedelta(days=9))
    assert _import(back, path).reason == "CLOCK_BEHIND"


def test_damaged_floors_stop_imports(place: Workplace, bundle: Path, home: Path) -> None:
    (home / "trust" / "floors.json").write_text("{}")
    assert _import(place, bundle).reason == "FLOORS_DAMAGED"


def test_floors_survive_being_written(tmp_path: Path) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    held = floors.Floors({"a": floors.Floor(3, "d")}, moment, root=2, revocation=7, revocation_role="r")
    held = held.join(floors.Floors({"a": floors.Floor(2, "e")}, moment - timedelta(days=1), root=1, revocation=6))
    floors.save(tmp_path / "f", held)
    assert floors.load(tmp_path / "f") == held
    assert (held.models, held.clock, held.root) == ({"a": floors.Floor(3, "d")}, moment, 2)


def test_a_home_without_a_root_and_a_full_store_are_named(
    place: Workplace, bundle: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((512, 512, 9, 9, 9, 9, 9, 9, 0, 255)))
    assert _import(place, bundle).reason == "STORE_SPACE"
    (home / "trust" / "1.root.json").unlink()
    assert _import(place, bundle).reason == "ROOT_MISSING"


def test_a_disk_that_fails_is_a_refusal_and_leaves_nothing(
    place: Workplace, bundle: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert _import(place, bundle).reason == "STORE_SPACE"
    assert _stored(place) == {}
    assert list((home / "store" / "staging").iterdir()) == []


def test_a_newer_root_is_kept_once_its_bundle_is_committed(place: Workplace, tmp_path: Path, trust: Trust) -> None:
    release = new_signer("ed25519")
    second = make_root(2, {"root": [trust.root_key], "release": [release], "publisher": [trust.publisher_key]})
    path = tmp_path / "b"
    build(make_release(), make_model(tmp_path / "m"), path, inspector=INSPECTOR)
    sign(path, Signing(second, (release,), trust.publisher_key))
    assert _import(place, path).state is State.COMMITTED
    assert (place.trust / "2.root.json").read_bytes() == second.raw
    old_keys = make_bundle(tmp_path / "old", trust, sequence=2)
    assert _import(place, old_keys).reason == "SIGNATURE_UNKNOWN_KEY"


def test_what_an_import_that_died_left_is_swept_but_for_what_it_goes_on_from(place: Workplace, home: Path) -> None:
    place.ledger.begin("dead", Path("/x"))
    place.ledger.change("dead", Progress(State.SIGNED, model_digest="known"))
    for name in ("dead", "known"):
        (home / "store" / "staging" / name).mkdir()
        (home / "store" / "staging" / name / "0").write_bytes(b"half")
        (home / "store" / "staging" / name / "head").write_bytes(b"kept")
    (home / "store" / "models" / "ghost").mkdir()
    (home / "store" / "models" / "ghost" / "1.json").write_text("{}")
    place.ledger.close()
    again = Workplace.open(home, INSPECTOR)
    assert [left.import_id for left in again.ledger.unfinished()] == ["dead"]
    assert [entry.state for entry in again.ledger.outbox(0)] == [State.QUARANTINE, State.SIGNED]
    assert list((home / "store" / "staging").rglob("*")) == [
        home / "store" / "staging" / "known",
        home / "store" / "staging" / "known" / "head",
    ]
    assert list((home / "store" / "models").glob("*/*")) == []
    again.ledger.close()


def test_a_database_of_the_version_before_is_read_on(place: Workplace, home: Path, bundle: Path) -> None:
    _import(place, bundle)
    place.ledger.begin("left", bundle)
    place.ledger.close()
    with closing(sqlite3.connect(home / "store" / "store.db")) as before:
        before.executescript(
            "ALTER TABLE import DROP COLUMN working; ALTER TABLE import DROP COLUMN deaths;"
            "ALTER TABLE import DROP COLUMN offered; PRAGMA user_version=2"
        )
    again = Workplace.open(home, INSPECTOR)
    assert [version.sequence for version in again.ledger.versions()] == [1]
    assert [left.import_id for left in again.ledger.unfinished()] == ["left"]
    again.ledger.close()


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "db").execute("PRAGMA user_version=99").connection.close()
    with pytest.raises(BundleError, match="LEDGER_NEWER"):
        Ledger(tmp_path / "db")


def test_the_evidence_in_the_store_still_verifies(place: Workplace, bundle: Path, trust: Trust) -> None:
    ended = _import(place, bundle)
    version = place.ledger.find(ended.model_digest)
    assert version is not None
    envelope = dsse.parse(place.store.path_of(version.evidence["manifest.dsse.json"]).read_bytes(), "it")
    assert sha256(envelope.payload) == version.model_digest
    assert envelope.valid_keys(trust.root.role_keys("release")) == version.signers[:1]
