"""Trust in the importer: trust bundles, what they revoke, approvals, floors that no backup lowers, warnings."""

import os
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bundles.builder import Signing, build, sign
from bundles.format.errors import BundleError
from bundles.format.members import trust_members
from bundles.importer import floors, views
from bundles.importer.standing import standing
from bundles.importer.workplace import Workplace
from bundles.pipeline import Progress, State
from bundles.trust import dsse, revocation
from bundles.trust.approval import approve, verify_approval
from bundles.trust.roots import Root
from bundles.trust.signers import PrivateSigner, new_signer
from tests.bundles.making import INSPECTOR, Trust, make_model, make_release, make_root, write_members
from tests.bundles.stores import NOW, bring, make_home, open_place


class Site:
    """Keys of every role, their root, and what they sign."""

    def __init__(self, folder: Path) -> None:
        names = ("root", "release", "publisher", "revocation", "custodian")
        schemes = {"publisher": "ecdsa-sha2-nistp384"}
        self.keys: dict[str, PrivateSigner] = {
            name: new_signer(schemes.get(name, "ed25519"))  # type: ignore[arg-type]  # literals of keys.Scheme
            for name in names
        }
        self.folder = folder
        self.root = self.make_root(1)

    def make_root(self, version: int, **others: PrivateSigner) -> Root:
        held = {**self.keys, **others}
        signed_by = [held["root"]]
        return make_root(version, {name: [key] for name, key in held.items()}, signed_by=signed_by)

    def bundle(self, sequence: int = 1) -> Path:
        path = self.folder / f"{sequence}.bundle"
        build(
            make_release(sequence),
            make_model(self.folder / f"model{sequence}", sequence),
            path,
            inspector=INSPECTOR,
        )
        sign(path, Signing(self.root, (self.keys["release"],), self.keys["publisher"]))
        return path

    def revocations(self, sequence: int, key: PrivateSigner | None = None, **fields: Iterable[str]) -> bytes:
        issued = NOW - timedelta(days=1)
        document = revocation.make(
            sequence,
            issued,
            issued + timedelta(days=60),
            **fields,  # type: ignore[arg-type]  # keys or manifests
        )
        envelope = dsse.Envelope(document.encode(), revocation.PAYLOAD_TYPE)
        return envelope.signed_by(key or self.keys["revocation"]).encode()

    def trust_bundle(self, name: str, roots: tuple[Root, ...] = (), revocations: bytes | None = None) -> Path:
        path = self.folder / name
        write_members(path, [*trust_members([(root.version, root.raw) for root in roots], revocations)])
        return path


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def place(tmp_path: Path, site: Site) -> Workplace:
    home = tmp_path / "home"
    (home / "trust").mkdir(parents=True)
    (home / "trust" / "1.root.json").write_bytes(site.root.raw)
    (home / "trust" / "site").write_text("ward-3\n")
    return open_place(home)


def _trust_events(place: Workplace) -> list[str]:
    return [entry.detail for entry in place.ledger.outbox(0) if entry.event == "trust"]


def test_a_trust_bundle_brings_roots_and_revocations_and_is_one_event(place: Workplace, site: Site) -> None:
    path = site.trust_bundle("t", (site.make_root(2),), site.revocations(5))
    told: list[Progress] = []
    ended = bring(place, path, told)
    assert (ended.state, ended.kind, ended.model_version) == (State.COMMITTED, "trust", "trust@5")
    order = [State.QUARANTINE, State.SIGNED, State.POLICY, State.COMMITTED]
    assert list(dict.fromkeys(p.state for p in told)) == order
    assert [e.state for e in place.ledger.outbox(0) if e.event == "import"] == order
    assert _trust_events(place) == ["root 2, revocations 5"]
    assert bring(place, path).state is State.COMMITTED
    assert _trust_events(place) == ["root 2, revocations 5"], "what is in force already is no event"
    assert place.trust_in_force() == (2, 5)
    assert (place.floors().root, place.floors().revocation) == (2, 5)


def test_older_revocations_and_foreign_ones_are_refused(place: Workplace, site: Site) -> None:
    bring(place, site.trust_bundle("5", (), site.revocations(5)))
    assert bring(place, site.trust_bundle("4", (), site.revocations(4))).reason == "REVOCATION_ROLLBACK"
    other = site.revocations(5, keys=("0" * 64,))
    assert bring(place, site.trust_bundle("o", (), other)).reason == "REVOCATION_ROLLBACK"
    foreign = site.revocations(6, new_signer("ed25519"))
    assert bring(place, site.trust_bundle("f", (), foreign)).reason == "SIGNATURE_UNKNOWN_KEY"
    assert place.trust_in_force() == (1, 5)


def test_a_revoked_version_says_so_and_its_bundle_is_refused(place: Workplace, site: Site) -> None:
    path = site.bundle()
    bring(place, path)
    version = place.ledger.versions()[0]
    assert standing(place).revoked(version) == ""
    bring(place, site.trust_bundle("t", (), site.revocations(1, manifests=(version.model_digest,))))
    assert standing(place).revoked(version) == "MANIFEST_REVOKED"
    assert views.version_view(version, standing(place), (), whole=False).revoked == "MANIFEST_REVOKED"
    assert bring(place, path).reason == "MANIFEST_REVOKED"


def test_a_revoked_key_takes_its_versions_with_it(place: Workplace, site: Site) -> None:
    bring(place, site.bundle())
    revoked = site.revocations(1, keys=(site.keys["release"].key.keyid,))
    bring(place, site.trust_bundle("t", (), revoked))
    assert standing(place).revoked(place.ledger.versions()[0]) == "KEY_REVOKED"
    assert bring(place, site.bundle(2)).reason == "KEY_REVOKED"


def test_trust_that_a_backup_brought_back_is_refused_until_the_newer_is_here_again(
    place: Workplace, site: Site
) -> None:
    newer = site.trust_bundle("t", (site.make_root(2),), site.revocations(5))
    bring(place, newer)
    (place.trust / "2.root.json").unlink()
    (place.trust / "revocation.json").unlink()
    assert bring(place, site.bundle()).reason == "REVOCATION_ROLLBACK"
    assert "ROOT_ROLLBACK" in standing(place).warnings
    only_revocations = site.trust_bundle("r", (), site.revocations(5))
    assert bring(place, only_revocations).reason == "ROOT_ROLLBACK"
    assert bring(place, newer).state is State.COMMITTED
    assert bring(place, site.bundle(2)).state is State.COMMITTED


def test_a_stolen_revocation_key_cannot_close_the_way_with_a_high_sequence(place: Workplace, site: Site) -> None:
    bring(place, site.trust_bundle("thief", (), site.revocations(2**53 - 1)))
    fresh = new_signer("ed25519")
    second = site.make_root(2, revocation=fresh)
    assert bring(place, site.trust_bundle("t", (second,), site.revocations(6, fresh))).state is State.COMMITTED
    assert place.trust_in_force() == (2, 6)
    assert bring(place, site.trust_bundle("n", (), site.revocations(7, fresh))).state is State.COMMITTED
    assert bring(place, site.trust_bundle("o", (), site.revocations(6, fresh))).reason == "REVOCATION_ROLLBACK"


def test_a_crash_between_new_trust_and_its_record_is_made_good_at_the_next_start(
    place: Workplace, site: Site, tmp_path: Path
) -> None:
    place.keep_trust((site.make_root(2),), revocation.parse(site.revocations(5)))
    place.ledger.close()
    again = open_place(tmp_path / "home")
    assert _trust_events(again) == ["root 2, revocations 5"]
    assert floors.load(again.trust / "floors.json").revocation == 5
    again.ledger.close()


def test_custodians_are_counted_and_the_root_says_how_many_must(place: Workplace, site: Site) -> None:
    bring(place, site.bundle())
    version = place.ledger.versions()[0]
    trust = standing(place)
    assert views.version_view(version, trust, (), whole=False).approvals_required == 1
    statement = approve(version.model_digest, "ward-3", site.keys["custodian"])
    approval = verify_approval(statement, trust.root, trust.revocations, place.appliance)
    assert (approval.model_digest, approval.is_complete) == (version.model_digest, True)
    with pytest.raises(BundleError, match="WRONG_TARGET"):
        verify_approval(
            approve(version.model_digest, "ward-4", site.keys["custodian"]), trust.root, None, place.appliance
        )


def test_trust_that_needs_attention_warns(place: Workplace, site: Site) -> None:
    def warnings(days: int) -> set[str]:
        return set(standing(replace(place, now=lambda: NOW + timedelta(days=days))).warnings)

    assert warnings(0) == {"REVOCATION_MISSING"}
    bring(place, site.trust_bundle("t", (), site.revocations(1)))
    assert warnings(0) == set()
    assert warnings(46) == {"TRUST_STALE", "REVOCATION_EXPIRES_SOON"}
    assert warnings(60) == {"TRUST_STALE", "REVOCATION_EXPIRED"}
    assert "ROOT_EXPIRES_SOON" in warnings(300)
    assert {"ROOT_EXPIRED", "TRUST_STALE"} <= warnings(400)
    assert "CLOCK_BEHIND" in warnings(-900)
    view = views.trust_view(standing(place))
    assert (view.root_version, view.revocation_sequence) == (1, 1)
    assert {role.name: role.threshold for role in view.roles} == dict.fromkeys(site.keys, 1)
    assert view.clock_floor >= int((NOW - timedelta(days=2)).timestamp())


def test_a_home_without_a_root_vouches_for_nothing(place: Workplace, site: Site) -> None:
    bring(place, site.bundle())
    os.unlink(place.trust / "1.root.json")
    with pytest.raises(BundleError, match="ROOT_MISSING"):
        standing(place)
    view = views.version_view(place.ledger.versions()[0], "ROOT_MISSING", (), whole=False)
    assert view.revoked == "ROOT_MISSING"


def test_floors_of_a_removed_database_come_from_their_file(tmp_path: Path, trust: Trust, bundle: Path) -> None:
    home = make_home(tmp_path / "other", trust)
    place = open_place(home)
    bring(place, bundle)
    held = place.floors()
    place.ledger.close()
    for path in (home / "store").glob("store.db*"):
        path.unlink()
    again = open_place(home)
    assert again.floors() == held
    assert held.clock is not None
    assert held.clock <= datetime.now(UTC)
    again.ledger.close()
