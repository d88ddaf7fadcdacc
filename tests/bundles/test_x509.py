"""Publishers' certificates: purpose, validity, path and revocation, each fault by its own name."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from bundles.format.errors import BundleError
from bundles.trust import oms
from bundles.trust.certificates import certificate_id, issuer_sha256, load_chain
from bundles.trust.extension import check_roles, parse, pem_of
from bundles.trust.policy import verify_head
from bundles.trust.publishers import SignedModel, verify_model
from bundles.trust.revocation import Revocations, RevokedCertificate
from bundles.trust.roots import Root
from bundles.trust.signers import PrivateSigner, new_signer
from tests.bundles.making import sha256
from tests.bundles.trusting import DAY, NOW, Authority, certified, head_of, revocations, root_of

RESOURCES = [oms.Resource("a.txt", sha256(b"a"))]
CA = Authority.new()
PUBLISHER = new_signer("ecdsa-sha2-nistp384")


def _verify(
    chain: Sequence[x509.Certificate],
    root: Root | None = None,
    revoked: Revocations | None = None,
    signer: PrivateSigner = PUBLISHER,
) -> SignedModel:
    raw = oms.sign_model("m", RESOURCES, signer, chain=chain)
    return verify_model(raw, root or root_of({}, extension=certified(CA)), NOW, revoked)


def _refusal(*args: object, **named: object) -> str:
    with pytest.raises(BundleError) as error:
        _verify(*args, **named)  # type: ignore[arg-type]  # handed on
    return error.value.code


@pytest.mark.parametrize("scheme", ["ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"])
def test_a_code_signing_certificate_of_the_root_s_authority_signs_models(scheme: str) -> None:
    signer = new_signer(scheme)  # type: ignore[arg-type]  # one of the three
    leaf = CA.leaf(signer.key)
    signed = _verify([leaf], signer=signer)
    assert signed.role == "publisher"
    assert signed.keyids == (signer.key.keyid,)
    assert signed.certificates == (certificate_id(CA.certificate, leaf.serial_number),)


def test_a_chain_leads_through_authorities_between() -> None:
    between = Authority.new("Between", CA)
    signed = _verify([between.leaf(PUBLISHER.key), between.certificate])
    assert len(signed.certificates) == 2
    assert _refusal([between.leaf(PUBLISHER.key)]) == "CERTIFICATE_UNTRUSTED"


def test_an_authority_of_the_root_that_has_expired_is_said_to_have() -> None:
    expired, other = Authority.new("Ward CA", ends=NOW - DAY), Authority.new("Other CA", ends=NOW - DAY)
    leaf = expired.leaf(PUBLISHER.key)
    with pytest.raises(
        BundleError, match="CERTIFICATE_EXPIRED: the certificate authority 'CN=Ward CA' of the trust"
    ):
        _verify([leaf], root_of({}, extension=certified(expired)))
    for named in ((expired, CA), (other,)):  # one of its name that is in force, and one that did not issue it
        assert _refusal([leaf], root_of({}, extension=certified(*named))) == "CERTIFICATE_UNTRUSTED"


def test_an_authority_that_is_limited_to_purposes_is_limited_to_signing_code() -> None:
    code, client = ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.CLIENT_AUTH
    for purposes in ([code], [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE], [client, code]):
        between = Authority.new("Between", CA, purposes=purposes)
        assert _verify([between.leaf(PUBLISHER.key), between.certificate]).certificates
        top = Authority.new("Top", purposes=purposes)
        assert _verify([top.leaf(PUBLISHER.key)], root_of({}, extension=certified(top))).certificates
    for purposes in ([client], [ExtendedKeyUsageOID.SERVER_AUTH], [ExtendedKeyUsageOID.TIME_STAMPING]):
        between = Authority.new("Between", CA, purposes=purposes)
        assert _refusal([between.leaf(PUBLISHER.key), between.certificate]) == "CERTIFICATE_UNTRUSTED"


def test_a_certificate_is_good_for_the_time_that_it_states() -> None:
    assert _refusal([CA.leaf(PUBLISHER.key, ends=NOW)]) == "CERTIFICATE_EXPIRED"
    assert _refusal([CA.leaf(PUBLISHER.key, begins=NOW + DAY)]) == "CERTIFICATE_NOT_YET_VALID"
    between = Authority.new("Between", CA, ends=NOW)
    assert _refusal([between.leaf(PUBLISHER.key), between.certificate]) == "CERTIFICATE_EXPIRED"


def test_a_certificate_signs_models_only_when_it_is_for_signing_code() -> None:
    assert _refusal([CA.leaf(PUBLISHER.key, purposes=())]) == "CERTIFICATE_EKU"
    server = [ExtendedKeyUsageOID.SERVER_AUTH]
    assert _refusal([CA.leaf(PUBLISHER.key, purposes=server)]) == "CERTIFICATE_EKU"
    assert _refusal([CA.leaf(PUBLISHER.key, signs=False)]) == "CERTIFICATE_EKU"
    anything = [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]
    assert _refusal([CA.leaf(PUBLISHER.key, purposes=anything)]) == "CERTIFICATE_EKU"


def test_an_authority_s_own_key_signs_no_model() -> None:
    assert _refusal([CA.leaf(PUBLISHER.key, is_ca=True)]) == "CERTIFICATE_CA_AS_LEAF"


def test_an_unknown_critical_extension_is_a_refusal() -> None:
    odd = CA.leaf(PUBLISHER.key, critical=x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"))
    assert _refusal([odd]) == "CERTIFICATE_UNTRUSTED"


def test_a_stranger_s_authority_of_the_same_name_is_not_trusted() -> None:
    assert _refusal([Authority.new().leaf(PUBLISHER.key)]) == "CERTIFICATE_UNTRUSTED"
    assert _refusal([CA.leaf(PUBLISHER.key)], root_of({})) == "CERTIFICATE_UNTRUSTED"


def test_a_certificate_does_not_vouch_for_another_key_s_signature() -> None:
    other = new_signer("ecdsa-sha2-nistp384")
    with pytest.raises(BundleError, match="OMS_KEY_KIND"):
        oms.sign_model("m", RESOURCES, PUBLISHER, chain=[CA.leaf(other.key)])
    raw = oms.sign_model("m", RESOURCES, PUBLISHER, chain=[CA.leaf(PUBLISHER.key)])
    theirs = oms.sign_model("m", RESOURCES, other, chain=[CA.leaf(other.key)])
    mixed = raw.replace(*(_certificate_of(signature) for signature in (raw, theirs)))
    with pytest.raises(BundleError, match="OMS_SIGNATURE"):
        verify_model(mixed, root_of({}, extension=certified(CA)), NOW)


def _certificate_of(raw: bytes) -> bytes:
    return raw.partition(b'"rawBytes": "')[2].partition(b'"')[0]


def test_a_revoked_serial_is_refused_by_document_and_by_list() -> None:
    leaf = CA.leaf(PUBLISHER.key)
    entry = RevokedCertificate(issuer_sha256=issuer_sha256(CA.certificate), serial=f"{leaf.serial_number:x}")
    for revoked in (
        revocations(revoked=[entry]),
        revocations(crls=[CA.crl(leaf.serial_number)]),
        revocations(crls=[CA.crl(leaf.serial_number, due=NOW - DAY, issued=NOW - 9 * DAY)]),
        revocations(crls=[CA.crl(leaf.serial_number, issued=NOW + 9 * DAY)]),
        revocations(keys=[PUBLISHER.key.keyid]),
    ):
        assert _refusal([leaf], None, revoked) == "CERTIFICATE_REVOKED"
    other = RevokedCertificate(issuer_sha256=issuer_sha256(Authority.new().certificate), serial=entry.serial)
    assert _verify([leaf], None, revocations(revoked=[other], crls=[CA.crl(1, 2)])).certificates


def test_an_authority_between_can_be_revoked() -> None:
    between = Authority.new("Between", CA)
    chain = [between.leaf(PUBLISHER.key), between.certificate]
    revoked = revocations(crls=[CA.crl(between.certificate.serial_number)])
    assert _refusal(chain, None, revoked) == "CERTIFICATE_REVOKED"


def test_where_the_root_wants_a_list_one_in_force_must_be_there() -> None:
    root = root_of({}, extension=certified(CA, crl_required=True))
    leaf = CA.leaf(PUBLISHER.key)
    stranger = Authority.new()
    assert _verify([leaf], root, revocations(crls=[CA.crl()])).certificates
    assert _refusal([leaf], root) == "CRL_MISSING"
    assert _refusal([leaf], root, revocations(crls=[stranger.crl()])) == "CRL_MISSING"
    assert _refusal([leaf], root, revocations(crls=[CA.crl(private=stranger.private)])) == "CRL_MISSING"
    assert _refusal([leaf], root, revocations(crls=[CA.crl(issued=NOW + 9 * DAY)])) == "CRL_MISSING"
    assert _refusal([leaf], root, revocations(crls=[CA.crl(is_delta=True)])) == "CRL_MISSING"
    assert _refusal([leaf], root, revocations(crls=[CA.crl(due=NOW)])) == "CRL_EXPIRED"
    assert _verify([leaf], root, revocations(crls=[CA.crl(due=NOW), CA.crl()])).certificates


def test_an_authority_that_may_not_sign_lists_has_none() -> None:
    mute = Authority.new(crl_sign=False)
    root = root_of({}, extension=certified(mute, crl_required=True))
    assert _refusal([mute.leaf(PUBLISHER.key)], root, revocations(crls=[mute.crl()])) == "CRL_MISSING"


def test_a_named_publisher_has_authorities_of_its_own() -> None:
    root = root_of(
        {"publisher/acme": [PUBLISHER.key], "site-publisher": [new_signer("ecdsa-sha2-nistp256").key]},
        extension=certified(CA, role="publisher/acme"),
    )
    assert root.publisher_roles == ("publisher", "publisher/acme", "site-publisher")
    assert _verify([CA.leaf(PUBLISHER.key)], root).role == "publisher/acme"
    assert _verify([], root).role == "publisher/acme"


def test_a_role_with_authorities_needs_no_key() -> None:
    root = root_of({"publisher": []}, extension=certified(CA))
    assert _verify([CA.leaf(PUBLISHER.key)], root).role == "publisher"
    with pytest.raises(BundleError, match="ROOT_SCHEMA"):
        root_of({"publisher": []})


def test_a_bundle_is_verified_with_the_lists_that_it_carries() -> None:
    root = root_of({}, extension=certified(CA, crl_required=True))
    head = head_of(PUBLISHER, chain=[CA.leaf(PUBLISHER.key)])
    with pytest.raises(BundleError, match="CRL_MISSING"):
        verify_head(head, root, NOW)
    verified = verify_head(replace(head, revocation=revocations(crls=[CA.crl()]).raw), root, NOW)
    assert (verified.publisher_role, len(verified.certificates)) == ("publisher", 1)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"unknown": []},
        {"hybrid": "release"},
        {"hybrid": ["release", "release"]},
        {"hybrid": ["custodian"]},
        {"crl_required": ["publisher"]},
        {"certificate_authorities": []},
        {"certificate_authorities": {"publisher": []}},
        {"certificate_authorities": {"publisher": ["no certificate"]}},
        {"certificate_authorities": {"publisher": [pem_of(CA.leaf(PUBLISHER.key))]}},
        {"certificate_authorities": {"publisher": [pem_of(CA.certificate) + "\n"]}},
        {"certificate_authorities": {"release": [pem_of(CA.certificate)]}},
        {"certificate_authorities": {"publisher/acme": [pem_of(CA.certificate)]}},
    ],
)
def test_what_a_root_says_beyond_tuf_has_one_form(value: object) -> None:
    with pytest.raises(BundleError, match="ROOT_SCHEMA"):
        check_roles(parse(value), {"root": [], "release": [], "publisher": []})


def test_a_chain_is_read_from_a_file(tmp_path: Path) -> None:
    leaf, path = CA.leaf(PUBLISHER.key), tmp_path / "chain.pem"
    path.write_bytes(leaf.public_bytes(Encoding.PEM) + CA.certificate.public_bytes(Encoding.PEM))
    assert load_chain(path) == (leaf, CA.certificate)
    path.write_text("no certificate")
    for unreadable in (path, tmp_path / "absent"):
        with pytest.raises(BundleError, match="CERTIFICATE_UNREADABLE"):
            load_chain(unreadable)
