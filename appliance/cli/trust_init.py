"""`cloister trust init`: signing keys and the first root of trust over them, or over keys that are elsewhere."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast

from appliance.cli.arguments import days, whole
from appliance.cli.failure import UsageError
from appliance.cli.output import printable
from appliance.cli.signing_keys import add_signers, assignment, public_keys, signers
from appliance.cli.trust_show import tell

if TYPE_CHECKING:
    from bundles.trust.ceremony import RootDraft
    from bundles.trust.keys import Scheme
    from bundles.trust.signers import PrivateSigner

Verbs = argparse._SubParsersAction  # the type of what add_subparsers returns has no public name

SCHEMES = ("ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521")
POST_QUANTUM = ("ml-dsa-44/1", "ml-dsa-65/1", "ml-dsa-87/1")
ECDSA = SCHEMES[1:]
_holders = whole(0, 16)


def register_verbs(verbs: "Verbs[argparse.ArgumentParser]") -> None:
    """Add `init` to `cloister trust`."""
    init = verbs.add_parser("init", help="make signing keys, and the root of trust over them")
    init.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    init.add_argument(
        "--days", type=days, default=3650, metavar="N", help="how long the root is valid (default 3650)"
    )
    for role, name, made in (("root", "root", 1), ("release", "release", 1), ("custodian", "custodian", 0)):
        plural = "custodians" if role == "custodian" else f"{role}-keys"
        init.add_argument(
            f"--{plural}", dest=f"{role}_keys", type=_holders, default=made, metavar="N", help=f"default {made}"
        )
        init.add_argument(
            f"--{name}-threshold", type=_holders, metavar="M", help="how many must sign (default: a majority)"
        )
    _add_schemes(init)
    _add_elsewhere(init)
    add_signers(init, "--root-key", "signs the root, where its keys are given with --public")
    init.set_defaults(run=_init)


def _add_schemes(init: argparse.ArgumentParser) -> None:
    init.add_argument("--scheme", choices=SCHEMES, default=SCHEMES[0], help=f"default {SCHEMES[0]}")
    init.add_argument(
        "--publisher-scheme",
        choices=ECDSA,
        default=ECDSA[1],
        help=f"of the key that signs models, default {ECDSA[1]}",
    )
    init.add_argument(
        "--hybrid", action="store_true", help="every holder signs with a second, post-quantum key, too"
    )
    init.add_argument(
        "--pq-scheme", choices=POST_QUANTUM, default=POST_QUANTUM[2], help=f"default {POST_QUANTUM[2]}"
    )


def _add_elsewhere(init: argparse.ArgumentParser) -> None:
    init.add_argument(
        "--public",
        type=assignment,
        action="append",
        default=[],
        metavar="ROLE=PUB",
        help="a public key (PEM) whose private half is elsewhere; none are made for that role",
    )
    init.add_argument(
        "--authority",
        type=assignment,
        action="append",
        default=[],
        metavar="ROLE=CA.pem",
        help="certificates of this authority may sign models as ROLE (publisher, publisher/NAME)",
    )
    init.add_argument(
        "--crl-required",
        action="append",
        default=[],
        metavar="ROLE",
        help="its certificates need a revocation list in force",
    )


def _init(args: argparse.Namespace) -> int:
    from datetime import UTC, datetime, timedelta

    from bundles.durable import write_file
    from bundles.trust import keys, roots

    out: Path = args.out
    made, draft = _draw_up(args)
    own = [signer for role, _, signer in made if role == "root"]
    raw = draft.sign(datetime.now(UTC) + timedelta(days=args.days), [*own, *signers(args)])
    roots.read(raw)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise FileExistsError(17, "keys are never overwritten; name a new or empty folder", str(out))
    files: dict[str, list[str]] = {}
    for role, name, signer in made:
        keys.save_private_key(signer.private, out / f"{name}.key")
        write_file(out / f"{name}.pub", keys.pem_of(signer.key.public_key).encode())
        files.setdefault(role, []).append(str(out / f"{name}.key"))
    write_file(out / "root.json", raw)
    tell(args, out / "root.json", raw, {"keys": files}, _advice(out, bool(own)))
    return 0


def _draw_up(args: argparse.Namespace) -> "tuple[list[tuple[str, str, PrivateSigner]], RootDraft]":
    """The keys that are made, each with its role and file name, and the root over them and those given."""
    from bundles.trust.ceremony import RootDraft
    from bundles.trust.certificates import load_chain
    from bundles.trust.signers import new_signer

    elsewhere = public_keys(args.public)
    draft, made = RootDraft(), []
    for role, count in _counts(args).items():
        if role in elsewhere or not count:
            continue
        for name, scheme in _keys_of(role, count, args):
            signer = new_signer(cast("Scheme", scheme))
            made.append((role, name, signer))
            draft = draft.add(role, signer.key)
    for role, held in elsewhere.items():
        draft = draft.add(role, *held)
    for role, file in args.authority:
        draft = draft.certify(role, *load_chain(Path(file)))
    draft = draft.require_crl(*args.crl_required)
    for role, threshold in _thresholds(args).items():
        draft = draft.demand(role, threshold)
    return made, draft.hybrid(*draft.roles) if args.hybrid else draft


def _counts(args: argparse.Namespace) -> dict[str, int]:
    """How many hold a key of each role."""
    if not args.root_keys or not args.release_keys:
        raise UsageError("a root of trust has at least one root key and one release key")
    return {
        "root": args.root_keys,
        "release": args.release_keys,
        "publisher": 1,
        "revocation": 1,
        "custodian": args.custodian_keys,
    }


def _keys_of(role: str, count: int, args: argparse.Namespace) -> list[tuple[str, str]]:
    """File name and scheme of each key of a role."""
    scheme = args.publisher_scheme if role == "publisher" else args.scheme
    names = [role] if count == 1 else [f"{role}-{number}" for number in range(1, count + 1)]
    return [
        key
        for name in names
        for key in ([(name, scheme), (f"{name}-pq", args.pq_scheme)] if args.hybrid else [(name, scheme)])
    ]


def _thresholds(args: argparse.Namespace) -> dict[str, int]:
    """How many keys must sign; with two keys each holder signs twice, so that no fewer holders are enough."""
    each = 2 if args.hybrid else 1
    wanted = {}
    for role, made in _counts(args).items():
        elsewhere = sum(role == named for named, _ in args.public)
        holders = elsewhere // each if elsewhere else made
        asked = getattr(args, f"{role}_threshold", None)
        if asked is not None and not 0 < asked <= holders:
            raise UsageError(f"{asked} of {holders} {role} keys cannot sign")
        if holders:
            wanted[role] = (asked or (1 if role == "publisher" else holders // 2 + 1)) * each
    return wanted


def _advice(out: Path, holds_root: bool) -> str:
    keep = "Keep the root keys offline, each with its own holder. " if holds_root else ""
    return (
        f"written to {printable(str(out))}: root.json, and for each key made a .key file, readable by you alone, "
        f"and a .pub file.\n{keep}Compare the fingerprint above with whoever else holds a key, before an "
        "appliance is told to trust this root."
    )
