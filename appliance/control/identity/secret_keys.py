"""The symmetric keys of control, and the values derived from them.

Each key is 32 random bytes in a file of its own, mode 0600. Names are opaque and stable because they are HMACs
under a key that never leaves this folder; each use has its own label, so one never tells anything of another.

Source: RFC 2104, FIPS 198-1 (HMAC).
"""

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

_KEY_BYTES = 32
_FILES = {"cache": "cache-salt.key", "pepper": "key-pepper.key", "log": "prompt-salt.key"}


@dataclass(frozen=True, repr=False)
class SecretKeys:
    """The keys, loaded. `repr` shows none of them."""

    cache: bytes
    pepper: bytes
    log: bytes

    @classmethod
    def create(cls, folder: Path) -> "SecretKeys":
        """Draw new keys into `folder`, none of which may exist."""
        for name in _FILES.values():
            write_secret(folder / name, secrets.token_bytes(_KEY_BYTES))
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> "SecretKeys":
        """Read the keys.

        Raises:
            ValueError: a key file has the wrong size.
        """
        keys = {field: (folder / name).read_bytes() for field, name in _FILES.items()}
        if any(len(key) != _KEY_BYTES for key in keys.values()):
            raise ValueError(f"a key in {folder} is not {_KEY_BYTES} bytes; restore the folder from a backup")
        return cls(**keys)

    def scope(self, tenant: str) -> str:
        """The engine's opaque, stable name of a tenant."""
        return _mac(self.cache, "scope", tenant.encode()).hex()[:32]

    def cache_salt(self, tenant: str) -> bytes:
        """Root of a tenant's prefix cache, 32 bytes."""
        return _mac(self.cache, "prefix", tenant.encode())

    def api_key_mac(self, secret: str) -> bytes:
        """What is stored of an API key's secret."""
        return _mac(self.pepper, "api-key", secret.encode())

    def prompt_mac(self, prompt_sha256: bytes) -> str:
        """What the audit log keeps of a prompt: it answers "was this one sent?" and nothing else."""
        return _mac(self.log, "prompt", prompt_sha256).hex()


def write_secret(path: Path, content: bytes) -> None:
    """Make a file that only its owner reads, durably; it must not exist."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _mac(key: bytes, label: str, data: bytes) -> bytes:
    return hmac.new(key, label.encode() + b"\0" + data, hashlib.sha256).digest()
