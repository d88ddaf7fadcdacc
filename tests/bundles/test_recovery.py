"""After a release key was stolen: the thief's high sequence is revoked, and releases go on from a minimum."""

import secrets
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bundles.importer.importing import import_bundle
from bundles.importer.removal import remove_version
from bundles.importer.workplace import Workplace
from bundles.pipeline import Progress
from bundles.trust import revocation
from bundles.trust.bundle import write_trust_bundle
from bundles.trust.signers import new_signer
from tests.bundles.making import INSPECTOR, Trust, make_bundle, make_root

REVOCATION = new_signer("ed25519")
STOLEN = 2**40


@pytest.fixture
def keys(trust: Trust) -> Trust:
    roles = {"root": [trust.root_key], "release": [trust.release_key], "publisher": [trust.publisher_key]}
    return replace(trust, root=make_root(1, {**roles, "revocation": [REVOCATION]}))


@pytest.fixture
def place(tmp_path: Path, keys: Trust) -> Iterator[Workplace]:
    (tmp_path / "home" / "trust").mkdir(parents=True)
    (tmp_path / "home" / "trust" / "1.root.json").write_bytes(keys.root.raw)
    place = Workplace.open(tmp_path / "home", INSPECTOR)
    yield place
    place.ledger.close()


def _import(place: Workplace, path: Path) -> Progress:
    return import_bundle(place, secrets.token_hex(4), path, lambda _: None)


def test_releases_go_on_from_the_minimum_and_never_go_back_from_there(
    tmp_path: Path, keys: Trust, place: Workplace
) -> None:
    eighth, ninth, stolen = (make_bundle(tmp_path / f"{n}.bundle", keys, n) for n in (8, 9, STOLEN))
    taken = _import(place, stolen)
    assert taken.state == "committed"
    assert _import(place, eighth).reason == "ROLLBACK_REFUSED"
    now = datetime.now(UTC)
    document = revocation.make(
        1, now, now + timedelta(days=9), manifests=[taken.model_digest], minimum_sequences={"tiny": 8}
    )
    write_trust_bundle(tmp_path / "t", [keys.root], revocation.sign(document, [REVOCATION]))
    assert _import(place, tmp_path / "t").state == "committed"
    assert _import(place, stolen).reason == "MANIFEST_REVOKED"
    assert _import(place, ninth).state == "committed"
    assert place.floors().models["tiny"].sequence == 9
    assert _import(place, eighth).reason == "ROLLBACK_REFUSED"


def test_a_release_with_the_sequence_of_a_revoked_one_waits_until_that_is_removed(
    tmp_path: Path, keys: Trust, place: Workplace
) -> None:
    taken = _import(place, make_bundle(tmp_path / "stolen", keys, 9))
    now = datetime.now(UTC)
    document = revocation.make(
        1, now, now + timedelta(days=9), manifests=[taken.model_digest], minimum_sequences={"tiny": 9}
    )
    write_trust_bundle(tmp_path / "t", [keys.root], revocation.sign(document, [REVOCATION]))
    assert _import(place, tmp_path / "t").state == "committed"
    genuine = make_bundle(tmp_path / "genuine", keys, 9, version="1.0.9.1")
    refused = _import(place, genuine)
    assert refused.reason == "SEQUENCE_REUSED"
    assert "tiny@1.0.9 in the store" in refused.message
    assert [version.reference for version in place.ledger.versions()] == ["tiny@1.0.9"]
    remove_version(place, "tiny@1.0.9")
    assert _import(place, genuine).state == "committed"
    assert place.floors().models["tiny"].model_digest == place.ledger.versions()[0].model_digest
