"""What became of a version that is installed: whether revocations still let it be used."""

from dataclasses import dataclass

from bundles.trust.revocation import Revocations
from bundles.trust.roots import PUBLISHER, RELEASE, Root


@dataclass(frozen=True)
class Installed:
    """A committed version, as its record has it.

    Attributes:
        name: the model's name.
        sequence: of the release.
        model_digest: SHA-256 of its signed manifest, hex.
        signers: ids of the release keys that counted.
        publishers: ids of the publisher's keys that counted.
        certificates: `certificate_id` of the publisher's certificates.
    """

    name: str
    sequence: int
    model_digest: str
    signers: tuple[str, ...]
    publishers: tuple[str, ...] = ()
    certificates: tuple[str, ...] = ()


def revoked(installed: Installed, root: Root, revocations: Revocations | None) -> str:
    """Why a version that is installed must not be used any more, as a stable code; empty where it may.

    A key that was rotated out still vouches for what it signed; a revoked one does not.
    """
    if revocations is None:
        return ""
    if installed.model_digest in revocations.manifests:
        return "MANIFEST_REVOKED"
    if installed.sequence < revocations.minimum_sequences.get(installed.name, 0):
        return "SEQUENCE_REVOKED"
    if not revocations.certificates.isdisjoint(installed.certificates):
        return "CERTIFICATE_REVOKED"
    for role, keyids in ((RELEASE, installed.signers), (PUBLISHER, installed.publishers)):
        left = [keyid for keyid in keyids if keyid not in revocations.keys]
        must = root.roles[role].threshold if role == RELEASE else 1
        if len(left) < min(must, len(keyids)):
            return "KEY_REVOKED"
    return ""
