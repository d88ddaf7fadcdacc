"""Arguments that name who signs: private keys in files, and commands that reach keys in cards or HSMs."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli.failure import UsageError

if TYPE_CHECKING:
    from bundles.trust.keys import Key
    from bundles.trust.signers import Signer


def add_signers(parser: argparse.ArgumentParser, flag: str, what: str) -> None:
    """Add `flag` KEY, which may be repeated, and --sign-with COMMAND."""
    parser.add_argument(flag, dest="key_files", type=Path, action="append", default=[], metavar="KEY", help=what)
    parser.add_argument(
        "--sign-with",
        metavar="COMMAND",
        help="signs for those KEYs that are public keys: gets what to sign on standard input, writes the raw "
        "signature (a smart card, an HSM; docs/trust.md)",
    )


def signers(args: argparse.Namespace) -> "list[Signer]":
    """Who signs, as `add_signers` was answered.

    Raises:
        UsageError, BundleError: as `load_signers`.
    """
    return load_signers(args.key_files, args.sign_with)


def load_signers(files: Sequence[Path], command: str | None) -> "list[Signer]":
    """The signers of keys in files: a private key signs itself, the command signs for a public one.

    Raises:
        UsageError: a public key without a command, or a command without a public key.
        BundleError: KEY_UNREADABLE, KEY_UNSUPPORTED.
    """
    from bundles.trust.keys import is_public_key
    from bundles.trust.signers import load_signer

    public = [path for path in files if is_public_key(path)]
    if public and not command:
        raise UsageError(f"{public[0]} is a public key: say with --sign-with what reaches its private half")
    if command and not public:
        raise UsageError("--sign-with needs the public half of its key, which its signatures are checked with")
    return [
        load_signer(command, public=path) if command and path in public else load_signer(str(path))
        for path in files
    ]


def assignment(text: str) -> tuple[str, str]:
    """A kind of argument: NAME=VALUE, of which neither is empty.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not of the form NAME=VALUE")
    return name, value


def numbered(text: str) -> tuple[str, int]:
    """A kind of argument: NAME=NUMBER.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    name, value = assignment(text)
    if not value.isdecimal() or len(value) > len(str(2**53)) or not 0 < int(value) < 2**53:
        raise argparse.ArgumentTypeError(f"{value[:40]!r} is not a whole number above 0")
    return name, int(value)


def public_keys(named: Iterable[tuple[str, str]]) -> "dict[str, list[Key]]":
    """Keys by role, of the ROLE=FILE that were given.

    Raises:
        BundleError: KEY_UNREADABLE, KEY_UNSUPPORTED.
    """
    from bundles.trust.keys import load_public_key

    found: dict[str, list[Key]] = {}
    for role, file in named:
        found.setdefault(role, []).append(load_public_key(Path(file)))
    return found
