"""OMS signatures that others published: legal ones verify, others are refused by name; and a second signature."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from bundles.format.errors import BundleError
from bundles.trust import oms
from bundles.trust.extension import Extension
from bundles.trust.keys import load_public_key
from bundles.trust.publishers import SignedModel, verify_model
from bundles.trust.signers import new_signer
from tests.bundles.making import sha256
from tests.bundles.trusting import NOW, revocations, root_of

VECTORS = Path(__file__).with_name("vectors") / "oms"
KEY = load_public_key(VECTORS / "keys" / "signing-key-pub.pem")
CA = x509.load_pem_x509_certificate((VECTORS / "keys" / "ca-cert.pem").read_bytes())
RESOURCES = [oms.Resource("a.txt", sha256(b"a"))]
PUBLISHER, QUANTUM = new_signer("ecdsa-sha2-nistp384"), new_signer("ml-dsa-87/1")


def _verify(name: str) -> SignedModel:
    root = root_of({"publisher": [KEY]}, extension=Extension(authorities={"publisher": (CA,)}))
    return verify_model((VECTORS / name).read_bytes(), root, NOW)


@pytest.mark.parametrize(
    "name",
    [
        "spec/valid/key.bundle.json",
        "spec/valid/certificate.bundle.json",
        "tool/v0.3.1-certificate.sig",
        "tool/v1.0.0-certificate.sig",
        "tool/v1.0.1-certificate.sig",
        "tool/v1.0.1-elliptic-key.sig",
        "tool/v1.1.0-certificate.sig",
        "tool/v1.1.0-elliptic-key.sig",
    ],
)
def test_a_legal_published_signature_verifies(name: str) -> None:
    signed = _verify(name)
    assert [resource.name for resource in signed.resources] == ["signme-1", "signme-2"]
    assert signed.keyids == (KEY.keyid,)
    assert len(signed.certificates) == (2 if "certificate" in name else 0)


@pytest.mark.parametrize("name", ["tool/v0.3.1-elliptic-key.sig", "tool/v1.0.0-elliptic-key.sig"])
def test_a_signature_of_one_file_verifies_and_is_over_no_bundle_s_files(name: str) -> None:
    signed = _verify(name)
    assert [resource.name for resource in signed.resources] == ["."]
    with pytest.raises(BundleError, match="OMS_FILES_DIFFER"):
        oms.check_files(signed.resources, {"signme-1": signed.resources[0].digest})


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("spec/invalid/empty.bundle.json", "JSON_SYNTAX"),
        ("spec/invalid/missing-envelope.bundle.json", "OMS_SCHEMA"),
        ("spec/invalid/missing-verification-material.bundle.json", "OMS_SCHEMA"),
        ("spec/invalid/missing-tlog-entries.bundle.json", "OMS_KEY_KIND"),
        ("spec/invalid-payload/wrong-predicate.bundle.json", "OMS_SIGNATURE"),
        ("spec/valid/sigstore.bundle.json", "OMS_KEY_KIND"),  # keyless: needs the network
        ("tool/v0.2.0-certificate.sig", "OMS_SIGNATURE"),  # before v1.0: another encoding, another statement
    ],
)
def test_any_other_published_signature_is_refused_by_name(name: str, code: str) -> None:
    with pytest.raises(BundleError) as error:
        _verify(name)
    assert error.value.code == code


def test_what_the_wrong_predicate_says_is_no_model_s_statement() -> None:
    document = json.loads((VECTORS / "spec/invalid-payload/wrong-predicate.bundle.json").read_text())
    with pytest.raises(BundleError, match="OMS_SCHEMA"):
        oms.read_statement(base64.b64decode(document["dsseEnvelope"]["payload"]))


def test_an_older_signature_carries_its_key_which_must_be_the_root_s() -> None:
    raw = (VECTORS / "tool" / "v1.0.1-elliptic-key.sig").read_bytes()
    assert oms.read(raw).hint == oms.hint_of(KEY)
    with pytest.raises(BundleError, match="OMS_UNKNOWN_KEY"):
        verify_model(raw, root_of({}), NOW)


def _with_key_id(document: dict[str, Any], keyid: str | None) -> None:
    document["dsseEnvelope"]["signatures"][0]["keyid"] = keyid


def _without_key_id(document: dict[str, Any]) -> None:
    del document["dsseEnvelope"]["signatures"][0]["keyid"]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: _with_key_id(d, None),
        lambda d: _with_key_id(d, "anything"),
        _without_key_id,
        lambda d: d["verificationMaterial"].pop("tlogEntries"),
        lambda d: d["verificationMaterial"]["publicKey"].pop("hint"),
    ],
)
def test_what_oms_leaves_open_does_not_matter(change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(oms.sign_model("m", RESOURCES, PUBLISHER))
    change(document)
    signed = verify_model(json.dumps(document).encode(), root_of({"publisher": [PUBLISHER.key]}), NOW)
    assert signed.keyids == (PUBLISHER.key.keyid,)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: m.clear(), "OMS_SCHEMA"),
        (lambda m: m.update(x509CertificateChain={"certificates": []}), "OMS_SCHEMA"),
        (lambda m: m.update(certificate={}), "OMS_KEY_KIND"),
        (lambda m: m.update(publicKey={"rawBytes": "!"}), "BASE64"),
        (lambda m: m.update(publicKey={"rawBytes": "AAAA"}), "OMS_SCHEMA"),
    ],
)
def test_how_a_model_was_signed_is_stated_in_one_way(
    change: Callable[[dict[str, Any]], object], code: str
) -> None:
    document = json.loads(oms.sign_model("m", RESOURCES, PUBLISHER))
    change(document["verificationMaterial"])
    with pytest.raises(BundleError) as error:
        oms.read(json.dumps(document).encode())
    assert error.value.code == code


def test_a_second_signature_stands_behind_the_first_and_counts() -> None:
    raw = oms.sign_model("m", RESOURCES, PUBLISHER, second=QUANTUM)
    lengths = [len(signature.sig) for signature in oms.read(raw).envelope.signatures]
    assert lengths[0] < 110
    assert lengths[1:] == [4627]
    root = root_of({"publisher": [QUANTUM.key, PUBLISHER.key]}, thresholds={"publisher": 2})
    assert set(verify_model(raw, root, NOW).keyids) == {PUBLISHER.key.keyid, QUANTUM.key.keyid}
    with pytest.raises(BundleError, match="OMS_THRESHOLD"):
        verify_model(oms.sign_model("m", RESOURCES, PUBLISHER), root, NOW)
    with pytest.raises(BundleError, match="OMS_KEY_KIND"):
        oms.sign_model("m", RESOURCES, PUBLISHER, second=PUBLISHER)


def test_a_revoked_publisher_s_key_is_named() -> None:
    raw = oms.sign_model("m", RESOURCES, PUBLISHER)
    with pytest.raises(BundleError, match="KEY_REVOKED"):
        verify_model(raw, root_of({"publisher": [PUBLISHER.key]}), NOW, revocations(keys=[PUBLISHER.key.keyid]))


def test_the_site_s_own_publisher_comes_last() -> None:
    raw = oms.sign_model("m", RESOURCES, PUBLISHER)
    root = root_of({"publisher/acme": [QUANTUM.key], "site-publisher": [PUBLISHER.key]})
    assert verify_model(raw, root, NOW).role == "site-publisher"
