"""`cloister trust revoke` and `bundle`: what is trusted no longer, and the trust bundle that carries it."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli.arguments import days
from appliance.cli.failure import UsageError
from appliance.cli.output import emit, printable, size
from appliance.cli.signing_keys import add_signers, numbered, signers
from appliance.cli.trust_show import describe_revocations, revocation_facts

if TYPE_CHECKING:
    from cryptography.x509 import CertificateRevocationList

    from bundles.format.members import TrustHead
    from bundles.trust.revocation import Document, Revocations, RevokedCertificate
    from bundles.trust.roots import Root

Verbs = argparse._SubParsersAction  # the type of what add_subparsers returns has no public name

_ROOT_HELP = "the newest root, and with it every one that an appliance may lack"
_DIGEST = re.compile(r"[0-9a-f]{64}", re.A)
_SERIAL = re.compile(r"(0[xX])?([0-9a-fA-F]{1,2}(:?[0-9a-fA-F]{2})*|[0-9a-fA-F]+)", re.A)


def register_verbs(verbs: "Verbs[argparse.ArgumentParser]") -> None:
    """Add `revoke` and `bundle` to `cloister trust`."""
    _register_revoke(verbs)
    _register_bundle(verbs)


def _register_revoke(verbs: "Verbs[argparse.ArgumentParser]") -> None:
    revoke = verbs.add_parser(
        "revoke", help="write a trust bundle that revokes, and repeats what was revoked before"
    )
    revoke.add_argument("--root", type=Path, action="append", required=True, metavar="ROOT.json", help=_ROOT_HELP)
    revoke.add_argument(
        "--previous", type=Path, metavar="TRUST.bundle", help="the trust bundle before, whose revocations go on"
    )
    _add_entries(revoke)
    revoke.add_argument(
        "--expires-days", type=days, default=45, metavar="N", help="when the next one is due (default 45)"
    )
    revoke.add_argument("--out", type=Path, required=True, metavar="TRUST.bundle")
    revoke.add_argument(
        "--document",
        type=Path,
        metavar="FILE",
        help="write the revocation document alone, too: for cloister bundle sign --revocation",
    )
    add_signers(revoke, "--revocation-key", "signs the revocations")
    revoke.set_defaults(run=_revoke)


def _add_entries(revoke: argparse.ArgumentParser) -> None:
    """What is revoked."""
    entries: tuple[tuple[str, str, Callable[[str], object], str], ...] = (
        ("--key", "KEYID", _digest, "a release, publisher or custodian key"),
        ("--manifest", "DIGEST", _digest, "a release, by its model digest"),
        (
            "--certificate",
            "SERIAL[@CA.pem]",
            str,
            (
                "a publisher's certificate: serial number (hex) and the certificate that issued it (default: the "
                "root's only authority)"
            ),
        ),
        (
            "--crl",
            "FILE",
            Path,
            "a certificate revocation list (PEM or DER); it takes the place of its issuer's before",
        ),
        ("--minimum", "NAME=SEQUENCE", numbered, "nothing of this model below this sequence"),
    )
    for option, metavar, kind, text in entries:
        revoke.add_argument(option, type=kind, action="append", default=[], metavar=metavar, help=text)


def _register_bundle(verbs: "Verbs[argparse.ArgumentParser]") -> None:
    bundle = verbs.add_parser(
        "bundle", help="put roots, and revocations that are signed already, into a trust bundle"
    )
    bundle.add_argument("--root", type=Path, action="append", required=True, metavar="ROOT.json", help=_ROOT_HELP)
    bundle.add_argument(
        "--previous", type=Path, metavar="TRUST.bundle", help="takes over its roots and revocations"
    )
    bundle.add_argument("--revocation", type=Path, metavar="FILE", help="a signed revocation document, instead")
    bundle.add_argument("--out", type=Path, required=True, metavar="TRUST.bundle")
    bundle.set_defaults(run=_bundle)


def _digest(text: str) -> str:
    if not _DIGEST.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not 64 hex digits in lower case")
    return text


def _revoke(args: argparse.Namespace) -> int:
    from bundles.durable import write_file
    from bundles.trust import revocation

    held = signers(args)
    if not held:
        raise UsageError("revocations are signed: give --revocation-key")
    earlier = _earlier(args.previous)
    root, chain = _chain(args, earlier)
    before = _before(args, earlier)
    document = _document(args, root, before)
    raw = revocation.sign(document, held)
    found = revocation.parse(raw)
    is_complete = _is_complete(raw, root)
    _write(args, chain, raw)
    if args.document:
        write_file(args.document, raw)
    note = "" if is_complete else "\nNOT COMPLETE: the root wants more signatures; cloister trust sign"
    text = f"{describe_revocations(found)}\n\n{_written(args.out)}{note}"
    emit(args, {"file": str(args.out), "complete": is_complete, **revocation_facts(found)}, text)
    return 0


def _before(args: argparse.Namespace, earlier: "TrustHead | None") -> "Revocations | None":
    """The revocations that go on, as a root vouches for them that was given: what is signed now repeats them.

    Raises:
        BundleError: nobody vouches for them; the SIGNATURE codes.
    """
    from bundles.format.errors import BundleError
    from bundles.trust import revocation, roots

    if earlier is None or earlier.revocation is None:
        return None
    for number, path in enumerate(args.root, 1):
        try:
            return revocation.verify(earlier.revocation, roots.load(path))
        except BundleError as error:
            if number == len(args.root):
                hint = f"{error.message}; where they were signed under an older root, give that with --root, too"
                raise BundleError(error.code, f"{args.previous}: {hint}") from None
    return None


def _document(args: argparse.Namespace, root: "Root", before: "Revocations | None") -> "Document":
    from datetime import UTC, datetime, timedelta

    from bundles.trust import revocation

    now = datetime.now(UTC)
    said = before.document if before else None
    _check_keys(args.key, root)
    return revocation.make(
        before.sequence + 1 if before else 1,
        now,
        now + timedelta(days=args.expires_days),
        keys=[*(said.keys if said else ()), *args.key],
        manifests=[*(said.manifests if said else ()), *args.manifest],
        revoked=[*(said.certificates if said else ()), *(_certificate(text, root) for text in args.certificate)],
        crls=_lists([_crl(path) for path in args.crl], before.crls if before else ()),
        minimum_sequences=_minimums(args.minimum, dict(said.minimum_sequences) if said else {}),
    )


def _minimums(given: list[tuple[str, int]], held: dict[str, int]) -> dict[str, int]:
    for name, sequence in given:
        if sequence < held.get(name, 0):
            raise UsageError(f"the minimum of {name} was {held[name]} before; it does not go back")
        held[name] = sequence
    return held


def _check_keys(keyids: list[str], root: "Root") -> None:
    """Root and revocation keys change with a new root, never by a document that they sign or can take back."""
    for role in ("root", "revocation"):
        held = root.roles[role].keyids if role in root.roles else ()
        named = next((keyid for keyid in keyids if keyid in held), None)
        if named is not None:
            raise UsageError(f"{named} is a {role} key: replace it with cloister trust rotate")


def _certificate(text: str, root: "Root") -> "RevokedCertificate":
    from bundles.trust.certificates import issuer_sha256, load_chain
    from bundles.trust.revocation import RevokedCertificate

    serial, _, file = text.partition("@")
    if not _SERIAL.fullmatch(serial):
        raise UsageError(f"{serial[:80]!r} is not a serial number in hex, as `openssl x509 -serial` prints it")
    known = [authority for held in root.extension.authorities.values() for authority in held]
    issuers = load_chain(Path(file))[:1] if file else tuple(dict.fromkeys(known))
    if len(issuers) != 1:
        raise UsageError(f"the root names {len(issuers)} certificate authorities: say whose, {serial[:80]}@CA.pem")
    number = int(serial.removeprefix("0x").removeprefix("0X").replace(":", ""), 16)
    return RevokedCertificate(issuer_sha256=issuer_sha256(issuers[0]), serial=f"{number:x}")


def _crl(path: Path) -> "CertificateRevocationList":
    from cryptography import x509

    raw = path.read_bytes()
    try:
        crl = x509.load_pem_x509_crl(raw) if raw.startswith(b"-----") else x509.load_der_x509_crl(raw)
        is_partial = any(extension.critical for extension in crl.extensions)
    except ValueError:
        raise UsageError(f"{path} is no certificate revocation list") from None
    if is_partial:
        raise UsageError(f"{path} is a delta or a part of a list, which appliances pass over: give the whole one")
    return crl


def _lists(
    given: "Sequence[CertificateRevocationList]", held: "Sequence[CertificateRevocationList]"
) -> list[bytes]:
    """The lists to carry, DER: those given, and those of other issuers that were carried before."""
    from cryptography.hazmat.primitives.serialization import Encoding

    for new in given:
        if any(new.issuer == old.issuer and new.last_update_utc < old.last_update_utc for old in held):
            name = new.issuer.rfc4514_string()
            raise UsageError(f"the list of {name[:80]!r} is older than the one before; it does not go back")
    replaced = [new.issuer for new in given]
    return [crl.public_bytes(Encoding.DER) for crl in (*given, *(h for h in held if h.issuer not in replaced))]


def _bundle(args: argparse.Namespace) -> int:
    from bundles.trust import revocation

    earlier = _earlier(args.previous)
    root, chain = _chain(args, earlier)
    raw = earlier.revocation if earlier else None
    if args.revocation:
        raw = args.revocation.read_bytes()
    found = revocation.verify(raw, root) if raw is not None else None
    _write(args, chain, raw)
    parts = [f"roots of trust: {', '.join(str(held.version) for held in chain)}"]
    if found:
        parts.append(describe_revocations(found))
    value = {
        "file": str(args.out),
        "roots": [held.version for held in chain],
        "revocations": revocation_facts(found) if found else None,
    }
    emit(args, value, "\n".join([*parts, "", _written(args.out)]))
    return 0


def _earlier(path: Path | None) -> "TrustHead | None":
    from bundles.verify import read_trust_bundle

    return read_trust_bundle(path) if path else None


def _chain(args: argparse.Namespace, earlier: "TrustHead | None") -> "tuple[Root, list[Root]]":
    """The newest root, and all of them; each follows the one before."""
    from bundles.trust import roots

    brought = [*(roots.parse(raw) for raw in (earlier.roots if earlier else ())), *map(roots.load, args.root)]
    chain = sorted({root.version: root for root in brought}.values(), key=lambda root: root.version)
    return roots.advance(chain[0], brought), chain


def _is_complete(raw: bytes, root: "Root") -> bool:
    from bundles.format.errors import BundleError
    from bundles.trust import revocation

    try:
        revocation.verify(raw, root)
    except BundleError as error:
        if error.code in ("SIGNATURE_THRESHOLD", "PQ_SIGNATURE_MISSING", "CLASSICAL_SIGNATURE_MISSING"):
            return False
        raise
    return True


def _write(args: argparse.Namespace, chain: "list[Root]", raw: bytes | None) -> None:
    from bundles.trust.bundle import write_trust_bundle

    write_trust_bundle(args.out, chain, raw)


def _written(path: Path) -> str:
    return (
        f"written to {printable(str(path))} ({size(path.stat().st_size)}); appliances take it like a bundle: "
        f"cloister bundle import {printable(str(path))}"
    )
