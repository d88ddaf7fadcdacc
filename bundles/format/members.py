"""A bundle's members by name, and the two small documents that stand at either end of every volume."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from bundles.format import strict_json
from bundles.format.errors import BundleError
from bundles.format.manifest import Manifest

HEADER = "header.json"
REVOCATION = "trust/revocation.json"
MANIFEST = "manifest.dsse.json"
OMS = "oms.sig"
END = "end.json"
FIXED = frozenset({HEADER, REVOCATION, MANIFEST, OMS, END})
FORMAT = "cloister.bundle"
FORMAT_VERSION = 1
TRUST = "trust"
KINDS = frozenset({"model", "adapter", "draft", TRUST})
MAX_HEADER = 4096
MAX_REVOCATION = 4 * 1024 * 1024
MAX_ENVELOPE = 44 * 1024 * 1024


def root_member(version: int) -> str:
    """The member name of a trust root."""
    return f"trust/{version}.root.json"


def root_version(name: str) -> int | None:
    """The version of the trust root that a member holds; None where it holds none."""
    digits = name.removeprefix("trust/").removesuffix(".root.json")
    if len(digits) < 16 and digits.isascii() and digits.isdecimal() and name == root_member(int(digits)):
        return int(digits)
    return None


def chunk_member(digest: str) -> str:
    """The member name of a chunk."""
    return f"c/{digest}"


def header_hints(manifest: Manifest, volume: int = 1) -> dict[str, object]:
    """What `header.json` of a volume says: hints for people and tools, believed by nobody."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bundle_id": manifest.bundle_id,
        "kind": manifest.kind,
        "name": manifest.name,
        "version": manifest.version,
        "total_size": manifest.total_size,
        "volume": volume,
        "volumes": max(1, len(manifest.volumes)),
    }


def end_document(manifest: Manifest, chunks: int, volume: int = 1) -> dict[str, object]:
    """What `end.json` of a volume with so many chunks must say."""
    return {"bundle_id": manifest.bundle_id, "volume": volume, "chunks": chunks}


def encode_hints(value: Mapping[str, object]) -> bytes:
    """A header or end document as bytes."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def read_hints(raw: bytes) -> dict[str, object]:
    """The hints of a `header.json`, of a format and kind that this version reads.

    Raises:
        BundleError: HEADER_FORMAT, the JSON codes.
    """
    hints = strict_json.parse_object(raw, HEADER)
    match hints:
        case {"format": "cloister.bundle", "format_version": int(version), "kind": str(kind)} if (
            version == FORMAT_VERSION and version is not True and kind in KINDS
        ):
            return hints
    raise BundleError("HEADER_FORMAT", "this is no bundle of a format that this version reads")


def check_first(raw: bytes) -> str:
    """The kind of the bundle whose first volume begins with the header `raw`.

    Raises:
        BundleError: HEADER_FORMAT, VOLUME_ORDER, the JSON codes.
    """
    hints = read_hints(raw)
    volume, volumes = hints.get("volume", 1), hints.get("volumes", 1)
    if isinstance(volume, int) and volume != 1:
        raise BundleError(
            "VOLUME_ORDER", f"this is volume {volume} of {volumes!a}; volume 1 is wanted, which the others follow"
        )
    return str(hints["kind"])


def check_volume(raw: bytes, manifest: Manifest, wanted: int) -> None:
    """Refuse the header of a medium that is not volume `wanted` of this bundle.

    Raises:
        BundleError: VOLUME_ORDER, VOLUME_MIXED, HEADER_FORMAT, the JSON codes.
    """
    hints, right = read_hints(raw), header_hints(manifest, wanted)
    label = f"volume {wanted} of {max(1, len(manifest.volumes))} of {manifest.reference} is wanted"
    if hints.get("bundle_id") != manifest.bundle_id:
        raise BundleError("VOLUME_MIXED", f"{label}; this belongs to another bundle, {hints.get('name')!a}")
    if hints.get("volume") != wanted:
        raise BundleError("VOLUME_ORDER", f"{label}; this is volume {hints.get('volume')!a}")
    if not same(hints, right):
        raise BundleError("VOLUME_MIXED", f"{label}; this one says of itself what the manifest does not say")


def same(found: Mapping[str, object], expected: Mapping[str, object]) -> bool:
    """Whether two JSON objects are equal; unlike in Python, true is not 1."""
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


@dataclass(frozen=True)
class TrustHead:
    """The members of a trust bundle, as they are in the container; nothing of them is believed.

    Attributes:
        header: header.json.
        roots: trust roots, ascending.
        revocation: the revocation document, where it brings one.
    """

    header: bytes
    roots: tuple[bytes, ...]
    revocation: bytes | None


def trust_members(roots: Sequence[tuple[int, bytes]], revocation: bytes | None) -> Iterator[tuple[str, bytes]]:
    """The members of a trust bundle, in order.

    Args:
        roots: version and bytes of each, ascending.
        revocation: the revocation document.
    """
    yield HEADER, encode_hints(trust_header())
    for version, raw in roots:
        yield root_member(version), raw
    if revocation is not None:
        yield REVOCATION, revocation
    yield END, encode_hints(trust_end(len(roots) + (revocation is not None)))


def trust_header() -> dict[str, object]:
    """What `header.json` of a trust bundle says."""
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "kind": TRUST}


def trust_end(documents: int) -> dict[str, object]:
    """What `end.json` of a trust bundle with so many documents must say."""
    return {"kind": TRUST, "documents": documents}


def refuse_unlisted(name: str) -> NoReturn:
    """Refuse a member that nothing lists.

    Raises:
        BundleError: CONTAINER_UNLISTED.
    """
    raise BundleError("CONTAINER_UNLISTED", f"the bundle has {name!a}, which no manifest lists")
