"""API keys: `clo_ID_SECRET_CRC`, of which only an HMAC of the secret is kept.

The secret has 256 random bits, so a slow password hash would add nothing but a way to exhaust us. The CRC lets a
scanner and a person recognise a damaged key; it protects nothing.
"""

import base64
import hmac
import re
import secrets
import time
import zlib
from dataclasses import dataclass
from datetime import timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from appliance.control.db.models import ApiKey
from appliance.control.identity.secret_keys import SecretKeys

_FORM = re.compile(r"clo_([0-9a-f]{12})_([a-z2-7]{52})_([0-9a-f]{8})")
_NOBODY = b"\0" * 32


@dataclass(frozen=True)
class NewApiKey:
    """A key just drawn: shown once, kept as `mac`."""

    key_id: str
    text: str
    mac: bytes

    def __repr__(self) -> str:
        return f"NewApiKey({self.key_id})"

    def row(self, tenant: str, application: str, certificate: x509.Certificate, valid: timedelta) -> ApiKey:
        """What control.db keeps of it: from now on, beside the certificate issued with it."""
        now = time.time_ns()
        return ApiKey(
            key_id=self.key_id,
            tenant=tenant,
            application=application,
            secret_hmac=self.mac,
            certificate_sha256=certificate.fingerprint(hashes.SHA256()),
            created_ns=now,
            expires_ns=now + valid // timedelta(microseconds=1) * 1000,
        )


def draw(keys: SecretKeys) -> NewApiKey:
    """A new key."""
    key_id = secrets.token_hex(6)
    secret = base64.b32encode(secrets.token_bytes(32)).decode().rstrip("=").lower()
    body = f"clo_{key_id}_{secret}"
    return NewApiKey(key_id, f"{body}_{_crc(body)}", keys.api_key_mac(secret))


@dataclass(frozen=True, repr=False)
class PresentedKey:
    """A key as a caller sent it; one that has not the form gets an id nobody has."""

    key_id: str
    secret: str

    @classmethod
    def parse(cls, text: str) -> "PresentedKey":
        """Read the text of a key."""
        match = _FORM.fullmatch(text)
        if match is None or _crc(text.rpartition("_")[0]) != match[3]:
            return cls("", text[:128])
        return cls(match[1], match[2])

    def matches(self, stored: bytes | None, keys: SecretKeys) -> bool:
        """The secret is the stored one; the same work is done for a key that does not exist."""
        equal = hmac.compare_digest(keys.api_key_mac(self.secret), stored or _NOBODY)
        return equal and stored is not None


def _crc(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
