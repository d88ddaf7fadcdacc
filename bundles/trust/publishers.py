"""Whether a publisher that the trust root names signed a model: by a raw key, or by a certificate of an authority.

The roles `publisher`, `publisher/NAME` and `site-publisher` are tried in turn; the first whose demands are met is
the publisher. A certificate counts as one signer; a post-quantum signature behind it counts by its raw key.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from bundles.format.errors import BundleError
from bundles.trust import oms
from bundles.trust.certificates import RevokedCertificates, verify_chain
from bundles.trust.keys import Key
from bundles.trust.oms import ModelSignature, Resource
from bundles.trust.revocation import Revocations
from bundles.trust.roots import Root, check_hybrid

_STRANGERS = {"OMS_UNKNOWN_KEY", "CERTIFICATE_UNTRUSTED"}


@dataclass(frozen=True)
class SignedModel:
    """What a publisher signed.

    Attributes:
        subject: the folder's name, as the publisher called it.
        resources: every signed file, in listed order.
        role: the publisher's role in the trust root.
        keyids: ids of the keys that signed, that of a certificate included.
        certificates: `certificate_id` of the certificates, the signing one first; none with raw keys.
    """

    subject: str
    resources: tuple[Resource, ...]
    role: str
    keyids: tuple[str, ...]
    certificates: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Vouched:
    role: str
    keys: tuple[Key, ...]
    certificates: tuple[str, ...]


def verify_model(raw: bytes, root: Root, now: datetime, revocations: Revocations | None = None) -> SignedModel:
    """What the OMS signature `raw` says, once a publisher of `root` is found to have made it.

    Raises:
        BundleError: OMS_SCHEMA, OMS_KEY_KIND, OMS_UNKNOWN_KEY, OMS_SIGNATURE, OMS_THRESHOLD, OMS_METHOD,
            OMS_ROOT_DIGEST, SIGNATURE_ENCODING, KEY_REVOKED, PQ_SIGNATURE_MISSING, CLASSICAL_SIGNATURE_MISSING,
            the CERTIFICATE and CRL codes, BASE64, or a JSON code.
    """
    signature = oms.read(raw)
    vouched = _find_publisher(signature, root, now, revocations)
    statement = oms.read_statement(signature.envelope.payload)
    keyids = tuple(key.keyid for key in vouched.keys)
    return SignedModel(statement.subject, statement.resources, vouched.role, keyids, vouched.certificates)


def _find_publisher(
    signature: ModelSignature, root: Root, now: datetime, revocations: Revocations | None
) -> _Vouched:
    refusals = []
    for role in root.publisher_roles:
        try:
            return _vouch(signature, root, role, now, revocations)
        except BundleError as error:
            refusals.append(error)
    # What is wrong with a publisher that is known says more than that others are not it.
    raise next((error for error in refusals if error.code not in _STRANGERS), refusals[0])


def _vouch(
    signature: ModelSignature, root: Root, role: str, now: datetime, revocations: Revocations | None
) -> _Vouched:
    revoked = revocations.keys if revocations else frozenset()
    keys = [key for key in root.role_keys(role) if key.keyid not in revoked]
    certificates: tuple[str, ...] = ()
    if signature.chain:
        leaf, certificates = _certified(signature, root, role, now, revocations)
        signed = [leaf, *_signed_by(signature, keys)]
    else:
        _check_hint(signature, root.role_keys(role), revoked)
        signed = _signed_by(signature, keys)
    if not signed:
        raise _unsigned(signature, root.role_keys(role), revoked)
    if role in root.extension.hybrid:
        check_hybrid(signed, "the model")
    threshold = root.roles[role].threshold
    if len(set(signed)) < threshold:
        raise BundleError("OMS_THRESHOLD", f"{len(set(signed))} {role} keys signed the model, {threshold} must")
    return _Vouched(role, tuple(dict.fromkeys(signed)), certificates)


def _certified(
    signature: ModelSignature, root: Root, role: str, now: datetime, revocations: Revocations | None
) -> tuple[Key, tuple[str, ...]]:
    """The key of the signing certificate, once it is trusted and its signature holds."""
    revoked = RevokedCertificates(
        revocations.certificates if revocations else frozenset(),
        revocations.crls if revocations else (),
        role in root.extension.crl_required,
    )
    certificates = verify_chain(signature.chain, root.extension.authorities.get(role, ()), now, revoked)
    leaf = Key.of(signature.chain[0].public_key())
    if revocations and leaf.keyid in revocations.keys:
        raise BundleError("CERTIFICATE_REVOKED", "the key of the publisher's certificate is revoked")
    if not leaf.scheme.startswith("ecdsa"):
        raise BundleError("OMS_KEY_KIND", "the publisher's certificate is not for an ECDSA key")
    if not _signed_by(signature, [leaf]):
        raise _unsigned(signature, [leaf], frozenset())
    return leaf, certificates


def _signed_by(signature: ModelSignature, keys: Collection[Key]) -> list[Key]:
    valid = signature.envelope.valid_keys(keys)
    return [key for key in keys if key.keyid in valid]


def _check_hint(signature: ModelSignature, keys: Collection[Key], revoked: Collection[str]) -> None:
    hinted = [key for key in keys if signature.hint in ("", oms.hint_of(key))]
    if not hinted:
        raise BundleError("OMS_UNKNOWN_KEY", "the model is signed by a publisher key that the trust root lacks")
    if signature.hint and hinted[0].keyid in revoked:
        raise BundleError("KEY_REVOKED", "the publisher's key is revoked")


def _unsigned(signature: ModelSignature, keys: Collection[Key], revoked: Collection[str]) -> BundleError:
    if any(key.keyid in revoked for key in _signed_by(signature, keys)):
        return BundleError("KEY_REVOKED", "the publisher's key is revoked")
    if signature.envelope.valid_old_keys(keys):
        return BundleError(
            "SIGNATURE_ENCODING", "the model is signed as before OMS v1.0; it must be signed with a newer tool"
        )
    return BundleError("OMS_SIGNATURE", "the publisher's signature does not verify; the model was changed")
