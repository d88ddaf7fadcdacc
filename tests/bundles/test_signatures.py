"""DSSE and OMS signatures, ours and those of the reference tool."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bundles.format.errors import BundleError
from bundles.trust import dsse, oms
from bundles.trust.keys import Key
from bundles.trust.publishers import SignedModel, verify_model
from bundles.trust.signers import PrivateSigner, new_signer
from tests.bundles.making import sha256
from tests.bundles.trusting import NOW, root_of

VECTOR = Path(__file__).with_name("vectors") / "model_signing_1_1_1"
FILES = {"a.txt": sha256(b"a"), "a/b.txt": sha256(b"b")}
RESOURCES = [oms.Resource(*item) for item in FILES.items()]


def _verify(raw: bytes, *keys: Key) -> SignedModel:
    """Under a root with these publisher keys."""
    return verify_model(raw, root_of({"publisher": keys}), NOW)


@pytest.fixture(scope="module")
def publisher() -> PrivateSigner:
    return new_signer("ecdsa-sha2-nistp384")


def test_the_signed_bytes_are_the_pre_authentication_encoding_of_version_1() -> None:
    envelope = dsse.Envelope(b"hello world", "http://example.com/HelloWorld")
    assert envelope.signed_bytes == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_a_signature_over_the_encoding_of_version_0_2_does_not_count() -> None:
    private = new_signer("ed25519")
    key = private.key
    old = b"DSSEV1" + b" 1 t 1 p"
    forged = dsse.Envelope(b"p", "t", (dsse.Signature(key.keyid, private.sign(old)),))
    assert forged.valid_keys([key]) == ()
    assert dsse.Envelope(b"p", "t").signed_by(private).valid_keys([key]) == (key.keyid,)


def test_a_key_counts_once_and_a_named_key_vouches_for_no_other() -> None:
    one, other = new_signer("ed25519"), new_signer("ed25519")
    first, second = one.key, other.key
    signed = dsse.Envelope(b"p", "t").signed_by(one)
    doubled = dsse.Envelope(b"p", "t", signed.signatures * 2)
    assert doubled.valid_keys([first, second, first]) == (first.keyid,)
    lying = dsse.Envelope(b"p", "t", (dsse.Signature(second.keyid, signed.signatures[0].sig),))
    assert lying.valid_keys([first, second]) == ()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda d: d.update(extra=1), "ENVELOPE_SCHEMA"),
        (lambda d: d.pop("payloadType"), "ENVELOPE_SCHEMA"),
        (lambda d: d["signatures"][0].pop("sig"), "ENVELOPE_SCHEMA"),
        (lambda d: d["signatures"][0].update(extra=""), "ENVELOPE_SCHEMA"),
        (lambda d: d["signatures"].extend(d["signatures"] * 64), "ENVELOPE_SCHEMA"),
        (lambda d: d["signatures"].extend([{"sig": ""}] * 9), "ENVELOPE_SCHEMA"),
        (lambda d: d.update(payload=d["payload"] + "\n"), "BASE64"),
        (lambda d: d.update(payload="cB=="), "BASE64"),
        (lambda d: d.update(payload="c-_w"), "BASE64"),
    ],
)
def test_an_envelope_has_one_form(change: Callable[[dict[str, Any]], None], code: str) -> None:
    signed = dsse.Envelope(b"p", "t").signed_by(new_signer("ed25519"))
    assert dsse.parse(signed.encode(), "it") == signed
    document = json.loads(signed.encode())
    change(document)
    with pytest.raises(BundleError) as error:
        dsse.parse(json.dumps(document).encode(), "it")
    assert error.value.code == code


def test_a_signature_of_the_reference_tool_verifies_over_its_own_order() -> None:
    public = serialization.load_pem_public_key((VECTOR / "publisher.pub").read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    signed = _verify((VECTOR / "model.sig").read_bytes(), Key.of(public))
    assert [resource.name for resource in signed.resources] == ["a/b.txt", "a.txt", "config.json"]
    folder = VECTOR / "model"
    files = {p.relative_to(folder).as_posix(): sha256(p.read_bytes()) for p in folder.rglob("*") if p.is_file()}
    oms.check_files(signed.resources, files)


def test_what_we_sign_has_the_form_of_oms_1_0(publisher: PrivateSigner) -> None:
    document = json.loads(oms.sign_model("m", RESOURCES, publisher))
    assert document["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    pem = publisher.private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert document["verificationMaterial"] == {
        "publicKey": {"hint": hashlib.sha256(pem).hexdigest()},
        "tlogEntries": [],
    }
    assert [s["keyid"] for s in document["dsseEnvelope"]["signatures"]] == [""]
    statement = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
    assert [r["name"] for r in statement["predicate"]["resources"]] == ["a.txt", "a/b.txt"]
    digests = b"".join(bytes.fromhex(FILES[name]) for name in ("a.txt", "a/b.txt"))
    assert statement["subject"] == [{"name": "m", "digest": {"sha256": sha256(digests)}}]


def test_a_model_signature_verifies_in_either_base64_alphabet(publisher: PrivateSigner) -> None:
    key = publisher.key
    raw = oms.sign_model("m", RESOURCES, publisher)
    document = json.loads(raw)
    signature = document["dsseEnvelope"]["signatures"][0]
    signature["sig"] = signature["sig"].translate(str.maketrans("+/", "-_"))
    for signed in (raw, json.dumps(document).encode()):
        assert _verify(signed, key).keyids == (key.keyid,)


def _reworded(change: Callable[[dict[str, Any]], None], publisher: PrivateSigner) -> bytes:
    """A statement changed and signed again."""
    document = json.loads(oms.sign_model("m", RESOURCES, publisher))
    statement = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
    change(statement)
    envelope = dsse.Envelope(json.dumps(statement).encode(), oms.PAYLOAD_TYPE).signed_by(publisher)
    signature = dsse.Signature("", envelope.signatures[0].sig)
    document["dsseEnvelope"] = dsse.Envelope(envelope.payload, oms.PAYLOAD_TYPE, (signature,)).as_dict()
    return json.dumps(document).encode()


def _reorder(statement: dict[str, Any]) -> None:
    statement["predicate"]["resources"].reverse()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda s: s["predicate"]["serialization"].update(method="shards"), "OMS_METHOD"),
        (lambda s: s["predicate"]["serialization"].update(hash_type="blake3"), "OMS_METHOD"),
        (lambda s: s["predicate"]["serialization"].update(allow_symlinks=True), "OMS_METHOD"),
        (lambda s: s["predicate"]["resources"].clear(), "OMS_SCHEMA"),
        (lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]), "OMS_SCHEMA"),
        (lambda s: s["predicate"]["resources"][0].update(algorithm="sha256-sharded-1"), "OMS_SCHEMA"),
        (lambda s: s["predicate"].update(extra=1), "OMS_SCHEMA"),
        (lambda s: s.update(predicateType="other"), "OMS_SCHEMA"),
        (_reorder, "OMS_ROOT_DIGEST"),
    ],
)
def test_a_well_signed_statement_of_another_kind_is_refused(
    publisher: PrivateSigner, change: Callable[[dict[str, Any]], None], code: str
) -> None:
    with pytest.raises(BundleError) as error:
        _verify(_reworded(change, publisher), publisher.key)
    assert error.value.code == code


def test_a_stranger_or_a_changed_model_is_refused(publisher: PrivateSigner) -> None:
    raw = oms.sign_model("m", RESOURCES, publisher)
    stranger = new_signer("ecdsa-sha2-nistp384").key
    with pytest.raises(BundleError, match="OMS_UNKNOWN_KEY"):
        _verify(raw, stranger)
    document = json.loads(raw)
    document["dsseEnvelope"]["payload"] = base64.b64encode(b"{}").decode()
    with pytest.raises(BundleError, match="OMS_SIGNATURE"):
        _verify(json.dumps(document).encode(), publisher.key)


def test_ignored_paths_excuse_no_file(publisher: PrivateSigner) -> None:
    def ignore(statement: dict[str, Any]) -> None:
        statement["predicate"]["serialization"]["ignore_paths"] = ["evil.json"]

    signed = _verify(_reworded(ignore, publisher), publisher.key)
    oms.check_files(signed.resources, FILES)
    with pytest.raises(BundleError, match="OMS_FILES_DIFFER"):
        oms.check_files(signed.resources, FILES | {"evil.json": sha256(b"")})
    with pytest.raises(BundleError, match="OMS_FILES_DIFFER"):
        oms.check_files(signed.resources, {"a.txt": FILES["a.txt"]})


def test_an_ed25519_key_and_a_keyless_certificate_are_no_oms_keys(publisher: PrivateSigner) -> None:
    with pytest.raises(BundleError, match="OMS_KEY_KIND"):
        oms.sign_model("m", RESOURCES, new_signer("ed25519"))
    document = json.loads(oms.sign_model("m", RESOURCES, publisher))
    document["verificationMaterial"] = {"certificate": {"rawBytes": ""}, "tlogEntries": []}
    with pytest.raises(BundleError, match="OMS_KEY_KIND"):
        _verify(json.dumps(document).encode(), publisher.key)
