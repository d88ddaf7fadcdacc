"""`cloister trust rotate` and `sign`: the next root of trust, and one more signature on what needs several."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli.arguments import days
from appliance.cli.failure import UsageError
from appliance.cli.output import emit, printable
from appliance.cli.signing_keys import add_signers, assignment, numbered, public_keys, signers
from appliance.cli.trust_show import describe_revocations, tell

if TYPE_CHECKING:
    from bundles.trust.ceremony import RootDraft
    from bundles.trust.roots import Root
    from bundles.trust.signers import Signer

Verbs = argparse._SubParsersAction  # the type of what add_subparsers returns has no public name


def register_verbs(verbs: "Verbs[argparse.ArgumentParser]") -> None:
    """Add `rotate` and `sign` to `cloister trust`."""
    rotate = verbs.add_parser("rotate", help="make the next version of a root of trust")
    rotate.add_argument("--root", type=Path, required=True, metavar="ROOT.json", help="the version before")
    _add_changes(rotate)
    rotate.add_argument(
        "--expires-days", type=days, default=3650, metavar="N", help="how long it is valid (default 3650)"
    )
    rotate.add_argument("--out", type=Path, metavar="FILE", help="default: N.root.json beside the version before")
    add_signers(rotate, "--root-key", "signs it; enough root keys of both versions must")
    rotate.set_defaults(run=_rotate)
    sign = verbs.add_parser(
        "sign", help="add a signature to a root, or to the revocations of a trust bundle, in place"
    )
    sign.add_argument("file", type=Path, metavar="FILE")
    sign.add_argument("--root", type=Path, metavar="ROOT.json", help="the version before, that a root must follow")
    add_signers(sign, "--key", "signs it")
    sign.set_defaults(run=_sign)


def _add_changes(rotate: argparse.ArgumentParser) -> None:
    def each(flag: str, metavar: str, text: str, kind: object = assignment) -> None:
        rotate.add_argument(flag, type=kind, action="append", default=[], metavar=metavar, help=text)  # type: ignore[arg-type]  # a kind of argument

    each("--add", "ROLE=PUB", "one more key of a role, by its public key (PEM)")
    each("--remove", "ROLE=KEYID", "one key of a role less; the beginning of its id will do")
    each("--threshold", "ROLE=N", "how many of a role's keys must sign", numbered)
    each("--authority", "ROLE=CA.pem", "one more certificate authority for a publisher's role")
    each("--remove-authority", "ROLE=CA.pem", "one certificate authority of a publisher's role less")
    each("--hybrid", "ROLE", "from now on a classical and a post-quantum key must both sign", str)
    each("--not-hybrid", "ROLE", "from now on keys of one kind are enough", str)
    each("--crl-required", "ROLE", "from now on its certificates need a revocation list in force", str)
    each("--crl-optional", "ROLE", "from now on they need none", str)


def _rotate(args: argparse.Namespace) -> int:
    from datetime import UTC, datetime, timedelta

    from bundles.durable import write_file
    from bundles.trust import roots

    old = roots.load(args.root)
    held = signers(args)
    if not held:
        raise UsageError("a root is signed by root keys: give --root-key")
    draft = _changed(old, args)
    path: Path = args.out or args.root.with_name(f"{draft.version}.root.json")
    if path.exists():
        raise FileExistsError(17, "a root is never overwritten; name another file", str(path))
    raw = draft.sign(datetime.now(UTC) + timedelta(days=args.expires_days), held)
    roots.read(raw)
    write_file(path, raw)
    advice = (
        f"written to {printable(str(path))}. It travels in bundles that are signed with --root "
        f"{printable(str(path))}, and in a trust bundle: cloister trust bundle."
    )
    tell(args, path, raw, {"follows": old.version}, advice, old)
    return 0


def _changed(old: "Root", args: argparse.Namespace) -> "RootDraft":
    from bundles.trust.ceremony import RootDraft
    from bundles.trust.certificates import load_chain

    draft = RootDraft.of(old)
    for role, keys in public_keys(args.add).items():
        draft = draft.add(role, *keys)
    for role, keyid in args.remove:
        draft = draft.remove(role, keyid)
    for role, threshold in args.threshold:
        draft = draft.demand(role, threshold)
    for role, file in args.authority:
        draft = draft.certify(role, *load_chain(Path(file)))
    for role, file in args.remove_authority:
        draft = draft.decertify(role, *load_chain(Path(file)))
    draft = draft.hybrid(*args.hybrid, but=args.not_hybrid)
    return draft.require_crl(*args.crl_required, but=args.crl_optional)


def _sign(args: argparse.Namespace) -> int:
    held = signers(args)
    if not held:
        raise UsageError("nobody signs: give --key")
    with args.file.open("rb") as stream:
        is_root = stream.read(1) == b"{"
    return _sign_root(args, held) if is_root else _sign_revocations(args, held)


def _sign_root(args: argparse.Namespace, held: "list[Signer]") -> int:
    from bundles.durable import write_file
    from bundles.trust import roots

    raw = args.file.read_bytes()
    for signer in held:
        raw = roots.add_signature(raw, signer)
    old = roots.load(args.root) if args.root else None
    write_file(args.file, raw)
    own = "" if old or roots.read(raw).version == 1 else " of its own; whether of the version before, --root tells"
    tell(args, args.file, raw, {}, f"{printable(str(args.file))} is signed by enough root keys{own}.", old)
    return 0


def _sign_revocations(args: argparse.Namespace, held: "list[Signer]") -> int:
    from bundles.trust import dsse, revocation, roots
    from bundles.trust.bundle import write_trust_bundle
    from bundles.verify import read_trust_bundle

    head = read_trust_bundle(args.file)
    if head.revocation is None:
        raise UsageError(f"{args.file} brings no revocations; roots are signed before they are bundled")
    envelope = dsse.parse(head.revocation, "the revocation document")
    for signer in held:
        envelope = envelope.signed_by(signer)
    raw = envelope.encode()
    found = revocation.parse(raw)
    write_trust_bundle(args.file, map(roots.parse, head.roots), raw)
    keyids = [signature.keyid for signature in envelope.signatures]
    text = f"{describe_revocations(found)}\n\n{printable(str(args.file))}: signed by {len(keyids)} key(s)"
    emit(args, {"file": str(args.file), "signers": keyids}, text)
    return 0
