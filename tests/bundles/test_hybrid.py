"""Hybrid roles: a classical and a post-quantum key must both sign, whatever the threshold."""

import pytest

from bundles.format.errors import BundleError
from bundles.trust.extension import Extension
from bundles.trust.policy import verify_head
from bundles.trust.roots import Root, advance
from bundles.trust.signers import PrivateSigner, new_signer
from tests.bundles.trusting import NOW, ROOT_KEY, Authority, certified, head_of, root_of

CLASSICAL, OTHER, QUANTUM = new_signer("ed25519"), new_signer("ed25519"), new_signer("ml-dsa-65/1")
PUBLISHER, QUANTUM_PUBLISHER = new_signer("ecdsa-sha2-nistp384"), new_signer("ml-dsa-87/1")


def _root(*hybrid: str, threshold: int = 1) -> Root:
    return root_of(
        {
            "release": [CLASSICAL.key, OTHER.key, QUANTUM.key],
            "publisher": [PUBLISHER.key, QUANTUM_PUBLISHER.key],
        },
        thresholds={"release": threshold},
        extension=Extension(hybrid=frozenset(hybrid)),
    )


def _signed_by(*signers: PrivateSigner, root: Root, second: PrivateSigner | None = None) -> int:
    return len(verify_head(head_of(PUBLISHER, signers=signers, second=second), root, NOW).signers)


@pytest.mark.parametrize("threshold", [1, 2])
def test_a_hybrid_release_has_a_signature_of_either_kind(threshold: int) -> None:
    root = _root("release", threshold=threshold)
    assert _signed_by(CLASSICAL, QUANTUM, root=root) == 2
    with pytest.raises(BundleError, match="PQ_SIGNATURE_MISSING"):
        _signed_by(CLASSICAL, OTHER, root=root)
    with pytest.raises(BundleError, match="CLASSICAL_SIGNATURE_MISSING"):
        _signed_by(QUANTUM, root=root)


def test_both_kinds_do_not_make_up_for_a_threshold() -> None:
    with pytest.raises(BundleError, match="SIGNATURE_THRESHOLD"):
        _signed_by(CLASSICAL, QUANTUM, root=_root("release", threshold=3))


def test_a_role_that_is_not_hybrid_takes_any_kind() -> None:
    assert _signed_by(QUANTUM, root=_root("publisher"), second=QUANTUM_PUBLISHER) == 1


def test_a_hybrid_publisher_signs_the_model_twice() -> None:
    root = _root("publisher")
    with pytest.raises(BundleError, match="PQ_SIGNATURE_MISSING"):
        _signed_by(CLASSICAL, root=root)
    verified = verify_head(head_of(PUBLISHER, signers=[CLASSICAL], second=QUANTUM_PUBLISHER), root, NOW)
    assert set(verified.publishers) == {PUBLISHER.key.keyid, QUANTUM_PUBLISHER.key.keyid}


def test_a_hybrid_root_is_followed_only_by_one_that_both_kinds_signed() -> None:
    extension = Extension(hybrid=frozenset({"root"}))
    keys = {"root": [ROOT_KEY.key, QUANTUM.key]}
    first = root_of(keys, extension=extension, signers=[ROOT_KEY, QUANTUM])
    with pytest.raises(BundleError, match="PQ_SIGNATURE_MISSING"):
        root_of(keys, version=2, extension=extension)
    with pytest.raises(BundleError, match="CLASSICAL_SIGNATURE_MISSING"):
        root_of(keys, version=2, extension=extension, signers=[QUANTUM])
    weaker = root_of({}, version=2)
    with pytest.raises(BundleError, match="PQ_SIGNATURE_MISSING"):
        advance(first, [weaker])
    second = root_of({}, version=2, signers=[ROOT_KEY, QUANTUM])
    assert advance(first, [second]) is second


def test_a_role_that_could_never_sign_is_not_made_hybrid() -> None:
    extension = Extension(hybrid=frozenset({"release"}))
    for keys in ([CLASSICAL.key, OTHER.key], [QUANTUM.key]):
        with pytest.raises(BundleError, match=r"ROOT_SCHEMA.*hybrid"):
            root_of({"release": keys}, extension=extension)


def test_a_certificate_is_a_hybrid_publisher_s_classical_key() -> None:
    authority = certified(Authority.new())
    extension = Extension(frozenset({"publisher"}), authority.authorities)
    assert root_of({"publisher": [QUANTUM_PUBLISHER.key]}, extension=extension).role_keys("publisher")
    with pytest.raises(BundleError, match=r"ROOT_SCHEMA.*hybrid"):
        root_of({"publisher": []}, extension=extension)
