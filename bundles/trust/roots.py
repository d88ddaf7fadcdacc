"""The trust root: which keys may sign what, how many of them must, and how it follows its predecessor.

A root is a TUF root document with our roles: `root` signs the next root, `release` signs manifests, `publisher`
signs models. A root is believed when it is pinned here, or when it is exactly one version on and a threshold of
both its predecessor's and its own root keys signed it.

Source: TUF specification 1.0.34, sections 4.3 and 5.3.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bundles.format import strict_json
from bundles.format.errors import BundleError
from bundles.format.manifest import format_time, parse_time
from bundles.trust.keys import Key, canonical_json
from bundles.trust.signers import Signer

SPEC_VERSION = "1.0.34"
REQUIRED_ROLES = ("root", "release", "publisher")
MAX_ROOT = 1024 * 1024
MAX_ROOTS = 16
MAX_KEYS = 64
_SIGNED_FIELDS = {"_type", "spec_version", "version", "expires", "consistent_snapshot", "keys", "roles"}
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
    """

    version: int
    expires: datetime
    keys: Mapping[str, Key]
    roles: Mapping[str, Role]
    raw: bytes

    def role_keys(self, role: str) -> tuple[Key, ...]:
        """The keys of a role, in the root's order."""
        return tuple(self.keys[keyid] for keyid in self.roles[role].keyids)

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
        BundleError: ROOT_SCHEMA, ROOT_KEYID, ROOT_KEY_DUPLICATE, ROOT_THRESHOLD, ROOT_TOO_LARGE, KEY_UNSUPPORTED,
            or a JSON code.
    """
    if len(raw) > MAX_ROOT:
        raise BundleError("ROOT_TOO_LARGE", f"the trust root has over {MAX_ROOT} bytes")
    signed, _ = _split(raw)
    root = Root(
        _version(signed.get("version")),
        _expires(signed.get("expires")),
        keys := _keys(signed.get("keys")),
        _roles(signed.get("roles"), keys),
        raw,
    )
    _check_signed(raw, root, "its own")
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


def make(
    version: int, expires: datetime, roles: Mapping[str, Sequence[Key]], thresholds: Mapping[str, int]
) -> dict[str, object]:
    """The signed part of a new root.

    Args:
        roles: keys by role.
        thresholds: by role; 1 where not given.
    """
    keys = {key.keyid: key.as_dict() for members in roles.values() for key in members}
    return {
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


def _split(raw: bytes) -> tuple[dict[str, object], list[object]]:
    document = strict_json.parse_object(raw, "the trust root")
    signed, signatures = document.get("signed"), document.get("signatures")
    if document.keys() == {"signed", "signatures"} and isinstance(signed, dict) and isinstance(signatures, list):
        is_root = signed.get("_type") == "root" and str(signed.get("spec_version")).startswith("1.")
        if is_root and signed.keys() == _SIGNED_FIELDS:
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
    for keyid, key in keys.items():
        if keyid != key.keyid:
            raise BundleError("ROOT_KEYID", "a key id of the trust root is not the digest of its key")
    if len({key.public for key in keys.values()}) != len(keys):
        raise BundleError("ROOT_KEY_DUPLICATE", "the trust root lists one key under two key ids")
    return keys


def _roles(value: object, keys: Mapping[str, Key]) -> dict[str, Role]:
    if not isinstance(value, dict) or not set(REQUIRED_ROLES) <= value.keys():
        raise BundleError("ROOT_SCHEMA", f"the trust root lacks one of the roles {', '.join(REQUIRED_ROLES)}")
    return {name: _role(name, entry, keys) for name, entry in value.items()}


def _role(name: str, entry: object, keys: Mapping[str, Key]) -> Role:
    match entry:
        case {"keyids": list(keyids), "threshold": int(threshold), **rest} if not rest:
            known = all(isinstance(keyid, str) and keyid in keys for keyid in keyids) and threshold is not True
            if known and len(set(keyids)) == len(keyids) and 1 <= threshold <= len(keyids):
                return Role(tuple(keyids), threshold)
    raise BundleError("ROOT_SCHEMA", f"the trust root's role {name!a} names unknown or repeated keys, or too few")


def _check_signed(raw: bytes, by: Root, whose: str) -> None:
    """Refuse a root that a threshold of `by`'s root keys did not sign."""
    signed, signatures = _split(raw)
    message = canonical_json(signed)
    valid = {keyid for keyid, sig in map(_signature, signatures) if _counts(keyid, sig, by, message)}
    if len(valid) < by.roles["root"].threshold:
        code = "ROOT_NOT_SIGNED_BY_OLD" if by.raw != raw else "ROOT_THRESHOLD"
        raise BundleError(code, f"the trust root is not signed by enough of {whose} root keys")


def _signature(entry: object) -> tuple[str, bytes]:
    match entry:
        case {"keyid": str(keyid), "sig": str(sig), **rest} if not rest and _HEX.fullmatch(sig):
            return keyid, bytes.fromhex(sig)
    raise BundleError("ROOT_SCHEMA", "a signature of the trust root has an unknown form")


def _counts(keyid: str, sig: bytes, by: Root, message: bytes) -> bool:
    return keyid in by.roles["root"].keyids and by.keys[keyid].verifies(sig, message)
