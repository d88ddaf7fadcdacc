"""Who signs: a private key in a file, or a command that reaches one in a smart card or HSM.

    signer = load_signer("release.key")
    signer = load_signer("pkcs11-tool --sign ...", public=Path("release.pub"))

A signer is handed the whole message: a DSSE pre-authentication encoding, or the canonical JSON of a root.
"""

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bundles.format.errors import BundleError
from bundles.trust import keys
from bundles.trust.keys import Key, PrivateKey, Scheme

COMMAND_TIMEOUT = 600.0  # seconds; somebody may have to find a card and type its PIN
MAX_SIGNATURE = 8192  # bytes; an ML-DSA-87 signature has 4627


class Signer(Protocol):
    """Makes signatures that `key` verifies."""

    @property
    def key(self) -> Key:
        """The public half."""

    def sign(self, message: bytes) -> bytes:
        """A signature over `message`.

        Raises:
            BundleError: SIGNER_FAILED.
        """


class PrivateSigner:
    """Signs with a private key in memory."""

    def __init__(self, private: PrivateKey) -> None:
        self.private = private
        self._key = Key.of(private.public_key())

    @property
    def key(self) -> Key:
        """See `Signer`."""
        return self._key

    def sign(self, message: bytes) -> bytes:
        """See `Signer`."""
        return keys.sign(self.private, message)


class FileSigner(PrivateSigner):
    """Signs with the private key of a PEM file (PKCS #8, unencrypted).

    Raises:
        BundleError: KEY_UNREADABLE, KEY_UNSUPPORTED.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(keys.load_private_key(path))


@dataclass(frozen=True)
class CommandSigner:
    """Signs by running a command: it reads what to sign from standard input and writes the raw signature.

    It gets `Key.to_sign(message)`. No shell is involved. Standard input is an unnamed file, because some tools ask
    for its size first; standard error and the terminal are the command's own, for PIN prompts. What it returns is
    verified before it is used.

    Attributes:
        command: program and arguments, quoted as for a shell.
        public: the key that it must sign with.
    """

    command: str
    public: Key

    @property
    def key(self) -> Key:
        """See `Signer`."""
        return self.public

    def sign(self, message: bytes) -> bytes:
        """See `Signer`; ECDSA signatures are DER."""
        argv = self._argv()
        signature = _run(argv, self.public.to_sign(message))
        if not 0 < len(signature) <= MAX_SIGNATURE:
            raise _failed(argv[0], f"gave {len(signature)} bytes where a signature was expected")
        if not self.public.verifies(signature, message):
            hint = " (ECDSA signatures must be DER)" if self.public.scheme.startswith("ecdsa") else ""
            raise _failed(argv[0], f"gave no signature of the key {self.public.keyid} over the message{hint}")
        return signature

    def _argv(self) -> list[str]:
        try:
            argv = shlex.split(self.command)
        except ValueError:
            argv = []
        if not argv:
            raise BundleError("SIGNER_FAILED", "the signing command is empty or has an open quotation mark")
        return argv


def load_signer(text: str, public: Path | None = None) -> Signer:
    """The signer that a command line names: a private key's file or, with its public key's file, a command.

    Raises:
        BundleError: KEY_UNREADABLE, KEY_UNSUPPORTED.
    """
    return FileSigner(Path(text)) if public is None else CommandSigner(text, keys.load_public_key(public))


def new_signer(scheme: Scheme) -> PrivateSigner:
    """A signer with a fresh key."""
    return PrivateSigner(keys.new_private_key(scheme))


def _run(argv: list[str], message: bytes) -> bytes:
    fd = os.memfd_create("message-to-sign", os.MFD_CLOEXEC)
    with open(fd, "w+b") as stream:
        stream.write(message)
        stream.seek(0)
        try:
            done = subprocess.run(argv, stdin=stream, stdout=subprocess.PIPE, timeout=COMMAND_TIMEOUT, check=False)
        except OSError as error:
            raise _failed(argv[0], f"could not be run: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise _failed(argv[0], f"did not answer within {COMMAND_TIMEOUT:g} s") from None
    if done.returncode != 0:
        raise _failed(argv[0], f"ended with status {done.returncode}")
    return done.stdout


def _failed(program: str, what: str) -> BundleError:
    return BundleError("SIGNER_FAILED", f"the signing command {program!a} {what}; nothing was signed")
