"""Published vectors of what trust stands on: DSSE, ECDSA, Ed25519, ML-DSA, and roots that another library made."""

import json
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, mldsa, utils

from bundles.format.errors import BundleError
from bundles.trust import dsse, roots
from bundles.trust.keys import Key

VECTORS = Path(__file__).with_name("vectors")
# DSSE, protocol.md (commit eebf7b59), "Test Vectors": a P-256 key and its signature of "hello world", raw r and s.
_DSSE_POINT = (
    46950820868899156662930047687818585632848591499744589407958293238635476079160,
    5640078356564379163099075877009565129882514886557779369047442380624545832820,
)
_DSSE_SIG = "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="


def _wycheproof(name: str) -> list[tuple[Key, dict[str, str]]]:
    document = json.loads((VECTORS / "wycheproof" / f"{name}.json").read_text())
    held = [Key.of(serialization.load_der_public_key(bytes.fromhex(der))) for der in document["keys"]]
    return [(held[test["key"]], test) for test in document["tests"]]


@pytest.mark.parametrize(
    "name",
    ["ecdsa_secp256r1_sha256_test", "ecdsa_secp384r1_sha384_test", "ecdsa_secp521r1_sha512_test", "ed25519_test"],
)
def test_a_key_judges_as_wycheproof_does(name: str) -> None:
    judged = [
        (
            test["tcId"],
            key.verifies(bytes.fromhex(test["sig"]), bytes.fromhex(test["msg"])),
            test["result"] == "valid",
        )
        for key, test in _wycheproof(name)
    ]
    assert [one for one in judged if one[1] != one[2]] == []
    assert {valid for _, _, valid in judged} == {True, False}


def test_ml_dsa_judges_as_wycheproof_does() -> None:
    """The algorithm itself; what the trust root signs with it is a digest, as TAP 21 has it."""
    for key, test in _wycheproof("mldsa_44_verify_test"):
        public = key.public_key
        assert isinstance(public, mldsa.MLDSA44PublicKey)
        try:
            public.verify(bytes.fromhex(test["sig"]), bytes.fromhex(test["msg"]))
            valid = True
        except InvalidSignature:
            valid = False
        assert valid == (test["result"] == "valid"), test["tcId"]


def test_dsse_s_own_vector_verifies() -> None:
    key = Key.of(ec.EllipticCurvePublicNumbers(*_DSSE_POINT, ec.SECP256R1()).public_key())
    raw = dsse._decode64(_DSSE_SIG, "it", False)
    signature = utils.encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
    envelope = dsse.Envelope(b"hello world", "http://example.com/HelloWorld", (dsse.Signature("", signature),))
    assert envelope.valid_keys([key]) == (key.keyid,)
    assert (
        dsse.Envelope(b"hello worle", "http://example.com/HelloWorld", envelope.signatures).valid_keys([key]) == ()
    )


def test_roots_that_securesystemslib_signed_are_followed() -> None:
    first, second = (roots.load(VECTORS / "tuf" / f"{version}.root.json") for version in (1, 2))
    assert {key.scheme for key in first.role_keys("root")} == {"ed25519", "ecdsa-sha2-nistp256", "ml-dsa-87/1"}
    assert first.roles["root"].threshold == 2
    assert roots.advance(first, [second]).version == 2


def test_such_a_root_with_one_signature_less_is_refused() -> None:
    document = json.loads((VECTORS / "tuf" / "1.root.json").read_text())
    document["signatures"].pop()
    with pytest.raises(BundleError, match="ROOT_THRESHOLD"):
        roots.parse(json.dumps(document).encode())
