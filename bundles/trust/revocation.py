"""What is trusted no longer: keys, manifests, certificates, and sequences below a minimum.

A revocation document is a DSSE envelope signed by the role `revocation`. It travels in trust bundles and in
bundles, each names everything that is revoked, and its sequence never goes back. The keys of the roles `root` and
`revocation` are beyond it: those change with a new root.

Source: docs/trust.md; RFC 5280 for the certificate revocation lists that it carries.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Annotated, Literal

from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bundles.format import strict_json
from bundles.format.errors import BundleError
from bundles.format.manifest import Digest, Name, Sequence, Time, fault_of, format_time, parse_time
from bundles.trust import certificates, dsse, roles
from bundles.trust.roots import REVOCATION, Root
from bundles.trust.signers import Signer

PAYLOAD_TYPE = "application/vnd.cloister.revocation.v1+json"
MAX_REVOCATION = 4 * 1024 * 1024
CLOCK_TOLERANCE = timedelta(days=1)
_WHAT = "the revocation document"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class RevokedCertificate(_Strict):
    """A certificate: SHA-256 of its issuer's SubjectPublicKeyInfo, and its serial number, both hex."""

    issuer_sha256: Digest
    serial: Annotated[str, Field(pattern=r"^(?:0|[1-9a-f][0-9a-f]{0,39})$")]


class Document(_Strict):
    """A revocation document's payload."""

    schema_: Annotated[Literal["cloister.revocation/1"], Field(alias="schema")]
    sequence: Sequence
    issued_at: Time
    expires: Time
    keys: Annotated[tuple[Digest, ...], Field(max_length=10_000)]
    manifests: Annotated[tuple[Digest, ...], Field(max_length=10_000)]
    certificates: Annotated[tuple[RevokedCertificate, ...], Field(max_length=10_000)]
    crls: Annotated[tuple[str, ...], Field(max_length=64)]
    minimum_sequences: Annotated[dict[Name, Sequence], Field(max_length=10_000)]

    def encode(self) -> bytes:
        """The bytes to sign."""
        return self.model_dump_json(by_alias=True, indent=1).encode()


@dataclass(frozen=True)
class Revocations:
    """A revocation document in force.

    Attributes:
        document: what it says.
        raw: the envelope it was read from.
        digest: SHA-256 of its payload, hex.
        crls: certificate revocation lists, parsed.
    """

    document: Document
    raw: bytes
    digest: str
    crls: tuple[x509.CertificateRevocationList, ...]

    @property
    def sequence(self) -> int:
        """Grows with every document."""
        return self.document.sequence

    @cached_property
    def issued_at(self) -> datetime:
        """When it was made."""
        return parse_time(self.document.issued_at)

    @cached_property
    def expires(self) -> datetime:
        """When the next one is due."""
        return parse_time(self.document.expires)

    @cached_property
    def keys(self) -> frozenset[str]:
        """Ids of revoked keys."""
        return frozenset(self.document.keys)

    @cached_property
    def manifests(self) -> frozenset[str]:
        """Digests of revoked manifests."""
        return frozenset(self.document.manifests)

    @cached_property
    def certificates(self) -> frozenset[str]:
        """`certificate_id` of revoked certificates."""
        return frozenset(f"{entry.issuer_sha256}:{entry.serial}" for entry in self.document.certificates)

    @property
    def minimum_sequences(self) -> Mapping[str, int]:
        """By model name, the lowest sequence that may still be used."""
        return self.document.minimum_sequences

    def check_fresh(self, now: datetime) -> None:
        """Refuse a document that is past its date, or from the future.

        Raises:
            BundleError: REVOCATION_EXPIRED, REVOCATION_NOT_YET_VALID.
        """
        if now >= self.expires:
            raise BundleError(
                "REVOCATION_EXPIRED",
                f"the revocations expired at {format_time(self.expires)}; carry in this month's trust bundle",
            )
        if now < self.issued_at - CLOCK_TOLERANCE:
            raise BundleError(
                "REVOCATION_NOT_YET_VALID",
                f"the revocations were issued at {format_time(self.issued_at)}; is the clock right?",
            )


def make(
    sequence: int,
    issued_at: datetime,
    expires: datetime,
    *,
    keys: Iterable[str] = (),
    manifests: Iterable[str] = (),
    revoked: Iterable[RevokedCertificate] = (),
    crls: Iterable[bytes] = (),
    minimum_sequences: Mapping[str, int] | None = None,
) -> Document:
    """A document to sign.

    Args:
        sequence: of the document before, and 1.
        issued_at: now.
        expires: when the next one is due.
        keys: ids of revoked keys.
        manifests: digests of revoked manifests.
        revoked: certificates.
        crls: certificate revocation lists, DER.
        minimum_sequences: by model name.

    Raises:
        BundleError: REVOCATION_SCHEMA.
    """
    fields = {
        "schema": "cloister.revocation/1",
        "sequence": sequence,
        "issued_at": format_time(issued_at),
        "expires": format_time(expires),
        "keys": tuple(sorted(set(keys))),
        "manifests": tuple(sorted(set(manifests))),
        "certificates": tuple(sorted(set(revoked), key=lambda entry: (entry.issuer_sha256, entry.serial))),
        "crls": tuple(base64.b64encode(crl).decode() for crl in crls),
        "minimum_sequences": dict(minimum_sequences or {}),
    }
    try:
        return Document.model_validate(fields)
    except ValidationError as error:
        raise _malformed(error) from None


def sign(document: Document, signers: Iterable[Signer]) -> bytes:
    """The envelope of a document.

    Raises:
        BundleError: SIGNER_FAILED.
    """
    envelope = dsse.Envelope(document.encode(), PAYLOAD_TYPE)
    for signer in signers:
        envelope = envelope.signed_by(signer)
    return envelope.encode()


def parse(raw: bytes) -> Revocations:
    """The document in `raw`; whoever signed it.

    Raises:
        BundleError: REVOCATION_TOO_LARGE, REVOCATION_SCHEMA, PAYLOAD_TYPE, ENVELOPE_SCHEMA, BASE64, a JSON code.
    """
    if len(raw) > MAX_REVOCATION:
        raise BundleError("REVOCATION_TOO_LARGE", f"{_WHAT} has over {MAX_REVOCATION} bytes")
    envelope = dsse.parse(raw, _WHAT)
    if envelope.payload_type != PAYLOAD_TYPE:
        raise BundleError("PAYLOAD_TYPE", f"{_WHAT} is a {envelope.payload_type[:80]!a}")
    value = strict_json.parse_object(envelope.payload, _WHAT)
    try:
        document = Document.model_validate_json(json.dumps(value))
        crls = certificates.load_crls(base64.b64decode(crl, validate=True) for crl in document.crls)
    except ValidationError as error:
        raise _malformed(error) from None
    except ValueError:
        raise BundleError("REVOCATION_SCHEMA", f"{_WHAT} has a certificate revocation list that is none") from None
    return Revocations(document, raw, hashlib.sha256(envelope.payload).hexdigest(), crls)


def verify(raw: bytes, root: Root) -> Revocations:
    """The document in `raw`, signed as the role `revocation` of `root` demands.

    Raises:
        BundleError: as `parse`; ROLE_ABSENT, the SIGNATURE codes.
    """
    revocations = parse(raw)
    roles.demand(dsse.parse(raw, _WHAT), root, REVOCATION, _WHAT)
    return revocations


def newest(
    root: Root, held: Revocations | None, brought: Revocations | None, floor: int = 0
) -> Revocations | None:
    """Which of two documents is in force: that of the higher sequence; it never goes below `floor`.

    One that is held and that `root` no longer vouches for, since the keys of its role were replaced, holds nobody
    back: so a stolen key cannot close the way for good with the highest sequence there is (TUF 5.3.11).

    Raises:
        BundleError: REVOCATION_ROLLBACK, also where two differ and have the same sequence.
    """
    if held is not None and not is_vouched_for(held.raw, root):
        return brought or held
    if held and brought and brought.sequence == held.sequence and brought.digest != held.digest:
        raise BundleError("REVOCATION_ROLLBACK", f"there are two revocation documents of sequence {held.sequence}")
    found = max((d for d in (held, brought) if d), key=lambda document: document.sequence, default=None)
    if (found.sequence if found else 0) < floor:
        raise BundleError(
            "REVOCATION_ROLLBACK",
            f"revocations of sequence {floor} were in force; carry in the newest trust bundle",
        )
    return found


def is_vouched_for(raw: bytes, root: Root) -> bool:
    """Whether `verify` accepts a document."""
    try:
        verify(raw, root)
    except BundleError:
        return False
    return True


def _malformed(error: ValidationError) -> BundleError:
    return BundleError("REVOCATION_SCHEMA", f"{_WHAT}'s {fault_of(error)}")
