"""The signed head outside the database, and the key that signs it."""

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from appliance.control.audit import note
from appliance.control.audit.note import Checkpoint, NoteError

LAG_NS = 1_000_000_000
"""The records that a crash may leave beyond the durable head span less than this, or are one commit."""
_READS = 5
_READ_AGAIN = 0.005  # seconds


@dataclass(frozen=True)
class Signer:
    """Who signs for the log: its name and its private key."""

    origin: str
    key: Ed25519PrivateKey

    @property
    def public_key(self) -> bytes:
        """The public half, 32 bytes."""
        return self.key.public_key().public_bytes_raw()

    def sign(self, size: int, root: bytes, previous: bytes, *, head: bool) -> str:
        """A signed note over this state of the log, with the digest of the checkpoint before."""
        return note.sign(Checkpoint(self.origin, size, root, previous), self.key, head=head)


def load_signer(path: Path, origin: str) -> Signer:
    """The signer whose PKCS#8 PEM key lies at `path`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no unencrypted Ed25519 private key, or the origin is no name for a log.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError(f"{path} holds no unencrypted private key in PEM") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path} holds no Ed25519 key")
    return Signer(note.check_origin(origin), key)


def make_key(path: Path, origin: str) -> None:
    """Make the audit key at `path` (mode 0600) and its public half beside it, as `.pub`.

    Raises:
        FileExistsError: a key is there already.
    """
    note.check_origin(origin)
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    public = note.verifier_key(origin, key.public_key().public_bytes_raw())
    path.with_suffix(".pub").write_text(public + "\n", encoding="ascii")
    sync_directory(path.parent)


def load_public_key(path: Path) -> bytes:
    """The 32 bytes of a public key file: a verifier key (`name+id+base64`) or PEM.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither, or not Ed25519.
    """
    data = path.read_bytes()
    if data.startswith(b"-----BEGIN"):
        key = serialization.load_pem_public_key(data)
        if isinstance(key, Ed25519PublicKey):
            return key.public_bytes_raw()
        raise ValueError(f"{path} holds no Ed25519 key")
    return note.parse_verifier_key(data.decode("ascii", errors="replace"))


def read_head(path: Path, public_key: bytes) -> Checkpoint:
    """What the head file states.

    Raises:
        FileNotFoundError: there is none.
        NoteError: it is no head signed by `public_key`.
    """
    for _ in range(_READS - 1):
        try:
            return _read_head(path, public_key)
        except NoteError:  # it may be half old and half new while it is being written
            time.sleep(_READ_AGAIN)
    return _read_head(path, public_key)


def _read_head(path: Path, public_key: bytes) -> Checkpoint:
    return note.verify(path.read_bytes().decode("utf-8", errors="replace"), public_key, head=True)


class HeadFile:
    """The head as the writer keeps it.

    A head as long as the one before overwrites it in place: both lie in one sector, so a power cut leaves one or
    the other, and the commit path is spared a rename. A longer one, when the size gains a digit, replaces the
    file. Not every head is flushed; `settle` bounds what a power cut takes back, so that `verify` need accept no
    more than that.

    Args:
        path: the head file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._length = 0
        self._unsynced = False
        self._synced_ns = 0  # on the clock of the records

    def settle(self, mono_ns: int) -> None:
        """Flush a head that is `LAG_NS` old; called before records stamped `mono_ns` are committed.

        Raises:
            OSError: the head could not be made durable.
        """
        if self._unsynced and self._is_due(mono_ns):
            self.sync(mono_ns)

    def write(self, signed: str, mono_ns: int) -> None:
        """Make this the head; the last record it covers is stamped `mono_ns`.

        Raises:
            OSError: it could not be written; the old one may still stand.
        """
        data = signed.encode()
        if self._descriptor < 0 or len(data) != self._length:
            self._replace(data)
            self._unsynced, self._synced_ns = False, mono_ns
            return
        self._unsynced = True
        if os.pwrite(self._descriptor, data, 0) != len(data):
            raise _short(self._path)
        if self._is_due(mono_ns):
            self.sync(mono_ns)

    def sync(self, mono_ns: int) -> None:
        """Make the head durable, at `mono_ns`; one that somebody moved or replaced is written anew next time."""
        if self._descriptor >= 0:
            os.fdatasync(self._descriptor)
            if self._is_elsewhere():
                self.close()
        self._unsynced, self._synced_ns = False, mono_ns

    def close(self) -> None:
        """Close the file; without `sync`, its last second is in the kernel's hands."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _is_due(self, mono_ns: int) -> bool:
        return not 0 <= mono_ns - self._synced_ns < LAG_NS

    def _is_elsewhere(self) -> bool:
        try:
            return not os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except FileNotFoundError:
            return True

    def _replace(self, data: bytes) -> None:
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        self.close()
        self._descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._length = os.write(self._descriptor, data)
        if self._length != len(data):
            raise _short(temporary)
        os.fdatasync(self._descriptor)
        temporary.replace(self._path)
        sync_directory(self._path.parent)


def _short(path: Path) -> OSError:
    return OSError(errno.ENOSPC, "written in part only", str(path))


def sync_file(path: Path) -> None:
    """Make a file that another process wrote durable, and its name."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
