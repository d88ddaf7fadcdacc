"""Certificates of publishers: chains from a code-signing leaf to an authority of the trust root, and revocation.

Path building is that of `cryptography.x509.verification`; what it leaves open is here: the leaf's purpose, which
fault a certificate has, and revocation by serial number or certificate revocation list (CRL).

Source: RFC 5280 sections 4.2 and 6.3 (CRLs; neither delta nor indirect ones); OMS specification v1.0, section 8.2.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from bundles.format.errors import BundleError

MAX_CHAIN = 8
CLOCK_TOLERANCE = timedelta(days=1)
MALFORMED = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises of a certificate that is none."""

_KNOWN_CRITICAL = {
    ExtensionOID.BASIC_CONSTRAINTS,
    ExtensionOID.KEY_USAGE,
    ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
}

_Kind = TypeVar("_Kind", bound=x509.ExtensionType)


def _check_purposes(_: verification.Policy, __: x509.Certificate, purposes: x509.ExtendedKeyUsage | None) -> None:
    """Refuse an authority that is limited to other purposes than signing code.

    Raises:
        ValueError: it is; without the extension an authority is limited to none.
    """
    wanted = {ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
    if purposes is not None and wanted.isdisjoint(purposes):
        raise ValueError("the authority may not issue certificates for signing code")


# The default asks of authorities that they may issue certificates of TLS clients.
_AUTHORITIES = verification.ExtensionPolicy.webpki_defaults_ca().may_be_present(
    x509.ExtendedKeyUsage, verification.Criticality.AGNOSTIC, _check_purposes
)


@dataclass(frozen=True)
class RevokedCertificates:
    """Which certificates are revoked.

    Attributes:
        ids: `certificate_id` of each that a revocation document lists.
        crls: the certificate revocation lists it carries.
        crl_required: refuse a certificate without a list of its issuer that is in force.
    """

    ids: frozenset[str] = frozenset()
    crls: tuple[x509.CertificateRevocationList, ...] = ()
    crl_required: bool = False


def verify_chain(
    chain: Sequence[x509.Certificate],
    authorities: Sequence[x509.Certificate],
    now: datetime,
    revoked: RevokedCertificates,
) -> tuple[str, ...]:
    """Check a chain, leaf first, for signing code now; the `certificate_id` of each but the authority.

    Raises:
        BundleError: CERTIFICATE_EXPIRED, CERTIFICATE_NOT_YET_VALID, CERTIFICATE_CA_AS_LEAF, CERTIFICATE_EKU,
            CERTIFICATE_UNTRUSTED, CERTIFICATE_REVOKED, CRL_MISSING, CRL_EXPIRED.
    """
    if not authorities:
        raise _untrusted("the trust root names no certificate authority for it")
    try:
        return _verify_chain(chain, authorities, now, revoked)
    except MALFORMED:  # certificates and lists are parsed where they are looked at
        raise _untrusted("it, or a revocation list for it, is malformed") from None


def _verify_chain(
    chain: Sequence[x509.Certificate],
    authorities: Sequence[x509.Certificate],
    now: datetime,
    revoked: RevokedCertificates,
) -> tuple[str, ...]:
    for certificate in chain:
        _check_validity(certificate, now)
    _check_leaf(chain[0])
    path = _path(chain, authorities, now)
    ids = []
    for certificate, issuer in pairwise(path):
        ids.append(certificate_id(issuer, certificate.serial_number))
        _check_revocation(certificate, issuer, ids[-1], now, revoked)
    return tuple(ids)


def certificate_id(issuer: x509.Certificate, serial: int) -> str:
    """Names a certificate: SHA-256 of its issuer's SubjectPublicKeyInfo, and its serial number, both hex."""
    return f"{issuer_sha256(issuer)}:{serial:x}"


def issuer_sha256(issuer: x509.Certificate) -> str:
    """SHA-256 of an issuer's SubjectPublicKeyInfo (DER), hex; a renewed authority keeps it with its key."""
    spki = issuer.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether it may issue certificates: a CA whose key usage, where stated, has certificate signing.

    Raises:
        ValueError: its extensions are malformed.
    """
    constraints, usage = _extension(certificate, x509.BasicConstraints), _extension(certificate, x509.KeyUsage)
    return constraints is not None and constraints.ca and (usage is None or usage.key_cert_sign)


def load_chain(path: Path) -> tuple[x509.Certificate, ...]:
    """The PEM certificates of a file, in its order: the leaf first.

    Raises:
        BundleError: CERTIFICATE_UNREADABLE.
    """
    try:
        return tuple(x509.load_pem_x509_certificates(path.read_bytes()))
    except OSError as error:
        raise BundleError("CERTIFICATE_UNREADABLE", f"the certificates {path}: {error.strerror}") from None
    except ValueError:
        raise BundleError("CERTIFICATE_UNREADABLE", f"{path} holds no PEM certificates") from None


def _check_validity(certificate: x509.Certificate, now: datetime) -> None:
    name = certificate.subject.rfc4514_string()[:80]
    if now >= certificate.not_valid_after_utc:
        raise BundleError("CERTIFICATE_EXPIRED", f"the publisher's certificate {name!a} has expired")
    if now < certificate.not_valid_before_utc:
        raise BundleError("CERTIFICATE_NOT_YET_VALID", f"the publisher's certificate {name!a} is not valid yet")


def _check_leaf(leaf: x509.Certificate) -> None:
    try:
        usage, purposes = _extension(leaf, x509.KeyUsage), _extension(leaf, x509.ExtendedKeyUsage)
        authority, extensions = is_authority(leaf), tuple(leaf.extensions)
        leaf.public_key()
    except MALFORMED:
        raise _untrusted("it has malformed extensions") from None
    if authority or (usage is not None and usage.key_cert_sign):
        raise BundleError("CERTIFICATE_CA_AS_LEAF", "the model is signed with a certificate authority's own key")
    if purposes is None or ExtendedKeyUsageOID.CODE_SIGNING not in purposes:
        raise BundleError("CERTIFICATE_EKU", "the publisher's certificate is not for signing code")
    if usage is not None and not usage.digital_signature:
        raise BundleError("CERTIFICATE_EKU", "the publisher's certificate is not for signatures")
    if any(extension.critical and extension.oid not in _KNOWN_CRITICAL for extension in extensions):
        raise _untrusted("it has a critical extension that is unknown here")


def _path(
    chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate], now: datetime
) -> Sequence[x509.Certificate]:
    verifier = (
        verification.PolicyBuilder()
        .store(verification.Store(list(authorities)))
        .time(now.astimezone(UTC).replace(tzinfo=None))
        .max_chain_depth(MAX_CHAIN)
        .extension_policies(
            ca_policy=_AUTHORITIES,
            ee_policy=verification.ExtensionPolicy.permit_all(),
        )
        .build_client_verifier()
    )
    try:
        return verifier.verify(chain[0], list(chain[1:])).chain
    except (verification.VerificationError, UnsupportedAlgorithm, ValueError):
        raise _no_path(chain, authorities, now) from None


def _no_path(
    chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate], now: datetime
) -> BundleError:
    """Why no authority vouches for a chain: the one that it names may have expired, and no newer one is there."""
    issuers = {certificate.issuer for certificate in chain}
    named = [authority for authority in authorities if authority.subject in issuers]
    if named and all(now >= authority.not_valid_after_utc for authority in named):
        name = named[0].subject.rfc4514_string()[:80]
        return BundleError(
            "CERTIFICATE_EXPIRED",
            f"the certificate authority {name!a} of the trust root has expired; a new root must name its renewed "
            "certificate (cloister trust rotate --authority)",
        )
    return _untrusted("no chain leads from it to a certificate authority of the trust root")


def _check_revocation(
    certificate: x509.Certificate,
    issuer: x509.Certificate,
    identity: str,
    now: datetime,
    revoked: RevokedCertificates,
) -> None:
    lists = [crl for crl in revoked.crls if _is_list_of(crl, issuer)]
    serial = certificate.serial_number
    listed = any(crl.get_revoked_certificate_by_serial_number(serial) is not None for crl in lists)
    if identity in revoked.ids or listed:
        raise BundleError("CERTIFICATE_REVOKED", f"the publisher's certificate {serial:x} is revoked")
    if not revoked.crl_required:
        return
    # A list from the future revokes all the same, but does not show that one is in force now.
    begun = [crl for crl in lists if now >= crl.last_update_utc - CLOCK_TOLERANCE]
    if not begun:
        raise BundleError(
            "CRL_MISSING", "a certificate revocation list of the publisher's authority is required and missing"
        )
    if not any(crl.next_update_utc is not None and now < crl.next_update_utc for crl in begun):
        raise BundleError(
            "CRL_EXPIRED", "the certificate revocation list has expired; carry in this month's trust bundle"
        )


def _is_list_of(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    """Whether `issuer` made this complete list."""
    if crl.issuer != issuer.subject:
        return False
    try:
        usage = _extension(issuer, x509.KeyUsage)
        complete = not any(extension.critical for extension in crl.extensions)
        signed = crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]  # refuses other keys itself
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return signed and complete and (usage is None or usage.crl_sign)


def load_crls(ders: Iterable[bytes]) -> tuple[x509.CertificateRevocationList, ...]:
    """Parse certificate revocation lists.

    Raises:
        ValueError: one is none.
    """
    return tuple(map(x509.load_der_x509_crl, ders))


def _extension(certificate: x509.Certificate, kind: type[_Kind]) -> _Kind | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _untrusted(why: str) -> BundleError:
    return BundleError("CERTIFICATE_UNTRUSTED", f"the publisher's certificate is not trusted: {why}")
