"""The publisher's signature of a model folder: OpenSSF Model Signing v1.0, written and read. See `publishers.py`.

Our profile: every file by SHA-256, no symbolic links, resources in code point order, a raw key or a certificate
chain, and where wanted a second, post-quantum signature behind the ECDSA one, which the reference tool passes
over. In reading, the listed order is taken as it is (the reference tool orders by path component), and the world
is closed: the resources must be exactly the bundle's files, and `ignore_paths` excuses none.

Source: OpenSSF Model Signing specification v1.0; in-toto Statement v1; DSSE v1; Sigstore bundle v0.3.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import Encoding

from bundles.format import strict_json
from bundles.format.errors import BundleError
from bundles.trust import dsse
from bundles.trust.certificates import MALFORMED, MAX_CHAIN
from bundles.trust.keys import Key
from bundles.trust.signers import Signer

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
MAX_SIGNATURE = 32 * 1024 * 1024
_MATERIAL = {"publicKey", "x509CertificateChain", "tlogEntries", "timestampVerificationData"}


class Resource(NamedTuple):
    """A signed file: relative path and SHA-256, hex."""

    name: str
    digest: str


@dataclass(frozen=True)
class ModelSignature:
    """An OMS signature as it was read; nothing of it is believed.

    Attributes:
        envelope: the statement and its signatures.
        hint: SHA-256 of the signing key's PEM, hex; empty where there is none.
        chain: certificates, the signing one first; empty with a raw key.
    """

    envelope: dsse.Envelope
    hint: str
    chain: tuple[x509.Certificate, ...]


@dataclass(frozen=True)
class Statement:
    """What an OMS signature says.

    Attributes:
        subject: the folder's name, as the publisher called it.
        resources: every signed file, in listed order.
    """

    subject: str
    resources: tuple[Resource, ...]


def sign_model(
    name: str,
    resources: Iterable[Resource],
    signer: Signer,
    *,
    chain: Sequence[x509.Certificate] = (),
    second: Signer | None = None,
) -> bytes:
    """An OMS signature over `resources`, as the bytes of a `model.sig`.

    Args:
        name: what the folder is called.
        resources: its files.
        signer: an ECDSA key.
        chain: its certificate and those that lead to an authority; none for a raw key.
        second: an ML-DSA key that signs, too.

    Raises:
        BundleError: OMS_KEY_KIND, SIGNER_FAILED.
    """
    _check_signers(signer, chain, second)
    payload = json.dumps(_statement(name, sorted(resources)), separators=(",", ":")).encode()
    envelope = dsse.Envelope(payload, PAYLOAD_TYPE)
    signers = (signer, second) if second else (signer,)
    signatures = tuple(dsse.Signature("", held.sign(envelope.signed_bytes)) for held in signers)
    bundle = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {**_material(signer.key, chain), "tlogEntries": []},
        "dsseEnvelope": dsse.Envelope(payload, PAYLOAD_TYPE, signatures).as_dict(),
    }
    return json.dumps(bundle, indent=1).encode() + b"\n"


def read(raw: bytes) -> ModelSignature:
    """The signature in the bytes of a `model.sig`.

    Raises:
        BundleError: OMS_SCHEMA, OMS_KEY_KIND, BASE64, or a JSON code.
    """
    what = "the publisher's signature"
    match strict_json.parse_object(raw, what):
        case {
            "mediaType": str(media_type),
            "verificationMaterial": dict(material),
            "dsseEnvelope": envelope,
            **rest,
        } if media_type == MEDIA_TYPE and not rest:
            opened = dsse.from_dict(envelope, what, foreign=True)
            if opened.payload_type == PAYLOAD_TYPE and opened.signatures:
                return ModelSignature(opened, *_read_material(material))
    raise BundleError("OMS_SCHEMA", f"{what} is not an OMS v1.0 signature")


def read_statement(payload: bytes) -> Statement:
    """The statement that was signed.

    Raises:
        BundleError: OMS_SCHEMA, OMS_METHOD, OMS_ROOT_DIGEST, or a JSON code.
    """
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
            return Statement(subject, resources)
    raise BundleError("OMS_SCHEMA", "the publisher's statement is not an OMS v1.0 statement")


def check_files(resources: Iterable[Resource], files: Mapping[str, str]) -> None:
    """Refuse a signature over other files than `files` (path to SHA-256), exactly.

    Raises:
        BundleError: OMS_FILES_DIFFER.
    """
    theirs = dict(resources)
    differing = sorted(name for name in theirs.keys() | files.keys() if theirs.get(name) != files.get(name))
    if differing:
        raise BundleError(
            "OMS_FILES_DIFFER", f"the publisher signed other files than the manifest lists, first {differing[0]!a}"
        )


def hint_of(key: Key) -> str:
    """How OMS names a raw key: SHA-256 of its PEM, newline included, hex."""
    return hashlib.sha256(key.public.encode()).hexdigest()


def _check_signers(signer: Signer, chain: Sequence[x509.Certificate], second: Signer | None) -> None:
    if not signer.key.scheme.startswith("ecdsa"):
        raise BundleError("OMS_KEY_KIND", "an OMS signature needs an ECDSA key (P-256, P-384 or P-521)")
    if second is not None and not second.key.is_post_quantum:
        raise BundleError("OMS_KEY_KIND", "the second signature of a model needs an ML-DSA key")
    if chain and Key.of(chain[0].public_key()) != signer.key:
        raise BundleError("OMS_KEY_KIND", "the first certificate of the chain is not the signing key's")


def _material(key: Key, chain: Sequence[x509.Certificate]) -> dict[str, object]:
    if not chain:
        return {"publicKey": {"hint": hint_of(key)}}
    ders = (certificate.public_bytes(Encoding.DER) for certificate in chain)
    return {"x509CertificateChain": {"certificates": [{"rawBytes": base64.b64encode(d).decode()} for d in ders]}}


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


def _read_material(material: Mapping[str, object]) -> tuple[str, tuple[x509.Certificate, ...]]:
    """The key's hint and the certificates; keyless signatures need a network and are refused."""
    if not material.keys() <= _MATERIAL:
        raise BundleError(
            "OMS_KEY_KIND", "the publisher signed neither with a raw key nor with a certificate chain"
        )
    match material:
        case {"x509CertificateChain": {"certificates": list(entries)}} if 0 < len(entries) <= MAX_CHAIN:
            if "publicKey" not in material:
                return "", tuple(map(_certificate, entries))
        case {"publicKey": dict(key)} if "x509CertificateChain" not in material:
            return _read_hint(key), ()
    raise BundleError("OMS_SCHEMA", "the publisher's signature does not say how it was made")


def _read_hint(key: Mapping[str, object]) -> str:
    """Of the key itself where an older tool put it there: rawBytes, base64 of its PEM or DER."""
    match key:
        case {"hint": str(hint)}:
            return hint
        case {"rawBytes": str(encoded)}:
            raw = _decoded(encoded)
            load = serialization.load_pem_public_key if raw[:5] == b"-----" else serialization.load_der_public_key
            try:
                return hint_of(Key.of(load(raw)))
            except (ValueError, UnsupportedAlgorithm):
                raise BundleError("OMS_SCHEMA", "the publisher's key cannot be read") from None
    return ""


def _certificate(entry: object) -> x509.Certificate:
    match entry:
        case {"rawBytes": str(encoded), **rest} if not rest:
            try:
                return x509.load_der_x509_certificate(_decoded(encoded))
            except MALFORMED:
                pass
    raise BundleError("OMS_SCHEMA", "a certificate of the publisher cannot be read")


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text.translate(str.maketrans("-_", "+/")), validate=True)
    except (binascii.Error, ValueError):
        raise BundleError("BASE64", "the publisher's signature has bytes that are not base64") from None


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
