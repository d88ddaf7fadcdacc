"""What our trust roots say beyond TUF: hybrid roles, certificate authorities of publishers, mandatory CRLs.

It stands in the signed part of a root under `x-cloister`, which other TUF readers skip; here an unknown field in
it is refused, because skipping one could mean trusting more than was meant.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bundles.format.errors import BundleError
from bundles.trust.certificates import is_authority
from bundles.trust.keys import Key

NAME = "x-cloister"
MAX_AUTHORITIES = 16
_FIELDS = {"hybrid", "certificate_authorities", "crl_required"}


@dataclass(frozen=True)
class Extension:
    """The extension of one root.

    Attributes:
        hybrid: roles for which a classical and a post-quantum key must both sign.
        authorities: by publisher role, the certificate authorities whose code-signing certificates may sign.
        crl_required: roles whose certificates need a certificate revocation list that is in force.
    """

    hybrid: frozenset[str] = frozenset()
    authorities: Mapping[str, tuple[x509.Certificate, ...]] = field(default_factory=dict)
    crl_required: frozenset[str] = frozenset()

    def as_dict(self) -> dict[str, object]:
        """The JSON form; fields that say nothing are absent, so it is empty where all do."""
        pem = {role: [pem_of(authority) for authority in held] for role, held in self.authorities.items()}
        named = {"hybrid": sorted(self.hybrid), "crl_required": sorted(self.crl_required)}
        return {name: value for name, value in (*named.items(), ("certificate_authorities", pem)) if value}


def parse(value: object) -> Extension:
    """The extension in a root's JSON; an empty one where it is absent (None).

    Raises:
        BundleError: ROOT_SCHEMA.
    """
    if value is None:
        return Extension()
    if not isinstance(value, dict) or not value or not value.keys() <= _FIELDS:
        raise _refused("has unknown fields or none")
    authorities = value.get("certificate_authorities", {})
    if not isinstance(authorities, dict):
        raise _refused("has certificate authorities in an unknown form")
    return Extension(
        _names(value.get("hybrid", [])),
        {role: _authorities(entries) for role, entries in authorities.items()},
        _names(value.get("crl_required", [])),
    )


def pem_of(certificate: x509.Certificate) -> str:
    """PEM, newline included."""
    return certificate.public_bytes(Encoding.PEM).decode()


def check_roles(extension: Extension, roles: Mapping[str, Collection[Key]]) -> None:
    """Refuse an extension about roles that the root lacks, or whose demands their keys can never meet.

    Raises:
        BundleError: ROOT_SCHEMA.
    """
    named = extension.hybrid | extension.authorities.keys() | extension.crl_required
    if not named <= set(roles):
        raise _refused("names a role that the trust root lacks")
    if not all("publisher" in role for role in extension.authorities):
        raise _refused("gives certificate authorities to a role that is no publisher's")
    if not extension.crl_required <= extension.authorities.keys():
        raise _refused("requires revocation lists for a role without certificate authorities")
    for role in extension.hybrid:
        kinds = {key.is_post_quantum for key in roles[role]} | (
            {False} if role in extension.authorities else set()
        )
        if kinds != {True, False}:
            raise _refused(f"makes the role {role} hybrid, which lacks a classical or a post-quantum key")


def _names(value: object) -> frozenset[str]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value):
        return frozenset(value)
    raise _refused("has a list of roles in an unknown form")


def _authorities(value: object) -> tuple[x509.Certificate, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_AUTHORITIES:
        raise _refused(f"does not give a role 1 to {MAX_AUTHORITIES} certificate authorities")
    return tuple(map(_authority, value))


def _authority(value: object) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificate(str(value).encode())
        legal = pem_of(certificate) == value and is_authority(certificate)
    except ValueError:
        legal = False
        certificate = None
    if certificate is None or not legal:
        raise _refused("has a certificate authority that is no PEM certificate of one, in its one legal form")
    return certificate


def _refused(what: str) -> BundleError:
    return BundleError("ROOT_SCHEMA", f"the trust root's {NAME} {what}")
