"""Public keys of the trust root, named by what they are, and the private halves in files.

Classical keys are Ed25519 and ECDSA on P-256, P-384 and P-521; post-quantum keys are ML-DSA. A key id is the
SHA-256 of the key's canonical JSON, as in TUF, so it cannot name another key. ECDSA signs with the hash of its
curve's size, as TUF and OMS both have it; its signatures are DER. ML-DSA signs a message's SHA-512 behind a
prefix, as TAP 21 has it, with an empty context.

Source: TUF specification 1.0.34, section 4.2; TAP 21; OLPC canonical JSON; FIPS 186-5; FIPS 204; RFC 8032.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, mldsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bundles.format.errors import BundleError

Scheme = Literal[
    "ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "ml-dsa-44/1",
    "ml-dsa-65/1",
    "ml-dsa-87/1",
]
MlDsaPublicKey = mldsa.MLDSA44PublicKey | mldsa.MLDSA65PublicKey | mldsa.MLDSA87PublicKey
MlDsaPrivateKey = mldsa.MLDSA44PrivateKey | mldsa.MLDSA65PrivateKey | mldsa.MLDSA87PrivateKey
PublicKey = Ed25519PublicKey | ec.EllipticCurvePublicKey | MlDsaPublicKey
PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey | MlDsaPrivateKey

_CURVES: dict[str, tuple[Scheme, type[ec.EllipticCurve], type[hashes.HashAlgorithm]]] = {
    "secp256r1": ("ecdsa-sha2-nistp256", ec.SECP256R1, hashes.SHA256),
    "secp384r1": ("ecdsa-sha2-nistp384", ec.SECP384R1, hashes.SHA384),
    "secp521r1": ("ecdsa-sha2-nistp521", ec.SECP521R1, hashes.SHA512),
}
_ML_DSA: tuple[tuple[Scheme, type[MlDsaPublicKey], type[MlDsaPrivateKey]], ...] = (
    ("ml-dsa-44/1", mldsa.MLDSA44PublicKey, mldsa.MLDSA44PrivateKey),
    ("ml-dsa-65/1", mldsa.MLDSA65PublicKey, mldsa.MLDSA65PrivateKey),
    ("ml-dsa-87/1", mldsa.MLDSA87PublicKey, mldsa.MLDSA87PrivateKey),
)
SCHEMES: tuple[Scheme, ...] = ("ed25519", *(c[0] for c in _CURVES.values()), *(m[0] for m in _ML_DSA))
_SPKI = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def canonical_json(value: object) -> bytes:
    """OLPC canonical JSON of objects, lists, strings, integers, booleans and null.

    Raises:
        BundleError: JSON_FLOAT.
    """
    if isinstance(value, dict):
        items = (canonical_json(key) + b":" + canonical_json(value[key]) for key in sorted(value))
        return b"{" + b",".join(items) + b"}"
    if isinstance(value, list | tuple):
        return b"[" + b",".join(map(canonical_json, value)) + b"]"
    if isinstance(value, str):
        return b'"' + value.replace("\\", "\\\\").replace('"', '\\"').encode() + b'"'
    if isinstance(value, float):
        raise BundleError("JSON_FLOAT", "canonical JSON has no fractions")
    return json.dumps(value).encode()


@dataclass(frozen=True)
class Key:
    """A public key as the trust root lists it.

    Attributes:
        scheme: how it signs.
        public: hex of the raw key for Ed25519, else PEM of the SubjectPublicKeyInfo.
    """

    scheme: Scheme
    public: str

    @classmethod
    def of(cls, key: object) -> "Key":
        """The listed form of a public key of `cryptography`.

        Raises:
            BundleError: KEY_UNSUPPORTED.
        """
        if isinstance(key, Ed25519PublicKey):
            return cls("ed25519", key.public_bytes_raw().hex())
        if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
            return cls(_CURVES[key.curve.name][0], pem_of(key))
        for scheme, public_type, _ in _ML_DSA:
            if isinstance(key, public_type):
                return cls(scheme, pem_of(key))
        raise BundleError(
            "KEY_UNSUPPORTED", "a key is none of Ed25519, ECDSA on P-256, P-384 or P-521, and ML-DSA-44, 65 or 87"
        )

    @classmethod
    def from_dict(cls, value: object) -> "Key":
        """Read the TUF form of a key.

        Raises:
            BundleError: KEY_UNSUPPORTED.
        """
        match value:
            case {"scheme": str(scheme), "keyval": {"public": str(public)}}:
                named = next((known for known in SCHEMES if known == scheme), None)
            case _:
                named, public = None, ""
        if named is None:
            raise BundleError("KEY_UNSUPPORTED", "a key of the trust root has an unknown form or scheme")
        key = cls(named, public)
        if key.as_dict() != value or cls.of(key.public_key) != key:
            raise BundleError("KEY_UNSUPPORTED", "a key of the trust root is not in its one legal form")
        return key

    def as_dict(self) -> dict[str, object]:
        """The TUF form."""
        return {"keytype": self._keytype, "scheme": self.scheme, "keyval": {"public": self.public}}

    @property
    def _keytype(self) -> str:
        if self.is_post_quantum:
            return "ml-dsa"
        return "ed25519" if self.scheme == "ed25519" else "ecdsa"

    @property
    def is_post_quantum(self) -> bool:
        """Whether a quantum computer cannot forge its signatures."""
        return self.scheme.startswith("ml-dsa-")

    @cached_property
    def keyid(self) -> str:
        """SHA-256 of the canonical TUF form, hex."""
        return hashlib.sha256(canonical_json(self.as_dict())).hexdigest()

    @cached_property
    def public_key(self) -> PublicKey:
        """The key itself.

        Raises:
            BundleError: KEY_UNSUPPORTED.
        """
        try:
            if self.scheme == "ed25519":
                return Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.public))
            key = serialization.load_pem_public_key(self.public.encode())
        except (ValueError, UnsupportedAlgorithm):
            raise BundleError("KEY_UNSUPPORTED", "a key of the trust root cannot be read") from None
        if not isinstance(key, PublicKey) or Key.of(key).scheme != self.scheme:
            raise BundleError("KEY_UNSUPPORTED", "a key of the trust root is of another kind than it says")
        return key

    def to_sign(self, message: bytes) -> bytes:
        """What the algorithm is given: the message; for ML-DSA its digest, in the form of TAP 21's version 1."""
        return b"tuf\x01" + hashlib.sha512(message).digest() if self.is_post_quantum else message

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether this key made `signature` over `message`."""
        key = self.public_key
        try:
            if isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(signature, message, ec.ECDSA(_CURVES[key.curve.name][2]()))
            else:
                key.verify(signature, self.to_sign(message))
        except InvalidSignature:
            return False
        return True


def sign(key: PrivateKey, message: bytes) -> bytes:
    """A signature that `Key.verifies` accepts.

    Raises:
        BundleError: KEY_UNSUPPORTED.
    """
    public = Key.of(key.public_key())
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(message, ec.ECDSA(_CURVES[key.curve.name][2]()))
    return key.sign(public.to_sign(message))


def pem_of(key: PublicKey) -> str:
    """PEM of the SubjectPublicKeyInfo, newline included."""
    return key.public_bytes(*_SPKI).decode()


def new_private_key(scheme: Scheme) -> PrivateKey:
    """A fresh key."""
    if scheme == "ed25519":
        return Ed25519PrivateKey.generate()
    for name, _, private_type in _ML_DSA:
        if name == scheme:
            return private_type.generate()
    return ec.generate_private_key(next(curve() for name, curve, _ in _CURVES.values() if name == scheme))


def save_private_key(key: PrivateKey, path: Path) -> None:
    """Write an unencrypted PKCS #8 PEM, readable by its owner alone; an existing file is never replaced.

    Raises:
        FileExistsError: there is one already.
    """
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as stream:
        stream.write(pem)
        stream.flush()
        os.fsync(fd)


def load_private_key(path: Path) -> PrivateKey:
    """Read a PEM private key.

    Raises:
        BundleError: KEY_UNREADABLE, KEY_UNSUPPORTED.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise BundleError("KEY_UNREADABLE", f"the key {path}: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BundleError("KEY_UNREADABLE", f"{path} is not an unencrypted PEM private key") from None
    if not isinstance(key, PrivateKey):
        raise BundleError("KEY_UNSUPPORTED", f"{path} is none of an Ed25519, an ECDSA and an ML-DSA key")
    Key.of(key.public_key())
    return key


def is_public_key(path: Path) -> bool:
    """Whether a file holds a PEM public key, by its first line of dashes."""
    try:
        return b"-----BEGIN PUBLIC KEY-----" in path.read_bytes()
    except OSError:
        return False


def load_public_key(path: Path) -> Key:
    """Read a PEM public key (SubjectPublicKeyInfo).

    Raises:
        BundleError: KEY_UNREADABLE, KEY_UNSUPPORTED.
    """
    try:
        return Key.of(serialization.load_pem_public_key(path.read_bytes()))
    except OSError as error:
        raise BundleError("KEY_UNREADABLE", f"the key {path}: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise BundleError("KEY_UNREADABLE", f"{path} is not a PEM public key") from None
