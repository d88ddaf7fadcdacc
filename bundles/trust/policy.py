"""What a bundle's head must prove before one byte of its payload is read.

The order is fixed: chain of roots, release signatures over the manifest's bytes, the manifest, the publisher's
signature over the same files, then time, target and sequence.

Source: TUF specification 1.0.34, sections 1.5.2 (attacks) and 5; docs/bundle-format.md lists the refusals.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta

from bundles.format import manifest as manifests
from bundles.format.errors import BundleError
from bundles.format.manifest import Manifest, parse_time
from bundles.trust import dsse, oms, roots
from bundles.trust.roots import Root

CLOCK_TOLERANCE = timedelta(days=1)
ENGINE_VERSION = "0.1.0"  # of this distribution; a test holds it to pyproject.toml


@dataclass(frozen=True)
class Head:
    """The members of a bundle before its documents and chunks, as they are in the container."""

    header: bytes
    roots: tuple[bytes, ...]
    envelope: bytes
    oms: bytes | None
    revocation: bytes | None = None


@dataclass(frozen=True)
class Verified:
    """A manifest that is signed as the trust root wants it.

    Attributes:
        manifest: parsed from the very bytes that verified.
        model_digest: SHA-256 of those bytes, hex: the bundle's identity.
        signers: release key ids that counted.
        publishers: publisher key ids that counted.
        root: the newest root of the chain.
        new_roots: roots the bundle brought and the pinned chain lacked, oldest first.
    """

    manifest: Manifest
    model_digest: str
    signers: tuple[str, ...]
    publishers: tuple[str, ...]
    root: Root
    new_roots: tuple[Root, ...]


def verify_head(head: Head, pinned: Root, now: datetime) -> Verified:
    """Verify every signature of a bundle's head, and that the signed statements agree.

    Raises:
        BundleError: SIGNATURE_MISSING, SIGNATURE_UNKNOWN_KEY, SIGNATURE_WRONG_ROLE, SIGNATURE_INVALID,
            SIGNATURE_THRESHOLD, PAYLOAD_TYPE, OMS_MISSING, OMS_DIGEST; the codes of roots, dsse, manifest and oms.
    """
    brought = [roots.parse(raw) for raw in head.roots]
    root = roots.advance(pinned, brought)
    root.check_fresh(now)
    envelope = dsse.parse(head.envelope, "the signed manifest")
    signers = check_release(envelope, root)
    manifest = manifests.parse(envelope.payload)
    publishers = _check_publisher(head.oms, manifest, root)
    return Verified(
        manifest,
        hashlib.sha256(envelope.payload).hexdigest(),
        signers,
        publishers,
        root,
        tuple(r for r in sorted(brought, key=lambda r: r.version) if r.version > pinned.version),
    )


def check_release(envelope: dsse.Envelope, root: Root) -> tuple[str, ...]:
    """Ids of the release keys that signed, at least the role's threshold.

    Raises:
        BundleError: PAYLOAD_TYPE and the SIGNATURE codes.
    """
    if envelope.payload_type != manifests.PAYLOAD_TYPE:
        raise BundleError(
            "PAYLOAD_TYPE", f"the signed document is a {envelope.payload_type[:80]!a}, not a manifest"
        )
    role = root.roles["release"]
    valid = envelope.valid_keys(root.role_keys("release"))
    if len(valid) >= role.threshold:
        return valid
    raise _release_refusal(envelope, root, len(valid))


def _release_refusal(envelope: dsse.Envelope, root: Root, valid: int) -> BundleError:
    role = root.roles["release"]
    named = {signature.keyid for signature in envelope.signatures}
    if valid:
        return BundleError("SIGNATURE_THRESHOLD", f"{valid} release keys signed, {role.threshold} must")
    if not named:
        return BundleError("SIGNATURE_MISSING", "the manifest is not signed")
    if named & set(role.keyids):
        return BundleError(
            "SIGNATURE_INVALID", "the manifest's signature does not verify: it was changed after signing"
        )
    if named & root.keys.keys():
        return BundleError("SIGNATURE_WRONG_ROLE", "the manifest is signed by a key that may not sign releases")
    return BundleError("SIGNATURE_UNKNOWN_KEY", "the manifest is signed by nobody this trust root knows")


def _check_publisher(raw: bytes | None, manifest: Manifest, root: Root) -> tuple[str, ...]:
    if raw is None or manifest.oms_sha256 is None:
        raise BundleError(
            "OMS_MISSING", "the publisher's signature is missing; sign the bundle with a publisher key"
        )
    if hashlib.sha256(raw).hexdigest() != manifest.oms_sha256:
        raise BundleError("OMS_DIGEST", "the publisher's signature is not the one that the manifest names")
    signed = oms.verify_model(raw, root.role_keys("publisher"))
    threshold = root.roles["publisher"].threshold
    if len(signed.keyids) < threshold:
        raise BundleError("OMS_THRESHOLD", f"{len(signed.keyids)} publisher keys signed, {threshold} must")
    oms.check_files(signed, {file.path: file.sha256 for file in manifest.files})
    return signed.keyids


@dataclass(frozen=True)
class Floor:
    """The newest accepted release of a model: its sequence and manifest digest."""

    sequence: int
    model_digest: str


@dataclass(frozen=True)
class Site:
    """What this appliance knows when it judges a manifest.

    Attributes:
        now: the clock.
        clock_floor: a moment that has surely passed: the newest accepted `issued_at`.
        floors: by model name.
        appliance: this appliance's name, empty where it has none; None leaves targets unjudged.
    """

    now: datetime
    clock_floor: datetime | None = None
    floors: tuple[tuple[str, Floor], ...] = ()
    appliance: str | None = None


def check_policy(verified: Verified, site: Site) -> None:
    """Refuse a well-signed manifest that is not for here and now.

    Raises:
        BundleError: WRONG_PRODUCT, KIND_UNSUPPORTED, REQUIRES_UNMET, WRONG_TARGET, ENGINE_TOO_OLD,
            CLOCK_BEHIND, NOT_YET_VALID, BUNDLE_EXPIRED, ROLLBACK_REFUSED, SEQUENCE_REUSED.
    """
    manifest = verified.manifest
    if manifest.product != manifests.PRODUCT:
        raise BundleError("WRONG_PRODUCT", f"the bundle is for {manifest.product!a}")
    if manifest.kind != "model":
        raise BundleError(
            "KIND_UNSUPPORTED", f"the bundle holds a {manifest.kind}; this version takes models only"
        )
    if manifest.requires:
        raise BundleError(
            "REQUIRES_UNMET", f"the bundle needs {manifest.requires[0].name}; this version combines no models"
        )
    if site.appliance is not None and manifest.targets and site.appliance not in manifest.targets:
        raise BundleError(
            "WRONG_TARGET",
            f"the bundle is for {manifest.targets[0]!a}{' and others' if len(manifest.targets) > 1 else ''}, not "
            f"for this appliance, {site.appliance!a}; ask for one for this",
        )
    if _numbers(manifest.min_engine) > _numbers(ENGINE_VERSION):
        raise BundleError("ENGINE_TOO_OLD", f"the bundle needs Cloister {manifest.min_engine}; upgrade first")
    _check_time(manifest, site)
    _check_sequence(verified, dict(site.floors).get(manifest.name))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _check_time(manifest: Manifest, site: Site) -> None:
    if site.clock_floor is not None and site.now < site.clock_floor - CLOCK_TOLERANCE:
        raise BundleError("CLOCK_BEHIND", "the clock is behind a release accepted before; set it right")
    if site.now < max(parse_time(manifest.not_before), parse_time(manifest.issued_at)) - CLOCK_TOLERANCE:
        raise BundleError("NOT_YET_VALID", f"the bundle is valid from {manifest.not_before}; is the clock right?")
    if manifest.expires is not None and site.now >= parse_time(manifest.expires):
        raise BundleError("BUNDLE_EXPIRED", f"the bundle expired at {manifest.expires}; ask for a newer release")


def _check_sequence(verified: Verified, floor: Floor | None) -> None:
    manifest = verified.manifest
    if floor is None or manifest.sequence > floor.sequence:
        return
    if manifest.sequence < floor.sequence:
        raise BundleError(
            "ROLLBACK_REFUSED", f"{manifest.name} has sequence {manifest.sequence}, {floor.sequence} was accepted"
        )
    if verified.model_digest != floor.model_digest:
        raise BundleError(
            "SEQUENCE_REUSED", f"another {manifest.name} with sequence {floor.sequence} was accepted"
        )
