"""The options of `cloister bundle` that say who signs, and the signers they name."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli.failure import UsageError
from appliance.cli.signing_keys import load_signers

if TYPE_CHECKING:
    from bundles.builder import Signing


def add_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add them; `required` where there is nothing else to do than to sign."""
    keys = parser.add_argument_group(
        "signing" if required else "signing at once (otherwise: cloister bundle sign)"
    )
    keys.add_argument(
        "--root",
        type=Path,
        action="append",
        default=[],
        required=required,
        metavar="ROOT.json",
        help="root of trust over the keys; repeat it with earlier ones for appliances that know no newer",
    )
    keys.add_argument(
        "--release-key", type=Path, action="append", default=[], metavar="KEY", help="signs the manifest"
    )
    _add_publisher(keys)
    keys.add_argument(
        "--sign-with",
        metavar="COMMAND",
        help="signs for those KEYs that are public keys: gets what to sign on standard input, writes "
        "the raw signature (a smart card, an HSM)",
    )
    keys.add_argument(
        "--revocation", type=Path, metavar="FILE", help="a signed revocation document that travels in the bundle"
    )


def _add_publisher(keys: argparse._ArgumentGroup) -> None:
    publisher = keys.add_mutually_exclusive_group()
    publisher.add_argument(
        "--publisher-key", type=Path, metavar="KEY", help="signs the model (OpenSSF Model Signing, ECDSA)"
    )
    publisher.add_argument(
        "--site-publisher",
        type=Path,
        metavar="KEY",
        help="signs a converted or unsigned model for the site; the source's own signature becomes provenance",
    )
    publisher.add_argument(
        "--model-sig", type=Path, metavar="FILE", help="the publisher's own model.sig, kept as it is"
    )
    keys.add_argument(
        "--publisher-chain",
        type=Path,
        metavar="PEM",
        help="the publisher's certificate and those above it, instead of a raw key in the root",
    )
    keys.add_argument(
        "--publisher-second", type=Path, metavar="KEY", help="signs the model, too (ML-DSA, post-quantum)"
    )


def wanted(args: argparse.Namespace) -> bool:
    """Whether anything of signing was asked for."""
    given = (args.root, args.release_key, args.publisher_key, args.site_publisher, args.model_sig)
    return any((*given, args.publisher_chain, args.publisher_second, args.sign_with, args.revocation))


def read_signing(args: argparse.Namespace) -> "Signing":
    """Who signs, as the options say.

    Raises:
        UsageError: options that lack another one.
        BundleError: KEY_UNREADABLE, KEY_UNSUPPORTED, CERTIFICATE_UNREADABLE, ROOT_UNREADABLE and others of a root.
    """
    from bundles.builder import Signing
    from bundles.trust import certificates, roots

    if not args.root:
        raise UsageError("signing needs --root ROOT.json, the root of trust over the keys")
    publisher = args.publisher_key or args.site_publisher
    if publisher is None and (args.publisher_chain or args.publisher_second):
        raise UsageError("--publisher-chain and --publisher-second need --publisher-key or --site-publisher")
    *earlier, root = sorted(map(roots.load, args.root), key=lambda held: held.version)
    named = [path for path in (publisher, args.publisher_second) if path]
    signers = load_signers([*args.release_key, *named], args.sign_with)
    of_model = signers[len(args.release_key) :]
    return Signing(
        root=root,
        release_keys=tuple(signers[: len(args.release_key)]),
        publisher_key=of_model[0] if publisher else None,
        oms=args.model_sig.read_bytes() if args.model_sig else None,
        site=args.site_publisher is not None,
        chain=certificates.load_chain(args.publisher_chain) if args.publisher_chain else (),
        second=of_model[1] if args.publisher_second else None,
        earlier=tuple(earlier),
        revocation=args.revocation.read_bytes() if args.revocation else None,
    )
