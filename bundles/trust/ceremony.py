"""A trust root while it is drawn up: the roles of a first one, or of an old one with what changes.

draft = RootDraft.of(old).add("release", key).remove("release", keyid)
raw = draft.sign(expires, [root_signer])
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from cryptography import x509

from bundles.format.errors import BundleError
from bundles.trust import roots
from bundles.trust.extension import Extension
from bundles.trust.keys import Key
from bundles.trust.roots import Root
from bundles.trust.signers import Signer


@dataclass(frozen=True)
class RootDraft:
    """A root to be signed. Every method makes a new draft.

    Attributes:
        version: of the root before, and 1.
        roles: keys by role.
        thresholds: by role; where absent a majority of its keys, of a publisher's one: models have one signer.
        extension: what it says beyond TUF.
    """

    version: int = 1
    roles: Mapping[str, tuple[Key, ...]] = field(default_factory=dict)
    thresholds: Mapping[str, int] = field(default_factory=dict)
    extension: Extension = field(default_factory=Extension)

    @classmethod
    def of(cls, old: Root) -> "RootDraft":
        """The next version of a root, in which nothing changes."""
        return cls(
            old.version + 1,
            {name: old.role_keys(name) for name in old.roles},
            {name: role.threshold for name, role in old.roles.items()},
            old.extension,
        )

    def add(self, role: str, *keys: Key) -> "RootDraft":
        """More keys for a role, which is made where there is none."""
        held = self.roles.get(role, ())
        return replace(self, roles={**self.roles, role: tuple(dict.fromkeys((*held, *keys)))})

    def remove(self, role: str, keyid: str) -> "RootDraft":
        """One key of a role less; its id may be shortened as far as it stays unique. A role without keys goes.

        Raises:
            BundleError: KEY_NOT_IN_ROLE.
        """
        held = self.roles.get(role, ())
        found = [key for key in held if key.keyid.startswith(keyid)]
        if len(found) != 1:
            raise BundleError("KEY_NOT_IN_ROLE", f"{len(found)} keys of the role {role} begin with {keyid[:64]!a}")
        left = tuple(key for key in held if key not in found)
        return replace(self, roles={**self.roles, role: left})._without_empty(role)

    def demand(self, role: str, threshold: int) -> "RootDraft":
        """How many of a role's keys must sign."""
        return replace(self, thresholds={**self.thresholds, role: threshold})

    def certify(self, role: str, *authorities: x509.Certificate) -> "RootDraft":
        """More certificate authorities for a publisher's role, which is made where there is none."""
        held = self.extension.authorities.get(role, ())
        named = {**self.extension.authorities, role: tuple(dict.fromkeys((*held, *authorities)))}
        return replace(self.add(role), extension=replace(self.extension, authorities=named))

    def decertify(self, role: str, *authorities: x509.Certificate) -> "RootDraft":
        """Fewer certificate authorities for a publisher's role, which goes with the last of them and of its keys.

        Raises:
            BundleError: KEY_NOT_IN_ROLE.
        """
        held = self.extension.authorities.get(role, ())
        if not set(authorities) <= set(held):
            raise BundleError("KEY_NOT_IN_ROLE", f"the role {role} has no such certificate authority")
        named = {
            **self.extension.authorities,
            role: tuple(authority for authority in held if authority not in authorities),
        }
        extension = replace(self.extension, authorities={name: left for name, left in named.items() if left})
        lists = extension.crl_required & extension.authorities.keys()
        return replace(self, extension=replace(extension, crl_required=lists))._without_empty(role)

    def hybrid(self, *roles: str, but: Collection[str] = ()) -> "RootDraft":
        """More roles for which a classical and a post-quantum key must both sign, but not those."""
        wanted = self.extension.hybrid.union(roles).difference(but)
        return replace(self, extension=replace(self.extension, hybrid=wanted))

    def require_crl(self, *roles: str, but: Collection[str] = ()) -> "RootDraft":
        """More roles whose certificates need a revocation list in force, but not those."""
        wanted = self.extension.crl_required.union(roles).difference(but)
        return replace(self, extension=replace(self.extension, crl_required=wanted))

    def _without_empty(self, role: str) -> "RootDraft":
        """Without a role that has neither keys nor authorities, unless every root has it."""
        if self.roles.get(role) or role in self.extension.authorities or role in roots.REQUIRED_ROLES:
            return self
        others = {name: keys for name, keys in self.roles.items() if name != role}
        thresholds = {name: threshold for name, threshold in self.thresholds.items() if name != role}
        return replace(self, roles=others, thresholds=thresholds).hybrid(but=[role])

    def sign(self, expires: datetime, signers: Iterable[Signer]) -> bytes:
        """The root document, which others may have to sign, too: `roots.add_signature`.

        Raises:
            BundleError: SIGNER_FAILED.
        """
        usual = {name: 1 if "publisher" in name else len(keys) // 2 + 1 for name, keys in self.roles.items()}
        signed = roots.make(self.version, expires, self.roles, {**usual, **self.thresholds}, self.extension)
        return roots.sign_root(signed, signers)
