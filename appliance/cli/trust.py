"""`cloister trust`: make signing keys with the root of trust over them, and show one. Needs no daemon."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli.arguments import days
from appliance.cli.output import emit, printable, table

if TYPE_CHECKING:
    from bundles.trust.keys import Scheme
    from bundles.trust.roots import Root

_SCHEMES: dict[str, "Scheme"] = {"root": "ed25519", "release": "ed25519", "publisher": "ecdsa-sha2-nistp384"}


def register(parser: argparse.ArgumentParser) -> None:
    """The verbs of `cloister trust`."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    init = verbs.add_parser(
        "init", help="make one root, release and publisher key, and the root of trust over them"
    )
    init.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    init.add_argument(
        "--days", type=days, default=3650, metavar="N", help="how long the root is valid (default 3650)"
    )
    init.set_defaults(run=_init)
    show = verbs.add_parser("show", help="roles, thresholds and fingerprints of a root of trust")
    show.add_argument("file", type=Path, metavar="ROOT.json")
    show.set_defaults(run=_show)


def _init(args: argparse.Namespace) -> int:
    from datetime import UTC, datetime, timedelta

    from bundles.durable import write_file
    from bundles.trust import keys, roots
    from bundles.trust.signers import new_signer

    out: Path = args.out
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise FileExistsError(17, "keys are never overwritten; name a new or empty folder", str(out))
    held = {role: new_signer(scheme) for role, scheme in _SCHEMES.items()}
    members = {role: [signer.key] for role, signer in held.items()}
    signed = roots.make(1, datetime.now(UTC) + timedelta(days=args.days), members, {})
    for role, signer in held.items():
        keys.save_private_key(signer.private, out / f"{role}.key")
    raw = roots.sign_root(signed, [held["root"]])
    write_file(out / "root.json", raw)
    root = roots.parse(raw)
    files = {role: str(out / f"{role}.key") for role in held}
    text = (
        f"{_describe(root)}\n\nwritten to {printable(str(out))}: root.json, and root.key, release.key and "
        "publisher.key, readable by you alone.\nKeep root.key offline. Compare the fingerprints above before an "
        "appliance is told to trust this root."
    )
    emit(args, {"root": str(out / "root.json"), "keys": files, **_facts(root)}, text)
    return 0


def _show(args: argparse.Namespace) -> int:
    from bundles.trust import roots

    root = roots.load(args.file)
    emit(args, _facts(root), _describe(root))
    return 0


def _facts(root: "Root") -> dict[str, object]:
    from bundles.format.manifest import format_time

    return {
        "version": root.version,
        "expires": format_time(root.expires),
        "roles": {
            name: {
                "threshold": role.threshold,
                "keys": [{"keyid": key.keyid, "scheme": key.scheme} for key in root.role_keys(name)],
            }
            for name, role in root.roles.items()
        },
    }


def _describe(root: "Root") -> str:
    from bundles.format.manifest import format_time

    rows = [
        (name, f"{role.threshold} of {len(role.keyids)}", key.scheme, key.keyid)
        for name, role in root.roles.items()
        for key in root.role_keys(name)
    ]
    heading = f"root of trust, version {root.version}, valid until {format_time(root.expires)}"
    return f"{heading}\n{table(('role', 'must sign', 'scheme', 'fingerprint'), rows)}"
