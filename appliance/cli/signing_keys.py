"""Arguments that name who signs: private keys in files, and commands that reach keys in cards or HSMs."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli.failure import UsageError

if TYPE_CHECKING:
    from bundles.trust.keys import Key
    from bundles.trust.signers import Signer


def add_signers(parser: argparse.ArgumentParser, flag: str, what: str) -> None:
    """Add `flag` FILE, and --sign-with COMMAND with its --public-key FILE; each may be repeated."""
    parser.add_argument(flag, dest="key_files", type=Path, action="append", default=[], metavar="KEY", help=what)
    parser.add_argument(
        "--sign-with",
        action="append",
        default=[],
        metavar="COMMAND",
        help="signs in the place of a key file: reads the message, writes the raw signature (docs/trust.md)",
    )
    parser.add_argument(
        "--public-key",
        type=Path,
        action="append",
        default=[],
        metavar="PUB",
        help="the public key (PEM) that the --sign-with before it signs with",
    )


def signers(args: argparse.Namespace) -> "list[Signer]":
    """Who signs, as `add_signers` was answered.

    Raises:
        UsageError: a command without a public key, or a public key without a command.
        BundleError: KEY_UNREADABLE, KEY_UNSUPPORTED.
    """
    from bundles.trust.signers import FileSigner, load_signer

    if len(args.sign_with) != len(args.public_key):
        raise UsageError("every --sign-with needs its --public-key, the key that its signatures are checked with")
    commands = zip(args.sign_with, args.public_key, strict=True)
    return [*map(FileSigner, args.key_files), *(load_signer(text, public) for text, public in commands)]


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
