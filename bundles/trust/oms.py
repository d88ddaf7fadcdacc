"""The publisher's signature of a model folder: OpenSSF Model Signing v1.0, written and verified with raw keys.

Our profile: every file by SHA-256, no symbolic links, resources in code point order. In verifying, the listed
order is taken as it is (the reference tool orders by path component), and the world is closed: the resources must
be exactly the bundle's files, and `ignore_paths` excuses none.

Source: OpenSSF Model Signing specification v1.0; in-toto Statement v1; DSSE v1; Sigstore bundle v0.3.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bundles.format import strict_json
from bundles.format.errors import BundleError
from bundles.trust import dsse
from bundles.trust.keys import Key
from bundles.trust.signers import Signer

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
MAX_SIGNATURE = 32 * 1024 * 1024


class Resource(NamedTuple):
    """A signed file: relative path and SHA-256, hex."""

    name: str
    digest: str


@dataclass(frozen=True)
class SignedModel:
    """What a valid OMS signature says.

    Attributes:
        subject: the folder's name, as the publisher called it.
        resources: every signed file, in listed order.
        keyids: trust root key ids that signed.
    """

    subject: str
    resources: tuple[Resource, ...]
    keyids: tuple[str, ...]


def sign_model(name: str, resources: Iterable[Resource], signer: Signer) -> bytes:
    """An OMS signature over `resources`, as the bytes of a `model.sig`.

    Raises:
        BundleError: OMS_KEY_KIND, the key is not ECDSA.
    """
    if not signer.key.scheme.startswith("ecdsa"):
        raise BundleError("OMS_KEY_KIND", "an OMS signature needs an ECDSA key (P-256, P-384 or P-521)")
    listed = sorted(resources)
    payload = json.dumps(_statement(name, listed), separators=(",", ":")).encode()
    signed = dsse.Envelope(payload, PAYLOAD_TYPE).signed_by(signer)
    envelope = signed.as_dict() | {"signatures": [_unnamed(signed)]}
    hint = hashlib.sha256(signer.key.public.encode()).hexdigest()
    bundle = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": envelope,
    }
    return json.dumps(bundle, indent=1).encode() + b"\n"


def verify_model(raw: bytes, keys: Sequence[Key]) -> SignedModel:
    """What `raw` says, once at least one of `keys` is found to have signed it.

    Raises:
        BundleError: OMS_SCHEMA, OMS_KEY_KIND, OMS_SIGNATURE, OMS_UNKNOWN_KEY, OMS_METHOD, OMS_ROOT_DIGEST, BASE64,
            or a JSON code.
    """
    material, envelope = _open(raw)
    hint = _hint(material)
    hinted = [key for key in keys if hint in ("", hashlib.sha256(key.public.encode()).hexdigest())]
    if not hinted:
        raise BundleError("OMS_UNKNOWN_KEY", "the model is signed by a publisher key that the trust root lacks")
    keyids = envelope.valid_keys(keys)
    if not keyids:
        raise BundleError("OMS_SIGNATURE", "the publisher's signature does not verify; the model was changed")
    return _read_statement(envelope.payload, keyids)


def check_files(signed: SignedModel, files: Mapping[str, str]) -> None:
    """Refuse a signature over other files than `files` (path to SHA-256), exactly.

    Raises:
        BundleError: OMS_FILES_DIFFER.
    """
    theirs = {resource.name: resource.digest for resource in signed.resources}
    differing = sorted(name for name in theirs.keys() | files.keys() if theirs.get(name) != files.get(name))
    if differing:
        raise BundleError(
            "OMS_FILES_DIFFER", f"the publisher signed other files than the manifest lists, first {differing[0]!a}"
        )


def _statement(name: str, resources: Sequence[Resource]) -> dict[str, object]:
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": _root_digest(resources)}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [],
            },
            "resources": [{"name": r.name, "algorithm": "sha256", "digest": r.digest} for r in resources],
        },
    }


def _root_digest(resources: Iterable[Resource]) -> str:
    """SHA-256 over the raw digests in listed order; names are not in it, so it identifies nothing."""
    return hashlib.sha256(b"".join(bytes.fromhex(resource.digest) for resource in resources)).hexdigest()


def _unnamed(envelope: dsse.Envelope) -> dict[str, str]:
    """Our one signature as OMS wants it: without a key id."""
    match envelope.as_dict()["signatures"]:
        case [{"sig": str(sig)}]:
            return {"sig": sig, "keyid": ""}
    raise AssertionError("an envelope signed once has one signature")


def _open(raw: bytes) -> tuple[Mapping[str, object], dsse.Envelope]:
    what = "the publisher's signature"
    match strict_json.parse_object(raw, what):
        case {
            "mediaType": str(media_type),
            "verificationMaterial": dict(material),
            "dsseEnvelope": envelope,
            **rest,
        } if media_type == MEDIA_TYPE and not rest:
            opened = dsse.from_dict(envelope, what, either_alphabet=True)
            if opened.payload_type == PAYLOAD_TYPE:
                return material, opened
    raise BundleError("OMS_SCHEMA", f"{what} is not an OMS v1.0 signature")


def _hint(material: Mapping[str, object]) -> str:
    """The key's hint; empty where the publisher gave none."""
    match material:
        case {"publicKey": dict(public_key)}:
            return str(public_key.get("hint", ""))
    raise BundleError("OMS_KEY_KIND", "the publisher's signature was not made with a raw key")


def _read_statement(payload: bytes, keyids: tuple[str, ...]) -> SignedModel:
    match strict_json.parse_object(payload, "the publisher's statement"):
        case {
            "_type": str(kind),
            "subject": [{"name": str(subject), "digest": {"sha256": str(root_digest)}}],
            "predicateType": str(predicate_type),
            "predicate": {"serialization": dict(serialization), "resources": list(entries), **rest},
        } if (kind, predicate_type) == (STATEMENT_TYPE, PREDICATE_TYPE) and not rest:
            _check_method(serialization)
            resources = tuple(map(_resource, entries))
            _check_resources(resources, root_digest)
            return SignedModel(subject, resources, keyids)
    raise BundleError("OMS_SCHEMA", "the publisher's statement is not an OMS v1.0 statement")


def _check_method(serialization: Mapping[str, object]) -> None:
    wanted = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
    if any(serialization.get(name) != value for name, value in wanted.items()):
        raise BundleError("OMS_METHOD", "the publisher signed by shards, by another hash, or through links")


def _resource(entry: object) -> Resource:
    match entry:
        case {"name": str(name), "algorithm": "sha256", "digest": str(digest)}:
            if len(digest) == 64 and not digest.strip("0123456789abcdef"):
                return Resource(name, digest)
    raise BundleError("OMS_SCHEMA", "the publisher's statement lists a file in an unknown form")


def _check_resources(resources: Sequence[Resource], root_digest: str) -> None:
    if not resources or len({resource.name for resource in resources}) != len(resources):
        raise BundleError("OMS_SCHEMA", "the publisher's statement lists no file, or one twice")
    if _root_digest(resources) != root_digest:
        raise BundleError("OMS_ROOT_DIGEST", "the publisher's statement contradicts itself: digest of digests")
