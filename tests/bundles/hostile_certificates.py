"""Refusals 13 to 18: publishers' certificates that are not, no longer or not yet good; keys that are revoked."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.bundles.attacks import Refusal, Scene
from tests.bundles.forging import Draft, Keyholder, b64

_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Leaf:
    """A certificate to be issued: by default one that may sign models.

    Attributes:
        begins: days from now.
        ends: days from now.
        purpose: its extended key usage.
        authority: it may issue certificates itself.
        serial: its number.
    """

    begins: float = -30
    ends: float = 300
    purpose: x509.ObjectIdentifier = ExtendedKeyUsageOID.CODE_SIGNING
    authority: bool = False
    serial: int = 0x4711


class Authority:
    """A certificate authority of a publisher."""

    def __init__(self) -> None:
        self.key = Keyholder.ecdsa()
        self.name = _name("Models Ltd CA")
        self.certificate = self._sign(self.name, self.key, Leaf(ends=3000, authority=True, serial=1), None)

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    @property
    def spki_sha256(self) -> str:
        spki = self.key.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(spki).hexdigest()

    def issue(self, holder: Keyholder, leaf: Leaf) -> bytes:
        """A certificate for a key, DER."""
        made = self._sign(_name("Models Ltd"), holder, leaf, leaf.purpose)
        return made.public_bytes(Encoding.DER)

    def revocation_list(self, *serials: int, days: float = 30) -> bytes:
        """A CRL until so many days from now, DER."""
        now = datetime.now(UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.name)
        builder = builder.last_update(now - 60 * _DAY).next_update(now + days * _DAY)
        builder = builder.add_extension(x509.CRLNumber(1), critical=False)
        for serial in serials:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - _DAY)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self.key.private, hashes.SHA384()).public_bytes(Encoding.DER)

    def _sign(
        self, subject: x509.Name, holder: Keyholder, leaf: Leaf, purpose: x509.ObjectIdentifier | None
    ) -> x509.Certificate:
        now, public = datetime.now(UTC), holder.private.public_key()
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(public)
        builder = builder.serial_number(leaf.serial)
        builder = builder.not_valid_before(now + leaf.begins * _DAY).not_valid_after(now + leaf.ends * _DAY)
        builder = builder.add_extension(x509.BasicConstraints(ca=leaf.authority, path_length=None), critical=True)
        builder = builder.add_extension(_usage(leaf.authority), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        issuer = self.key.private.public_key()
        builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
        if purpose is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        return builder.sign(self.key.private, hashes.SHA384())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def certified(
    leaf: Leaf, revocations: Callable[[Authority], dict[str, object]] | None = None, *, crl_required: bool = False
) -> Callable[[Scene], Draft]:
    """A bundle whose publisher signed with a certificate of an authority that a new trust root names.

    Args:
        leaf: the publisher's certificate.
        revocations: fields of the revocation document that travels with it; none travels where absent.
        crl_required: the root wants a CRL in force for every certificate.
    """

    def forge(scene: Scene) -> Draft:
        authority, publisher = Authority(), Keyholder.ecdsa()
        extension: dict[str, object] = {"certificate_authorities": {"publisher": [authority.pem]}}
        if crl_required:
            extension["crl_required"] = ["publisher"]
        root = scene.keys.root_document(2, lambda signed: signed.update({"x-cloister": extension}))
        draft = scene.good.with_root(root)
        draft = draft.with_oms(draft.statement(), publisher, [authority.issue(publisher, leaf)])
        if revocations is not None:
            draft = draft.with_revocations(scene.keys.revocations(**revocations(authority)))
        return draft

    return forge


def _revoked_key(scene: Scene) -> Draft:
    """One of the two release keys that signed is not to be trusted any more."""
    return scene.good.with_revocations(scene.keys.revocations(keys=[scene.keys.release[0].keyid]))


def _revoked_manifest(scene: Scene) -> Draft:
    digest = hashlib.sha256(scene.good.payload).hexdigest()
    return scene.good.with_revocations(scene.keys.revocations(manifests=[digest]))


def _with_lists(*serials: int, days: float = 30) -> Callable[[Authority], dict[str, object]]:
    return lambda authority: {"crls": [b64(authority.revocation_list(*serials, days=days))]}


def _listed(authority: Authority) -> dict[str, object]:
    return {"certificates": [{"issuer_sha256": authority.spki_sha256, "serial": f"{Leaf().serial:x}"}]}


CERTIFICATES = (
    Refusal(13, "a certificate that has expired", "CERTIFICATE_EXPIRED", certified(Leaf(ends=-1))),
    Refusal(14, "a certificate that is not valid yet", "CERTIFICATE_NOT_YET_VALID", certified(Leaf(begins=30))),
    Refusal(
        15,
        "a certificate that is not for signing code",
        "CERTIFICATE_EKU",
        certified(Leaf(purpose=ExtendedKeyUsageOID.SERVER_AUTH)),
    ),
    Refusal(16, "an authority's own key", "CERTIFICATE_CA_AS_LEAF", certified(Leaf(authority=True))),
    Refusal(17, "a revoked certificate", "CERTIFICATE_REVOKED", certified(Leaf(), _listed)),
    Refusal(
        17,
        "a certificate that its authority revoked",
        "CERTIFICATE_REVOKED",
        certified(Leaf(), _with_lists(0x4711)),
    ),
    Refusal(17, "a revoked release key", "KEY_REVOKED", _revoked_key),
    Refusal(17, "a revoked manifest", "MANIFEST_REVOKED", _revoked_manifest),
    Refusal(18, "no revocation list", "CRL_MISSING", certified(Leaf(), crl_required=True)),
    Refusal(
        18,
        "a revocation list of another authority",
        "CRL_MISSING",
        certified(Leaf(), lambda _: _with_lists()(Authority()), crl_required=True),
    ),
    Refusal(
        18,
        "a revocation list that has expired",
        "CRL_EXPIRED",
        certified(Leaf(), _with_lists(days=-1), crl_required=True),
    ),
)
