"""Revocations: what they take back, that they never go back themselves, and how a stolen key's harm is undone."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bundles.format.errors import BundleError
from bundles.trust import dsse, revocation
from bundles.trust.extension import Extension
from bundles.trust.installed import Installed, revoked
from bundles.trust.policy import verify_head, verify_trust
from bundles.trust.signers import new_signer
from tests.bundles.trusting import DAY, NOW, RELEASE_KEY, REVOCATION_KEY, head_of, revocations, root_of

PUBLISHER, SECOND = new_signer("ecdsa-sha2-nistp384"), new_signer("ed25519")
ROOT = root_of({"publisher": [PUBLISHER.key], "release": [RELEASE_KEY.key, SECOND.key]})
HEAD = head_of(PUBLISHER)
DIGEST = verify_head(HEAD, ROOT, NOW).model_digest


def _code(act: Callable[[], object]) -> str:
    with pytest.raises(BundleError) as error:
        act()
    return error.value.code


def test_a_document_survives_being_signed_and_read() -> None:
    made = revocations(7, keys=["ab" * 32], manifests=["cd" * 32], minimum_sequences={"tiny": 9})
    found = revocation.verify(made.raw, ROOT)
    assert (found.sequence, found.issued_at, found.expires) == (7, NOW - DAY, NOW + 30 * DAY)
    assert (found.keys, found.manifests) == ({"ab" * 32}, {"cd" * 32})
    assert found.minimum_sequences == {"tiny": 9}


def test_only_the_role_s_keys_sign_and_as_many_as_must() -> None:
    assert _code(lambda: revocation.verify(revocations(signers=[RELEASE_KEY]).raw, ROOT)) == "SIGNATURE_WRONG_ROLE"
    assert _code(lambda: revocation.verify(revocations(signers=[]).raw, ROOT)) == "SIGNATURE_MISSING"
    two = root_of({"revocation": [REVOCATION_KEY.key, SECOND.key]}, thresholds={"revocation": 2})
    assert _code(lambda: revocation.verify(revocations().raw, two)) == "SIGNATURE_THRESHOLD"
    assert revocation.verify(revocations(signers=[REVOCATION_KEY, SECOND]).raw, two).sequence == 1
    held = {"revocation": [REVOCATION_KEY.key, new_signer("ml-dsa-44/1").key]}
    hybrid = root_of(held, extension=Extension(hybrid=frozenset({"revocation"})))
    assert _code(lambda: revocation.verify(revocations().raw, hybrid)) == "PQ_SIGNATURE_MISSING"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda d: d.update(extra=1), "REVOCATION_SCHEMA"),
        (lambda d: d.pop("crls"), "REVOCATION_SCHEMA"),
        (lambda d: d.update(schema="cloister.revocation/2"), "REVOCATION_SCHEMA"),
        (lambda d: d.update(sequence=0), "REVOCATION_SCHEMA"),
        (lambda d: d.update(sequence=2**53), "REVOCATION_SCHEMA"),
        (lambda d: d.update(sequence=2**63), "JSON_INTEGER"),
        (lambda d: d.update(keys=["AB" * 32]), "REVOCATION_SCHEMA"),
        (lambda d: d.update(crls=["AAAA"]), "REVOCATION_SCHEMA"),
        (lambda d: d.update(crls=["!"]), "REVOCATION_SCHEMA"),
        (lambda d: d.update(certificates=[{"issuer_sha256": "ab" * 32, "serial": "0F"}]), "REVOCATION_SCHEMA"),
        (lambda d: d.update(minimum_sequences={"tiny": 0}), "REVOCATION_SCHEMA"),
        (lambda d: d.update(expires="soon"), "REVOCATION_SCHEMA"),
    ],
)
def test_a_document_has_one_form(change: Callable[[dict[str, Any]], object], code: str) -> None:
    fields = json.loads(dsse.parse(revocations().raw, "it").payload)
    change(fields)
    raw = dsse.Envelope(json.dumps(fields).encode(), revocation.PAYLOAD_TYPE).signed_by(REVOCATION_KEY).encode()
    assert _code(lambda: revocation.verify(raw, ROOT)) == code


def test_another_signed_document_is_none_and_a_large_one_is_not_read() -> None:
    payload = dsse.parse(revocations().raw, "it").payload
    other = dsse.Envelope(payload, "application/json").signed_by(REVOCATION_KEY).encode()
    assert _code(lambda: revocation.verify(other, ROOT)) == "PAYLOAD_TYPE"
    large = b" " * (revocation.MAX_REVOCATION + 1)
    assert _code(lambda: revocation.verify(large, ROOT)) == "REVOCATION_TOO_LARGE"


def test_a_root_without_the_role_takes_no_revocations() -> None:
    bare = json.loads(ROOT.raw)["signed"]["roles"].keys() - {"revocation"}
    assert bare == {"root", "release", "publisher"}
    without = replace(ROOT, roles={name: ROOT.roles[name] for name in bare})
    assert _code(lambda: revocation.verify(revocations().raw, without)) == "ROLE_ABSENT"


def test_a_bundle_signed_by_revoked_keys_only_is_refused_in_whoever_s_hands() -> None:
    revoking = revocations(keys=[RELEASE_KEY.key.keyid])
    assert _code(lambda: verify_head(HEAD, ROOT, NOW, revoking)) == "KEY_REVOKED"
    assert _code(lambda: verify_head(replace(HEAD, revocation=revoking.raw), ROOT, NOW)) == "KEY_REVOKED"
    both = head_of(PUBLISHER, signers=[RELEASE_KEY, SECOND])
    assert verify_head(both, ROOT, NOW, revoking).signers == (SECOND.key.keyid,)


def test_a_revoked_key_does_not_count_towards_a_threshold() -> None:
    two = root_of(
        {"publisher": [PUBLISHER.key], "release": [RELEASE_KEY.key, SECOND.key]}, thresholds={"release": 2}
    )
    both = head_of(PUBLISHER, signers=[RELEASE_KEY, SECOND])
    assert len(verify_head(both, two, NOW, revocations()).signers) == 2
    assert _code(lambda: verify_head(both, two, NOW, revocations(keys=[SECOND.key.keyid]))) == "KEY_REVOKED"


def test_a_revoked_manifest_is_refused() -> None:
    assert _code(lambda: verify_head(HEAD, ROOT, NOW, revocations(manifests=[DIGEST]))) == "MANIFEST_REVOKED"


def test_the_newest_document_is_in_force_and_an_older_one_in_a_bundle_changes_nothing() -> None:
    older, newer = revocations(3, manifests=[DIGEST]), revocations(4)
    bundle = replace(HEAD, revocation=older.raw)
    assert _code(lambda: verify_head(bundle, ROOT, NOW)) == "MANIFEST_REVOKED"
    verified = verify_head(bundle, ROOT, NOW, newer)
    assert verified.revocations is not None
    assert verified.revocations.sequence == 4
    taken = verify_head(replace(HEAD, revocation=newer.raw), ROOT, NOW, revocations(3)).revocations
    assert taken is not None
    assert taken.sequence == 4


def test_a_bundle_of_the_time_before_the_role_s_keys_were_replaced_is_still_a_release() -> None:
    old, held = revocations(manifests=["00" * 32]), revocations(2, [SECOND])
    rotated = root_of({"publisher": [PUBLISHER.key], "revocation": [SECOND.key]}, version=2)
    head = replace(head_of(PUBLISHER, revocation=old.raw), roots=(ROOT.raw,))
    assert verify_head(head, rotated, NOW, held, revocation_floor=2).revocations == held
    # Only where a root of its chain vouches for it, and never as what a trust bundle is carried in for.
    assert _code(lambda: verify_head(replace(head, roots=()), rotated, NOW, held)) == "SIGNATURE_UNKNOWN_KEY"
    assert _code(lambda: verify_trust([ROOT.raw], old.raw, rotated, NOW, held)) == "REVOCATION_ROLLBACK"
    stranger = replace(head, revocation=revocations(9, [RELEASE_KEY]).raw)
    assert _code(lambda: verify_head(stranger, rotated, NOW, held)) == "SIGNATURE_WRONG_ROLE"


def test_a_trust_bundle_never_goes_back() -> None:
    older, newer, other = revocations(3), revocations(4), revocations(4, keys=["ab" * 32])
    assert verify_trust([], newer.raw, ROOT, NOW, older).revocations == newer
    assert verify_trust([], newer.raw, ROOT, NOW, newer).revocations == newer
    for brought in (older, other):
        assert _code(lambda b=brought: verify_trust([], b.raw, ROOT, NOW, newer)) == "REVOCATION_ROLLBACK"


def test_a_floor_holds_where_the_document_was_lost() -> None:
    assert _code(lambda: verify_head(HEAD, ROOT, NOW, revocation_floor=4)) == "REVOCATION_ROLLBACK"
    lost = {"revocation_floor": 4}
    assert _code(lambda: verify_trust([], revocations(3).raw, ROOT, NOW, **lost)) == "REVOCATION_ROLLBACK"
    assert verify_trust([], revocations(4).raw, ROOT, NOW, **lost).revocations == revocations(4)


def test_a_document_is_good_for_its_time() -> None:
    late, early = revocations(expires=NOW), revocations(issued_at=NOW + 2 * DAY, expires=NOW + 9 * DAY)
    for found, code in ((late, "REVOCATION_EXPIRED"), (early, "REVOCATION_NOT_YET_VALID")):
        assert _code(lambda f=found: verify_trust([], f.raw, ROOT, NOW)) == code
        assert _code(lambda f=found: verify_head(HEAD, ROOT, NOW, f)) == code


def test_a_rotation_is_taken_also_where_the_revocations_in_force_have_expired() -> None:
    second = root_of({"publisher": [PUBLISHER.key]}, version=2)
    assert verify_trust([second.raw], None, ROOT, NOW, revocations(expires=NOW)).root.version == 2


def test_new_keys_of_the_role_undo_a_fast_forward() -> None:
    """TUF 5.3.11: whoever stole the old key signed the highest sequence there is."""
    forwarded = revocations(2**53 - 1, keys=[SECOND.key.keyid])
    fresh = new_signer("ed25519")
    rotated = root_of({"publisher": [PUBLISHER.key], "revocation": [fresh.key]}, version=2)
    again = revocations(1, signers=[fresh])
    assert _code(lambda: verify_trust([], again.raw, ROOT, NOW, forwarded)) == "SIGNATURE_UNKNOWN_KEY"
    trust = verify_trust([rotated.raw], again.raw, ROOT, NOW, forwarded)
    assert trust.revocations == again
    assert [root.version for root in trust.new_roots] == [2]
    # Until a new one comes, what was revoked stays so.
    assert verify_trust([rotated.raw], None, ROOT, NOW, forwarded).revocations == forwarded


def test_an_installed_version_is_reported_once_nothing_vouches_for_it() -> None:
    installed = Installed(
        "tiny", 5, DIGEST, (RELEASE_KEY.key.keyid, SECOND.key.keyid), (PUBLISHER.key.keyid,), ("a:1",)
    )
    two = root_of({"release": [RELEASE_KEY.key, SECOND.key]}, thresholds={"release": 2})
    for fields, root, code in (
        ({}, ROOT, ""),
        ({"manifests": [DIGEST]}, ROOT, "MANIFEST_REVOKED"),
        ({"minimum_sequences": {"tiny": 6}}, ROOT, "SEQUENCE_REVOKED"),
        ({"minimum_sequences": {"tiny": 5, "other": 9}}, ROOT, ""),
        ({"keys": [RELEASE_KEY.key.keyid]}, ROOT, ""),
        ({"keys": [RELEASE_KEY.key.keyid]}, two, "KEY_REVOKED"),
        ({"keys": [RELEASE_KEY.key.keyid, SECOND.key.keyid]}, ROOT, "KEY_REVOKED"),
        ({"keys": [PUBLISHER.key.keyid]}, ROOT, "KEY_REVOKED"),
    ):
        assert revoked(installed, root, revocations(**fields)) == code, fields
    assert revoked(installed, ROOT, None) == ""


def test_of_a_hybrid_pair_that_signed_both_must_be_left() -> None:
    release, publisher = new_signer("ml-dsa-44/1").key, new_signer("ml-dsa-44/1").key
    root = root_of(
        {"release": [RELEASE_KEY.key, release], "publisher/acme": [PUBLISHER.key, publisher]},
        extension=Extension(hybrid=frozenset({"release", "publisher/acme"})),
    )
    signers, publishers = (RELEASE_KEY.key.keyid, release.keyid), (PUBLISHER.key.keyid, publisher.keyid)
    installed = Installed("tiny", 5, DIGEST, signers, publishers)
    assert revoked(installed, root, revocations()) == ""
    for keyid in (*signers, *publishers):
        assert revoked(installed, root, revocations(keys=[keyid])) == "KEY_REVOKED"
    # The key of a certificate is none of the root's.
    certified = Installed("tiny", 5, DIGEST, signers, ("00" * 32, publisher.keyid), ("a:1",))
    assert revoked(certified, root, revocations(keys=["00" * 32])) == "KEY_REVOKED"


def test_a_rotated_key_still_vouches_for_what_it_signed() -> None:
    installed = Installed("tiny", 5, DIGEST, ("00" * 32,), (PUBLISHER.key.keyid,))
    assert (
        revoked(
            installed,
            root_of({"release": [RELEASE_KEY.key, SECOND.key]}, thresholds={"release": 2}),
            revocations(),
        )
        == ""
    )
