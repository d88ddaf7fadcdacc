"""The offline certificate authority: EC P-256, one root, certificates for the gateway and for applications.

An application's identity is the one URI SAN `spiffe://SITE/tenant/T/app/A`. Of a certificate request only the
public key is taken, after its signature has proved possession; subject and extensions are ours.

Source: RFC 5280, RFC 2986 (PKCS#10), SPIFFE X509-SVID section 2.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from appliance.control.identity.secret_keys import write_secret
from appliance.errors import CloisterError

_ROOT_YEARS = 10
_SERVER_DAYS = 825
_CLOCK_SKEW = timedelta(hours=1)
"""Certificates begin this much in the past: there is no NTP between the appliance and its clients."""
_MOST_CSR_BYTES = 16 * 1024


@dataclass(frozen=True)
class ServerIdentity:
    """What the gateway shows: its certificate and private key, PEM."""

    certificate_pem: bytes
    key_pem: bytes


class Authority:
    """The authority, its key loaded.

    Args:
        certificate: the root.
        key: its private key.
    """

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, folder: Path, site: str) -> "Authority":
        """Make a new authority for `site` in `folder`, which must not hold one."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"{site} authority")
        usage = _key_usage(key_cert_sign=True, crl_sign=True)
        builder = (
            _builder(name, name, key.public_key(), timedelta(days=365 * _ROOT_YEARS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        authority = cls(builder.sign(key, hashes.SHA256()), key)
        write_secret(folder / "ca.key", _key_pem(key))
        write_secret(folder / "ca.pem", authority.certificate_pem)
        return authority

    @classmethod
    def load(cls, folder: Path) -> "Authority":
        """Read an authority.

        Raises:
            ValueError: the key is not an elliptic-curve key.
        """
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{folder}/ca.key is not an elliptic-curve key")
        return cls(x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes()), key)

    @property
    def certificate_pem(self) -> bytes:
        """The root certificate."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the root certificate (DER)."""
        return self._certificate.fingerprint(hashes.SHA256())

    def issue_server(self, names: Iterable[str]) -> ServerIdentity:
        """A certificate and key for a server reached under `names`: host names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._leaf(_name("cloister gateway"), key.public_key(), timedelta(days=_SERVER_DAYS))
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in dict.fromkeys(names)]), critical=False
        ).add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        return ServerIdentity(_pem(builder.sign(self._key, hashes.SHA256())), _key_pem(key))

    def issue_client(self, csr_pem: bytes, identity: str, valid: timedelta) -> x509.Certificate:
        """A client certificate for the key that signed `csr_pem`, with `identity` as its one URI SAN.

        Raises:
            CloisterError: INVALID_CSR.
        """
        public_key = _requested_key(csr_pem)
        builder = self._leaf(_name(identity.rpartition("/")[2]), public_key, valid)
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=False
        ).add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _leaf(
        self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, valid: timedelta
    ) -> x509.CertificateBuilder:
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            _builder(subject, self._certificate.subject, public_key, valid)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(issuer_key, critical=False)
        )


def identity_of(site: str, tenant: str, application: str) -> str:
    """The URI SAN of an application."""
    return f"spiffe://{site}/tenant/{tenant}/app/{application}"


def _requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a request, after its signature has been checked; nothing else of it is read."""
    try:
        if len(csr_pem) > _MOST_CSR_BYTES:
            raise ValueError("too long")
        request = x509.load_pem_x509_csr(csr_pem)
        signed = request.is_signature_valid
        key = request.public_key()
    except (ValueError, TypeError, InvalidSignature, x509.InvalidVersion) as error:
        raise _invalid_csr("it is not a PKCS#10 request in PEM") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _invalid_csr("its key is not on the curve P-256")
    if not signed:
        raise _invalid_csr("its signature does not match its key")
    return key


def _invalid_csr(why: str) -> CloisterError:
    return CloisterError(
        "INVALID_CSR", f"the certificate request was refused: {why}; make a new one", field="csr_pem"
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, valid: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + valid)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
