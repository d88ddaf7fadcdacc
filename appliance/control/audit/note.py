"""Checkpoints of the log as C2SP signed notes: origin, size, root, digest of the note before, Ed25519 signature.

Two kinds are signed and neither passes for the other. A *checkpoint* goes into the database with the commit it
describes, and from there to paper, media and clients. A *head* has one more line and lives outside the database:
whoever truncates the log finds old checkpoints in it, but no old head to put in place of the present one.

Each note holds the digest of the last checkpoint signed before it: the head so vouches for every checkpoint, at
the price of a hash instead of a signature for each.

Source: C2SP signed-note and tlog-checkpoint; RFC 8032 (Ed25519).
"""

import base64
import binascii
import hashlib
import re
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

HEAD_LINE = "cloister-audit-head"
_ED25519 = b"\x01"
FIRST = bytes(32)
"""What stands for the digest of a note before the first."""
_NAME = re.compile(r"[!-*,-~]{1,120}")  # a head, which has it twice, fits a sector of 512 bytes
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")


class NoteError(ValueError):
    """The note is malformed, is of another kind, or its signature does not hold."""

    code = "HEAD_INVALID"


class Checkpoint(NamedTuple):
    """What a note states: the log of this origin had this size and this RFC 9162 root, `previous` came before.

    `previous` is the `digest` of the last checkpoint signed before this note: for a checkpoint that of the commit
    before, for a head that of its own size; `FIRST` when there is none.
    """

    origin: str
    size: int
    root: bytes
    previous: bytes = FIRST


def digest(note: bytes) -> bytes:
    """SHA-256 over a whole note, signatures included."""
    return hashlib.sha256(note).digest()


def check_origin(origin: str) -> str:
    """`origin`, which is the name of the log and of its key.

    Raises:
        ValueError: it is not 1 to 120 printable ASCII characters without blanks and plus signs.
    """
    if not _NAME.fullmatch(origin):
        raise ValueError("an audit origin is 1 to 120 printable ASCII characters, no blank and no '+'")
    return origin


def sign(checkpoint: Checkpoint, key: Ed25519PrivateKey, *, head: bool) -> str:
    """The signed note, as a checkpoint or as a head."""
    text = _text(checkpoint, head=head)
    signature = key_id(checkpoint.origin, key.public_key().public_bytes_raw()) + key.sign(text.encode())
    return f"{text}\n— {checkpoint.origin} {base64.b64encode(signature).decode()}\n"


def verify(note: str, public_key: bytes, *, head: bool) -> Checkpoint:
    """What a note states, once a signature of `public_key` (32 bytes) on it holds.

    Signatures of other keys are ignored, as witnesses may add theirs.

    Raises:
        NoteError: malformed, of the other kind, unsigned by this key, or the signature does not hold.
    """
    text, separator, signatures = note.rpartition("\n\n")
    if not separator:
        raise NoteError("no blank line between text and signatures")
    checkpoint = _parse(text + "\n", head=head)
    prefix, wanted = f"— {checkpoint.origin} ", key_id(checkpoint.origin, public_key)
    for line in signatures.split("\n"):
        raw = _decode(line.removeprefix(prefix)) if line.startswith(prefix) else b""
        if raw[:4] == wanted:
            _check_signature(public_key, raw[4:], text + "\n")
            return checkpoint
    raise NoteError("no signature of the audit key")


def key_id(name: str, public_key: bytes) -> bytes:
    """First four bytes of SHA-256(name || newline || 0x01 || public key)."""
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + public_key).digest()[:4]


def verifier_key(name: str, public_key: bytes) -> str:
    """The public key as text, `name+id+base64`, as foreign verifiers of signed notes take it."""
    return f"{name}+{key_id(name, public_key).hex()}+{base64.b64encode(_ED25519 + public_key).decode()}"


def parse_verifier_key(text: str) -> bytes:
    """The 32 bytes of a key in `verifier_key` form.

    Raises:
        ValueError: malformed, not Ed25519, or the id does not fit name and key.
    """
    name, _, rest = text.strip().partition("+")
    identifier, _, encoded = rest.partition("+")
    raw = _decode(encoded)
    if len(raw) != 33 or raw[:1] != _ED25519 or key_id(name, raw[1:]).hex() != identifier:
        raise ValueError("not an Ed25519 verifier key (name+id+base64)")
    return raw[1:]


def _text(checkpoint: Checkpoint, *, head: bool) -> str:
    root, previous = (base64.b64encode(value).decode() for value in (checkpoint.root, checkpoint.previous))
    return f"{checkpoint.origin}\n{checkpoint.size}\n{root}\n{previous}\n" + (f"{HEAD_LINE}\n" if head else "")


def _parse(text: str, *, head: bool) -> Checkpoint:
    lines = text.split("\n")
    if len(lines) < 5 or not _NAME.fullmatch(lines[0]) or not _SIZE.fullmatch(lines[1]):
        raise NoteError("not a checkpoint: origin, size, root and digest are expected")
    checkpoint = Checkpoint(lines[0], int(lines[1]), _decode(lines[2]), _decode(lines[3]))
    if len(checkpoint.root) != 32 or len(checkpoint.previous) != 32 or text != _text(checkpoint, head=head):
        raise NoteError("not a head of the audit log" if head else "not a checkpoint of the audit log")
    return checkpoint


def _decode(text: str) -> bytes:
    """The bytes; none when the text is not exactly what they encode to, as unused bits may differ unseen."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
    return raw if base64.b64encode(raw) == text.encode() else b""


def _check_signature(public_key: bytes, signature: bytes, text: str) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, text.encode())
    except InvalidSignature:
        raise NoteError("the signature does not hold") from None
