"""The trust root: which keys may sign what, how many of them must, and how it follows its predecessor.

A root is a TUF root document with our roles: `root` signs the next root, `release` manifests, `publisher`,
`publisher/NAME` and `site-publisher` models, `revocation` revocation documents, `custodian` approvals; all but the
first three are optional. A root is believed when it is pinned here, or when it is exactly one version on and a
threshold of both its predecessor's and its own root keys signed it. Of a chain only the last may not be expired.

Source: TUF specification 1.0.34, sections 4.3 and 5.3.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from bundles.format import strict_json
from bundles.format.errors import BundleError
from bundles.format.manifest import format_time, parse_time
from bundles.trust import extension as extensions
from bundles.trust.extension import Extension
from bundles.trust.keys import Key, canonical_json
from bundles.trust.signers import Signer

SPEC_VERSION = "1.0.34"
ROOT, RELEASE, PUBLISHER = REQUIRED_ROLES = ("root", "release", "publisher")
SITE_PUBLISHER, REVOCATION, CUSTODIAN = OPTIONAL_ROLES = ("site-publisher", "revocation", "custodian")
MAX_ROOT = 1024 * 1024
MAX_ROOTS = 16
MAX_KEYS = 64
_SIGNED_FIELDS = {"_type", "spec_version", "version", "expires", "consistent_snapshot", "keys", "roles"}
_ROLE = re.compile(rf"{'|'.join((*REQUIRED_ROLES, *OPTIONAL_ROLES))}|publisher/[a-z0-9][a-z0-9._-]{{0,62}}", re.A)
_SPEC_VERSION = re.compile(r"1(\.[0-9]{1,6}){1,2}", re.A)
_HEX = re.compile(r"(?:[0-9a-f]{2})+", re.A)  # one way to write a signature, as for everything signed


@dataclass(frozen=True)
class Role:
    """Keys that may sign for a role, and how many of them must."""

    keyids: tuple[str, ...]
    threshold: int


@dataclass(frozen=True)
class Root:
    """A trust root, well-formed and signed by a threshold of its own root keys.

    Attributes:
        version: 1 for the first; grows by one.
        expires: when it stops being believed.
        keys: by key id.
        roles: by name.
        raw: the document it was read from.
        extension: what it says beyond TUF.
    """

    version: int
    expires: datetime
    keys: Mapping[str, Key]
    roles: Mapping[str, Role]
    raw: bytes
    extension: Extension = field(default_factory=Extension)

    def role_keys(self, role: str) -> tuple[Key, ...]:
        """The keys of a role, in the root's order."""
        return tuple(self.keys[keyid] for keyid in self.roles[role].keyids)

    @property
    def publisher_roles(self) -> tuple[str, ...]:
        """The roles that may sign models: `publisher`, those of one publisher by name, then the site's own."""
        named = sorted(role for role in self.roles if role.startswith("publisher/"))
        return (PUBLISHER, *named, *(role for role in (SITE_PUBLISHER,) if role in self.roles))

    def check_fresh(self, now: datetime) -> None:
        """Refuse a root that is past its date.

        Raises:
            BundleError: ROOT_EXPIRED.
        """
        if now >= self.expires:
            raise BundleError(
                "ROOT_EXPIRED",
                f"trust root {self.version} expired at {format_time(self.expires)}; install a newer one",
            )


def parse(raw: bytes) -> Root:
    """The root in `raw`; its own root keys must have signed it.

    Raises:
        BundleError: as `read`; ROOT_THRESHOLD, PQ_SIGNATURE_MISSING, CLASSICAL_SIGNATURE_MISSING.
    """
    root = read(raw)
    _check_signed(raw, root, "its own")
    return root


def read(raw: bytes) -> Root:
    """The root in `raw`, well-formed; nobody need have signed it.

    Raises:
        BundleError: ROOT_SCHEMA, ROOT_KEYID, ROOT_KEY_DUPLICATE, ROOT_TOO_LARGE, KEY_UNSUPPORTED, or a JSON code.
    """
    if len(raw) > MAX_ROOT:
        raise BundleError("ROOT_TOO_LARGE", f"the trust root has over {MAX_ROOT} bytes")
    signed, _ = _split(raw)
    extension = extensions.parse(signed.get(extensions.NAME))
    root = Root(
        _version(signed.get("version")),
        _expires(signed.get("expires")),
        keys := _keys(signed.get("keys")),
        roles := _roles(signed.get("roles"), keys, extension),
        raw,
        extension,
    )
    extensions.check_roles(extension, {name: root.role_keys(name) for name in roles})
    return root


def load(path: Path) -> Root:
    """The root in a file, to be believed because the caller does.

    Raises:
        BundleError: ROOT_UNREADABLE, or as `parse`.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError("ROOT_UNREADABLE", f"the trust root {path}: {error.strerror}") from None
    return parse(raw)


def load_pinned(folder: Path) -> Root:
    """The newest root of a trust folder (`root.json`, `N.root.json`), each checked to follow the one before.

    Raises:
        BundleError: ROOT_MISSING, or as `load` and `advance`.
    """
    found = sorted((load(path) for path in folder.glob("*root.json")), key=lambda root: root.version)
    if not found:
        raise BundleError("ROOT_MISSING", f"no trust root in {folder}; install one as 1.root.json")
    return advance(found[0], found[1:])


def advance(trusted: Root, candidates: Iterable[Root]) -> Root:
    """Follow a chain of roots from one that is trusted; the last.

    Raises:
        BundleError: ROOT_FORKED (same version, other content), ROOT_SKIPPED (a version is missing),
            ROOT_NOT_SIGNED_BY_OLD.
    """
    for root in sorted(candidates, key=lambda candidate: candidate.version):
        if root.version < trusted.version:
            continue
        if root.version == trusted.version:
            if _split(root.raw)[0] != _split(trusted.raw)[0]:
                raise BundleError("ROOT_FORKED", f"there are two different trust roots of version {root.version}")
            continue
        if root.version != trusted.version + 1:
            raise BundleError("ROOT_SKIPPED", f"trust root {trusted.version + 1} is missing before {root.version}")
        _check_signed(root.raw, trusted, "the previous")
        trusted = root
    return trusted


def check_hybrid(keys: Iterable[Key], what: str) -> None:
    """Refuse signatures of which none is classical, or none post-quantum.

    Raises:
        BundleError: PQ_SIGNATURE_MISSING, CLASSICAL_SIGNATURE_MISSING.
    """
    kinds = {key.is_post_quantum for key in keys}
    if True not in kinds:
        raise BundleError("PQ_SIGNATURE_MISSING", f"{what} must have a post-quantum signature, too (ML-DSA)")
    if False not in kinds:
        raise BundleError("CLASSICAL_SIGNATURE_MISSING", f"{what} must have a classical signature, too")


def make(
    version: int,
    expires: datetime,
    roles: Mapping[str, Sequence[Key]],
    thresholds: Mapping[str, int],
    extension: Extension | None = None,
) -> dict[str, object]:
    """The signed part of a new root.

    Args:
        version: 1, or that of the root before and 1.
        expires: when it stops being believed.
        roles: keys by role.
        thresholds: by role; 1 where not given.
        extension: what it says beyond TUF.
    """
    keys = {key.keyid: key.as_dict() for members in roles.values() for key in members}
    beyond = extension.as_dict() if extension else {}
    return ({extensions.NAME: beyond} if beyond else {}) | {
        "_type": "root",
        "spec_version": SPEC_VERSION,
        "version": version,
        "expires": format_time(expires),
        "consistent_snapshot": True,
        "keys": keys,
        "roles": {
            name: {"keyids": [key.keyid for key in members], "threshold": thresholds.get(name, 1)}
            for name, members in roles.items()
        },
    }


def sign_root(signed: Mapping[str, object], signers: Iterable[Signer]) -> bytes:
    """A root document: `signed` and the signatures of `signers`, as bytes to keep."""
    message = canonical_json(dict(signed))
    signatures = [{"keyid": signer.key.keyid, "sig": signer.sign(message).hex()} for signer in signers]
    return json.dumps({"signatures": signatures, "signed": signed}, indent=1).encode() + b"\n"


def add_signature(raw: bytes, signer: Signer) -> bytes:
    """A root document, signed by enough or not, with one more signature; it replaces an older one of the same key.

    Raises:
        BundleError: ROOT_SCHEMA, SIGNER_FAILED, or a JSON code.
    """
    signed, signatures = _split(raw)
    others = [entry for entry in map(_signature, signatures) if entry[0] != signer.key.keyid]
    added = (signer.key.keyid, signer.sign(canonical_json(signed)))
    listed = [{"keyid": keyid, "sig": sig.hex()} for keyid, sig in (*others, added)]
    return json.dumps({"signatures": listed, "signed": signed}, indent=1).encode() + b"\n"


def fingerprint(raw: bytes) -> str:
    """What people compare of a root: SHA-256 of its canonical signed part, hex; more signatures do not change it.

    Raises:
        BundleError: ROOT_SCHEMA, or a JSON code.
    """
    return hashlib.sha256(canonical_json(_split(raw)[0])).hexdigest()


def _split(raw: bytes) -> tuple[dict[str, object], list[object]]:
    document = strict_json.parse_object(raw, "the trust root")
    signed, signatures = document.get("signed"), document.get("signatures")
    if document.keys() == {"signed", "signatures"} and isinstance(signed, dict) and isinstance(signatures, list):
        is_root = signed.get("_type") == "root" and _SPEC_VERSION.fullmatch(str(signed.get("spec_version")))
        if is_root and signed.keys() - {extensions.NAME} == _SIGNED_FIELDS and len(signatures) <= MAX_KEYS:
            return signed, signatures
    raise BundleError("ROOT_SCHEMA", "the trust root is not a TUF root document of version 1")


def _version(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BundleError("ROOT_SCHEMA", "the trust root's version is not a positive integer")
    return value


def _expires(value: object) -> datetime:
    try:
        return parse_time(str(value))
    except ValueError:
        raise BundleError("ROOT_SCHEMA", "the trust root's expiry is not a UTC time") from None


def _keys(value: object) -> dict[str, Key]:
    if not isinstance(value, dict) or not 0 < len(value) <= MAX_KEYS:
        raise BundleError("ROOT_SCHEMA", f"the trust root does not have 1 to {MAX_KEYS} keys")
    keys = {keyid: Key.from_dict(entry) for keyid, entry in value.items()}
    if len({key.public for key in keys.values()}) != len(keys):
        raise BundleError("ROOT_KEY_DUPLICATE", "the trust root lists one key under two key ids")
    for keyid, key in keys.items():
        if keyid != key.keyid:
            raise BundleError("ROOT_KEYID", "a key id of the trust root is not the digest of its key")
    return keys


def _roles(value: object, keys: Mapping[str, Key], extension: Extension) -> dict[str, Role]:
    if not isinstance(value, dict) or not set(REQUIRED_ROLES) <= value.keys():
        raise BundleError("ROOT_SCHEMA", f"the trust root lacks one of the roles {', '.join(REQUIRED_ROLES)}")
    unknown = next((name for name in value if not _ROLE.fullmatch(name)), None)
    if unknown is not None:
        raise BundleError("ROOT_SCHEMA", f"the trust root has a role {unknown[:80]!a}, which is unknown here")
    return {name: _role(name, entry, keys, name in extension.authorities) for name, entry in value.items()}


def _role(name: str, entry: object, keys: Mapping[str, Key], has_authorities: bool) -> Role:
    match entry:
        case {"keyids": list(keyids), "threshold": int(threshold), **rest} if not rest:
            known = all(isinstance(keyid, str) and keyid in keys for keyid in keyids) and threshold is not True
            if known and len(set(keyids)) == len(keyids) and 1 <= threshold <= len(keyids) + has_authorities:
                return Role(tuple(keyids), threshold)
    raise BundleError("ROOT_SCHEMA", f"the trust root's role {name!a} names unknown or repeated keys, or too few")


def _check_signed(raw: bytes, by: Root, whose: str) -> None:
    """Refuse a root that a threshold of `by`'s root keys did not sign."""
    signed, signatures = _split(raw)
    message = canonical_json(signed)
    valid = {keyid for keyid, sig in map(_signature, signatures) if _counts(keyid, sig, by, message)}
    if valid and ROOT in by.extension.hybrid:
        check_hybrid((by.keys[keyid] for keyid in valid), "the trust root")
    if len(valid) < by.roles[ROOT].threshold:
        code = "ROOT_NOT_SIGNED_BY_OLD" if by.raw != raw else "ROOT_THRESHOLD"
        raise BundleError(code, f"the trust root is not signed by enough of {whose} root keys")


def _signature(entry: object) -> tuple[str, bytes]:
    match entry:
        case {"keyid": str(keyid), "sig": str(sig), **rest} if not rest and _HEX.fullmatch(sig):
            return keyid, bytes.fromhex(sig)
    raise BundleError("ROOT_SCHEMA", "a signature of the trust root has an unknown form")


def _counts(keyid: str, sig: bytes, by: Root, message: bytes) -> bool:
    return keyid in by.roles[ROOT].keyids and by.keys[keyid].verifies(sig, message)
