"""What a bundle's head must prove before one byte of its payload is read.

The order is fixed: chain of roots, revocations, release signatures over the manifest's bytes, the manifest, the
publisher's signature over the same files; then whether it is for here and now: product, target, engine, time,
sequence, the models it needs, licence and resources.

Source: TUF specification 1.0.34, sections 1.5.2 (attacks) and 5.3.11; docs/bundle-format.md lists the refusals.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from bundles.format import manifest as manifests
from bundles.format.errors import BundleError
from bundles.format.manifest import Manifest, Requirement, parse_time
from bundles.trust import dsse, licences, oms, revocation, roles, roots
from bundles.trust.publishers import SignedModel, verify_model
from bundles.trust.revocation import Revocations
from bundles.trust.roots import RELEASE, Root

CLOCK_TOLERANCE = timedelta(days=1)
ENGINE_VERSION = "0.1.0"  # of this distribution; a test holds it to pyproject.toml
BUILT_AT = parse_time("2026-11-01T00:00:00Z")  # no clock that runs this release can be behind it
MAX_LEAP = 2**42  # of a sequence; Unix milliseconds fit in it, and 2048 leaps until no number is left


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
        publisher_role: the publisher's role in the trust root.
        certificates: `certificate_id` of the publisher's certificates; none with raw keys.
        root: the newest root of the chain.
        new_roots: roots the bundle brought and the pinned chain lacked, oldest first.
        revocations: the newest revocation document, held or brought; None before the first.
    """

    manifest: Manifest
    model_digest: str
    signers: tuple[str, ...]
    publishers: tuple[str, ...]
    publisher_role: str
    certificates: tuple[str, ...]
    root: Root
    new_roots: tuple[Root, ...]
    revocations: Revocations | None


@dataclass(frozen=True)
class VerifiedTrust:
    """What a trust bundle brought, or a bundle's part of it, once it verified.

    Attributes:
        root: the newest root of the chain.
        new_roots: roots that the pinned chain lacked, oldest first.
        revocations: the newest revocation document, held or brought; None before the first.
    """

    root: Root
    new_roots: tuple[Root, ...]
    revocations: Revocations | None


def verify_head(
    head: Head, pinned: Root, now: datetime, revocations: Revocations | None = None, *, revocation_floor: int = 0
) -> Verified:
    """Verify every signature of a bundle's head, and that the signed statements agree.

    An older revocation document than the one in force changes nothing: a bundle carries that of its day. Nor does
    one whose keys the newest root has replaced, where a root that the bundle brings vouches for it.

    Args:
        head: the bundle's first members.
        pinned: the root that is believed.
        now: the clock.
        revocations: the document in force here.
        revocation_floor: the highest sequence of one that was ever in force here.

    Raises:
        BundleError: MANIFEST_REVOKED, OMS_MISSING, OMS_DIGEST; REVOCATION_ROLLBACK, REVOCATION_EXPIRED,
            REVOCATION_NOT_YET_VALID; those of roots, roles, dsse, manifest, publishers and oms.
    """
    trust, _ = _follow(head.roots, head.revocation, pinned, now, revocations, revocation_floor)
    if trust.revocations is not None:
        trust.revocations.check_fresh(now)
    envelope = dsse.parse(head.envelope, "the signed manifest")
    signers = check_release(envelope, trust.root, trust.revocations)
    manifest = manifests.parse(envelope.payload)
    model_digest = hashlib.sha256(envelope.payload).hexdigest()
    if trust.revocations and model_digest in trust.revocations.manifests:
        raise BundleError("MANIFEST_REVOKED", f"{manifest.reference} was revoked; ask for a newer release")
    published = _check_publisher(head.oms, manifest, trust, now)
    return Verified(
        manifest,
        model_digest,
        signers,
        published.keyids,
        published.role,
        published.certificates,
        trust.root,
        trust.new_roots,
        trust.revocations,
    )


def verify_trust(
    brought: Iterable[bytes],
    document: bytes | None,
    pinned: Root,
    now: datetime,
    revocations: Revocations | None = None,
    *,
    revocation_floor: int = 0,
) -> VerifiedTrust:
    """Verify what a trust bundle brings: roots and revocations that take the place of those in force.

    Args:
        brought: root documents.
        document: a revocation document, where it brings one.
        pinned: the root that is believed.
        now: the clock.
        revocations: the document in force here.
        revocation_floor: the highest sequence of one that was ever in force here.

    Raises:
        BundleError: the ROOT and REVOCATION codes (an older document is REVOCATION_ROLLBACK), ROLE_ABSENT, the
            SIGNATURE codes.
    """
    trust, new = _follow(brought, document, pinned, now, revocations, revocation_floor)
    if document is not None and new is None:
        raise BundleError("REVOCATION_ROLLBACK", "the revocations are signed by keys that were replaced since")
    if new and trust.revocations and new.digest != trust.revocations.digest:
        raise BundleError(
            "REVOCATION_ROLLBACK", f"revocations of sequence {trust.revocations.sequence} are in force already"
        )
    if new is not None:
        new.check_fresh(now)
    return trust


def check_release(envelope: dsse.Envelope, root: Root, revocations: Revocations | None = None) -> tuple[str, ...]:
    """Ids of the release keys that signed, at least the role's threshold.

    Raises:
        BundleError: PAYLOAD_TYPE, KEY_REVOKED and the SIGNATURE codes.
    """
    if envelope.payload_type != manifests.PAYLOAD_TYPE:
        raise BundleError(
            "PAYLOAD_TYPE", f"the signed document is a {envelope.payload_type[:80]!a}, not a manifest"
        )
    return roles.demand(envelope, root, RELEASE, "the manifest", revocations.keys if revocations else frozenset())


def _follow(
    brought: Iterable[bytes],
    document: bytes | None,
    pinned: Root,
    now: datetime,
    held: Revocations | None,
    floor: int,
) -> tuple[VerifiedTrust, Revocations | None]:
    """The trust in force once a bundle's roots and revocations are taken; and those revocations, if they count."""
    parsed = sorted(map(roots.parse, brought), key=lambda root: root.version)
    root = roots.advance(pinned, parsed)
    root.check_fresh(now)
    new = _brought(document, root, parsed) if document is not None else None
    newest = revocation.newest(root, held, new, floor)
    return VerifiedTrust(root, tuple(r for r in parsed if r.version > pinned.version), newest), new


def _brought(document: bytes, root: Root, chain: Iterable[Root]) -> Revocations | None:
    """The revocations that a bundle brings; None where the keys that signed them were replaced since."""
    try:
        return revocation.verify(document, root)
    except BundleError:
        if any(revocation.is_vouched_for(document, older) for older in chain):
            return None
        raise


def _check_publisher(raw: bytes | None, manifest: Manifest, trust: VerifiedTrust, now: datetime) -> SignedModel:
    if raw is None or manifest.oms_sha256 is None:
        raise BundleError(
            "OMS_MISSING", "the publisher's signature is missing; sign the bundle with a publisher key"
        )
    if hashlib.sha256(raw).hexdigest() != manifest.oms_sha256:
        raise BundleError("OMS_DIGEST", "the publisher's signature is not the one that the manifest names")
    signed = verify_model(raw, trust.root, now, trust.revocations)
    oms.check_files(signed.resources, {file.path: file.sha256 for file in manifest.files})
    return signed


@dataclass(frozen=True)
class Floor:
    """The newest accepted release of a model: its sequence and manifest digest."""

    sequence: int
    model_digest: str


@dataclass(frozen=True)
class Site:
    """What this appliance knows when it judges a manifest; None leaves a thing unjudged.

    Attributes:
        now: the clock.
        clock_floor: a moment that has surely passed: the newest accepted `issued_at`.
        floors: by model name.
        appliance: this appliance's name, empty where it has none.
        models: name and manifest digest of every committed version.
        licences: SPDX identifiers that may be used here.
        gpu_memory: bytes of each GPU.
        gpus: how many there are.
    """

    now: datetime
    clock_floor: datetime | None = None
    floors: tuple[tuple[str, Floor], ...] = ()
    appliance: str | None = None
    models: tuple[tuple[str, str], ...] | None = None
    licences: frozenset[str] | None = None
    gpu_memory: int | None = None
    gpus: int | None = None


def check_policy(verified: Verified, site: Site) -> None:
    """Refuse a well-signed manifest that is not for here and now.

    Raises:
        BundleError: WRONG_PRODUCT, WRONG_TARGET, ENGINE_TOO_OLD, CLOCK_BEHIND, NOT_YET_VALID, BUNDLE_EXPIRED,
            ROLLBACK_REFUSED, SEQUENCE_REUSED, SEQUENCE_FAST_FORWARD, REQUIRES_UNMET, BASE_ABSENT,
            LICENCE_NOT_ALLOWED, LICENCE_EXPRESSION, RESOURCES_INSUFFICIENT.
    """
    manifest = verified.manifest
    if manifest.product != manifests.PRODUCT:
        raise BundleError("WRONG_PRODUCT", f"the bundle is for {manifest.product!a}")
    if site.appliance is not None and manifest.targets and site.appliance not in manifest.targets:
        raise BundleError(
            "WRONG_TARGET",
            f"the bundle is for {manifest.targets[0]!a}{' and others' if len(manifest.targets) > 1 else ''}, not "
            f"for this appliance, {site.appliance!a}; ask for one for this",
        )
    if _numbers(manifest.min_engine) > _numbers(ENGINE_VERSION):
        raise BundleError("ENGINE_TOO_OLD", f"the bundle needs Cloister {manifest.min_engine}; upgrade first")
    _check_time(verified, site)
    _check_sequence(verified, dict(site.floors).get(manifest.name))
    _check_models(manifest, site)
    _check_licences(manifest, site)
    _check_resources(manifest, site)


def clock_floor(accepted: datetime | None, revocations: Revocations | None) -> datetime:
    """A moment that has surely passed: the newest of accepted releases, revocations, and this release of ours."""
    moments = (accepted, revocations.issued_at if revocations else None, BUILT_AT)
    return max(moment for moment in moments if moment is not None)


def floor_in_force(name: str, floor: Floor | None, revocations: Revocations | None) -> Floor | None:
    """A model's floor, unless a revoked release set it and the revocations state a minimum to go on from.

    So a stolen key that signed the highest sequence there is cannot close the way for good (TUF 5.3.11).
    """
    if floor and revocations and floor.model_digest in revocations.manifests:
        return None if name in revocations.minimum_sequences else floor
    return floor


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _check_time(verified: Verified, site: Site) -> None:
    manifest = verified.manifest
    if site.now < clock_floor(site.clock_floor, verified.revocations) - CLOCK_TOLERANCE:
        raise BundleError("CLOCK_BEHIND", "the clock is behind a release accepted before; set it right")
    if site.now < max(parse_time(manifest.not_before), parse_time(manifest.issued_at)) - CLOCK_TOLERANCE:
        raise BundleError("NOT_YET_VALID", f"the bundle is valid from {manifest.not_before}; is the clock right?")
    if manifest.expires is not None and site.now >= parse_time(manifest.expires):
        raise BundleError("BUNDLE_EXPIRED", f"the bundle expired at {manifest.expires}; ask for a newer release")


def _check_sequence(verified: Verified, held: Floor | None) -> None:
    manifest = verified.manifest
    minimums: Mapping[str, int] = verified.revocations.minimum_sequences if verified.revocations else {}
    minimum = minimums.get(manifest.name, 0)
    if manifest.sequence < minimum:
        raise BundleError(
            "ROLLBACK_REFUSED",
            f"{manifest.name} has sequence {manifest.sequence}; all below {minimum} were revoked",
        )
    floor = floor_in_force(manifest.name, held, verified.revocations)
    if manifest.sequence - max(minimum, floor.sequence if floor else 0) > MAX_LEAP:
        raise BundleError(
            "SEQUENCE_FAST_FORWARD",
            f"{manifest.name} has sequence {manifest.sequence}, too far on to leave room for later ones",
        )
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


def _check_models(manifest: Manifest, site: Site) -> None:
    if site.models is None:
        return
    for wanted in manifest.requires:
        if not any(_is_wanted(wanted, *model) for model in site.models):
            raise BundleError(
                "REQUIRES_UNMET", f"the bundle needs {wanted.name}, which is not here; import that first"
            )
    if manifest.base is not None and manifest.base not in {digest for _, digest in site.models}:
        raise BundleError(
            "BASE_ABSENT", "the bundle holds what changed since a model that is not here; import that first"
        )


def _is_wanted(wanted: Requirement, name: str, digest: str) -> bool:
    return wanted.name == name and wanted.model_digest in (None, digest)


def _check_licences(manifest: Manifest, site: Site) -> None:
    if site.licences is None:
        return
    for licence in manifest.licences:
        if not licences.is_allowed(licence.spdx, site.licences):
            raise BundleError(
                "LICENCE_NOT_ALLOWED", f"the licence {licence.spdx!a} is not on this site's list of licences"
            )


def _check_resources(manifest: Manifest, site: Site) -> None:
    wanted = manifest.resources
    if site.gpus is not None and wanted.gpus > site.gpus:
        raise BundleError("RESOURCES_INSUFFICIENT", f"the model needs {wanted.gpus} GPUs, there are {site.gpus}")
    if site.gpu_memory is not None and wanted.gpu_memory > site.gpu_memory:
        raise BundleError(
            "RESOURCES_INSUFFICIENT",
            f"the model needs GPUs with {wanted.gpu_memory} bytes of memory, here they have {site.gpu_memory}",
        )
