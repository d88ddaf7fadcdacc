"""What became of a version that is installed: whether revocations still let it be used."""

from collections.abc import Collection
from dataclasses import dataclass

from bundles.trust.revocation import Revocations
from bundles.trust.roots import RELEASE, Root


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
    publishers = [
        name for name in root.publisher_roles if not set(root.roles[name].keyids).isdisjoint(installed.publishers)
    ]
    for roles, keyids in (([RELEASE], installed.signers), (publishers, installed.publishers)):
        if not _vouch(keyids, [keyid for keyid in keyids if keyid not in revocations.keys], roles, root):
            return "KEY_REVOKED"
    return ""


def _vouch(signed: Collection[str], left: Collection[str], roles: Collection[str], root: Root) -> bool:
    """Whether the keys that are left of those that signed are enough; no role demands more than it got then."""
    must = max((root.roles[role].threshold for role in roles), default=1)
    is_hybrid = not root.extension.hybrid.isdisjoint(roles)
    return len(left) >= min(must, len(signed)) and (not is_hybrid or _kinds(left, root) == _kinds(signed, root))


def _kinds(keyids: Collection[str], root: Root) -> set[bool]:
    """Which kinds of keys these are, post-quantum or not; a certificate's key, which the root lacks, is not."""
    return {keyid in root.keys and root.keys[keyid].is_post_quantum for keyid in keyids}
