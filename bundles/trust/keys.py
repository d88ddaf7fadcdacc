"""Keys of the trust root: Ed25519 and ECDSA P-256 and P-384, named by what they are.

A key id is the SHA-256 of the key's canonical JSON, as in TUF, so it cannot name another key. ECDSA signs with the
hash of its curve's size, as TUF and OMS both have it; signatures are DER.

Source: TUF specification 1.0.34, section 4.2; OLPC canonical JSON.
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
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bundles.format.errors import BundleError

Scheme = Literal["ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384"]
PublicKey = Ed25519PublicKey | ec.EllipticCurvePublicKey
PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey
_CURVES: dict[str, tuple[Scheme, type[ec.EllipticCurve], type[hashes.HashAlgorithm]]] = {
    "secp256r1": ("ecdsa-sha2-nistp256", ec.SECP256R1, hashes.SHA256),
    "secp384r1": ("ecdsa-sha2-nistp384", ec.SECP384R1, hashes.SHA384),
}


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
        public: hex of the raw key for Ed25519, PEM of the SubjectPublicKeyInfo for ECDSA.
    """

    scheme: Scheme
    public: str

    @classmethod
    def of(cls, key: PublicKey) -> "Key":
        """The listed form of a key.

        Raises:
            BundleError: KEY_UNSUPPORTED.
        """
        if isinstance(key, Ed25519PublicKey):
            return cls("ed25519", key.public_bytes_raw().hex())
        if key.curve.name not in _CURVES:
            raise BundleError("KEY_UNSUPPORTED", f"keys on {key.curve.name} are not used here; use P-256 or P-384")
        return cls(_CURVES[key.curve.name][0], pem_of(key))

    @classmethod
    def from_dict(cls, value: object) -> "Key":
        """Read the TUF form of a key.

        Raises:
            BundleError: KEY_UNSUPPORTED.
        """
        match value:
            case {"scheme": "ed25519" | "ecdsa-sha2-nistp256" | "ecdsa-sha2-nistp384" as scheme, "keyval": keyval}:
                key = cls(scheme, str(keyval.get("public")) if isinstance(keyval, dict) else "")
            case _:
                raise BundleError("KEY_UNSUPPORTED", "a key of the trust root has an unknown form")
        if key.as_dict() != value or cls.of(key.public_key) != key:
            raise BundleError("KEY_UNSUPPORTED", "a key of the trust root is not in its one legal form")
        return key

    def as_dict(self) -> dict[str, object]:
        """The TUF form."""
        keytype = "ed25519" if self.scheme == "ed25519" else "ecdsa"
        return {"keytype": keytype, "scheme": self.scheme, "keyval": {"public": self.public}}

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
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise BundleError("KEY_UNSUPPORTED", "a key of the trust root is of another kind than it says")
        return key

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether this key made `signature` over `message`."""
        key = self.public_key
        try:
            if isinstance(key, Ed25519PublicKey):
                key.verify(signature, message)
            else:
                key.verify(signature, message, ec.ECDSA(_CURVES[key.curve.name][2]()))
        except InvalidSignature:
            return False
        return True


def sign(key: PrivateKey, message: bytes) -> bytes:
    """A signature that `Key.verifies` accepts.

    Raises:
        BundleError: KEY_UNSUPPORTED.
    """
    Key.of(key.public_key())
    if isinstance(key, Ed25519PrivateKey):
        return key.sign(message)
    return key.sign(message, ec.ECDSA(_CURVES[key.curve.name][2]()))


def pem_of(key: PublicKey) -> str:
    """PEM of the SubjectPublicKeyInfo, newline included."""
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(encoding, form).decode()


def new_private_key(scheme: Scheme) -> PrivateKey:
    """A fresh key."""
    if scheme == "ed25519":
        return Ed25519PrivateKey.generate()
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
    if not isinstance(key, Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise BundleError("KEY_UNSUPPORTED", f"{path} is neither an Ed25519 nor an ECDSA key")
    Key.of(key.public_key())
    return key
