"""How the trust in force stands: what it says of installed versions, and what about it needs attention."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from bundles.importer.floors import Floors
from bundles.importer.records import ModelVersion
from bundles.importer.workplace import Workplace
from bundles.trust.installed import Installed, revoked
from bundles.trust.policy import CLOCK_TOLERANCE, clock_floor
from bundles.trust.revocation import Revocations
from bundles.trust.roots import CUSTODIAN, Root
from bundles.trust.roots import REVOCATION as REVOCATION_ROLE

STALE_AFTER = timedelta(days=45)
EXPIRES_SOON = timedelta(days=90)
REVOCATION_SOON = timedelta(days=14)


@dataclass(frozen=True)
class Standing:
    """The trust in force at one moment.

    Attributes:
        root: the newest root.
        revocations: the newest revocations; None before the first.
        floors: what may not sink.
        clock_floor: a moment that has surely passed.
        warnings: what needs attention: TRUST_STALE (nothing new for 45 days), ROOT_EXPIRED, ROOT_EXPIRES_SOON (in
            90 days), ROOT_ROLLBACK (a newer one was in force here), REVOCATION_MISSING, REVOCATION_EXPIRED,
            REVOCATION_EXPIRES_SOON (in 14 days), CLOCK_BEHIND.
    """

    root: Root
    revocations: Revocations | None
    floors: Floors
    clock_floor: datetime
    warnings: tuple[str, ...]

    @property
    def approvals_required(self) -> int:
        """How many custodians must approve a version; 0 where the root has none."""
        role = self.root.roles.get(CUSTODIAN)
        return role.threshold if role else 0

    def revoked(self, version: ModelVersion) -> str:
        """Why a version must not be used any more; empty where it may."""
        installed = Installed(
            version.name,
            version.sequence,
            version.model_digest,
            version.signers,
            version.publishers,
            version.certificates,
        )
        return revoked(installed, self.root, self.revocations)


def standing(place: Workplace) -> Standing:
    """The trust in force now.

    Raises:
        BundleError: ROOT_MISSING, FLOORS_DAMAGED, what is wrong with an installed document.
    """
    root, revocations, floors, now = place.pinned(), place.revocations(), place.floors(), place.now()
    floor = clock_floor(floors.clock, revocations)
    conditions = {
        "ROOT_EXPIRED": now >= root.expires,
        "ROOT_EXPIRES_SOON": root.expires - EXPIRES_SOON <= now < root.expires,
        "ROOT_ROLLBACK": root.version < floors.root,
        "REVOCATION_MISSING": revocations is None and REVOCATION_ROLE in root.roles,
        "REVOCATION_EXPIRED": revocations is not None and now >= revocations.expires,
        "REVOCATION_EXPIRES_SOON": revocations is not None
        and revocations.expires - REVOCATION_SOON <= now < revocations.expires,
        "TRUST_STALE": now - _newest_document(place, revocations) > STALE_AFTER,
        "CLOCK_BEHIND": now < floor - CLOCK_TOLERANCE,
    }
    return Standing(root, revocations, floors, floor, tuple(code for code, holds in conditions.items() if holds))


def _newest_document(place: Workplace, revocations: Revocations | None) -> datetime:
    """When the newest trust document came: revocations say it themselves, of a root its file's time tells."""
    written = max(path.stat().st_mtime for path in place.trust.glob("*root.json"))
    came = datetime.fromtimestamp(written, UTC)
    return max(came, revocations.issued_at) if revocations else came
