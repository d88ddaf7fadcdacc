"""Approvals: custodians sign for one model version on one appliance, one after the other."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from bundles.format.errors import BundleError
from bundles.trust import approval, dsse
from bundles.trust.approval import approve, verify_approval
from bundles.trust.extension import Extension
from bundles.trust.roots import Root
from bundles.trust.signers import new_signer
from tests.bundles.trusting import RELEASE_KEY, revocations, root_of

DIGEST = "5e" * 32
FIRST, SECOND, QUANTUM = new_signer("ed25519"), new_signer("ecdsa-sha2-nistp384"), new_signer("ml-dsa-44/1")


def _root(hybrid: bool = False) -> Root:
    return root_of(
        {"custodian": [FIRST.key, SECOND.key, QUANTUM.key]},
        thresholds={"custodian": 2},
        extension=Extension(hybrid=frozenset({"custodian"} if hybrid else ())),
    )


def test_custodians_sign_one_after_the_other() -> None:
    raw = approve(DIGEST, "ward-4", FIRST)
    one = verify_approval(raw, _root(), None, "ward-4")
    assert (one.model_digest, one.custodians, one.threshold) == (DIGEST, (FIRST.key.keyid,), 2)
    assert not one.is_complete
    both = verify_approval(approve(DIGEST, "ward-4", SECOND, raw), _root(), None, "ward-4")
    assert both.is_complete
    assert set(both.custodians) == {FIRST.key.keyid, SECOND.key.keyid}


def test_signing_twice_is_signing_once() -> None:
    raw = approve(DIGEST, "ward-4", FIRST, approve(DIGEST, "ward-4", FIRST))
    assert not verify_approval(raw, _root(), None, "ward-4").is_complete


def test_an_approval_is_for_one_model_and_one_appliance() -> None:
    raw = approve(DIGEST, "ward-4", FIRST)
    with pytest.raises(BundleError, match="WRONG_TARGET"):
        verify_approval(raw, _root(), None, "ward-5")
    for digest, appliance in (("00" * 32, "ward-4"), (DIGEST, "ward-5")):
        with pytest.raises(BundleError, match="APPROVAL_DIFFERS"):
            approve(digest, appliance, SECOND, raw)


def test_only_custodians_that_are_not_revoked_count() -> None:
    with pytest.raises(BundleError, match="SIGNATURE_WRONG_ROLE"):
        verify_approval(approve(DIGEST, "ward-4", RELEASE_KEY), _root(), None, "ward-4")
    with pytest.raises(BundleError, match="SIGNATURE_UNKNOWN_KEY"):
        verify_approval(approve(DIGEST, "ward-4", new_signer("ed25519")), _root(), None, "ward-4")
    with pytest.raises(BundleError, match="ROLE_ABSENT"):
        verify_approval(approve(DIGEST, "ward-4", FIRST), root_of({}), None, "ward-4")
    both = approve(DIGEST, "ward-4", SECOND, approve(DIGEST, "ward-4", FIRST))
    revoked = revocations(keys=[FIRST.key.keyid])
    assert verify_approval(both, _root(), revoked, "ward-4").custodians == (SECOND.key.keyid,)


def test_hybrid_custodians_need_a_signature_of_either_kind() -> None:
    both = approve(DIGEST, "ward-4", SECOND, approve(DIGEST, "ward-4", FIRST))
    with pytest.raises(BundleError, match="PQ_SIGNATURE_MISSING"):
        verify_approval(both, _root(hybrid=True), None, "ward-4")
    three = approve(DIGEST, "ward-4", QUANTUM, both)
    assert verify_approval(three, _root(hybrid=True), None, "ward-4").is_complete


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda s: s.update(extra=1), "APPROVAL_SCHEMA"),
        (lambda s: s.pop("schema"), "APPROVAL_SCHEMA"),
        (lambda s: s.update(schema="cloister.approval/2"), "APPROVAL_SCHEMA"),
        (lambda s: s.update(model_digest=DIGEST.upper()), "APPROVAL_SCHEMA"),
        (lambda s: s.update(issued_at="today"), "APPROVAL_SCHEMA"),
        (lambda s: s.update(appliance=""), "APPROVAL_SCHEMA"),
    ],
)
def test_a_statement_has_one_form(change: Callable[[dict[str, Any]], object], code: str) -> None:
    statement = json.loads(dsse.parse(approve(DIGEST, "ward-4", FIRST), "it").payload)
    change(statement)
    raw = dsse.Envelope(json.dumps(statement).encode(), approval.PAYLOAD_TYPE).signed_by(FIRST).encode()
    with pytest.raises(BundleError) as error:
        verify_approval(raw, _root(), None, "ward-4")
    assert error.value.code == code


def test_another_signed_document_is_no_approval() -> None:
    payload = dsse.parse(approve(DIGEST, "ward-4", FIRST), "it").payload
    with pytest.raises(BundleError, match="PAYLOAD_TYPE"):
        verify_approval(
            dsse.Envelope(payload, "application/json").signed_by(FIRST).encode(), _root(), None, "ward-4"
        )
    with pytest.raises(BundleError, match="APPROVAL_SCHEMA"):
        approve("not a digest", "ward-4", FIRST)
