"""`cloister trust approve`: a custodian's signature that a model version may run on an appliance."""

import argparse
import re
from pathlib import Path

from appliance.cli.failure import UsageError
from appliance.cli.output import emit, printable
from appliance.cli.signing_keys import add_signers, signers

Verbs = argparse._SubParsersAction  # the type of what add_subparsers returns has no public name

_DIGEST = re.compile(r"[0-9a-f]{64}", re.A)


def register_verbs(verbs: "Verbs[argparse.ArgumentParser]") -> None:
    """Add `approve` to `cloister trust`."""
    approve = verbs.add_parser(
        "approve", help="sign, as a custodian, that a model version may run on an appliance"
    )
    approve.add_argument(
        "model_digest", metavar="MODEL_DIGEST", help="as `cloister bundle list` and `bundle inspect` show it"
    )
    approve.add_argument("--appliance", required=True, metavar="NAME", help="its `cloister init --site`")
    approve.add_argument("--add-to", type=Path, metavar="FILE", help="an approval that others signed before")
    approve.add_argument(
        "--out", type=Path, metavar="FILE", help="default: that of --add-to, or MODEL_DIGEST.approval"
    )
    add_signers(approve, "--key", "a custodian's key")
    approve.set_defaults(run=_approve)


def _approve(args: argparse.Namespace) -> int:
    from bundles.durable import write_file
    from bundles.trust import dsse
    from bundles.trust.approval import approve

    if not _DIGEST.fullmatch(args.model_digest):
        raise UsageError(f"{args.model_digest[:80]!r} is not a model digest: 64 hex digits in lower case")
    held = signers(args)
    if not held:
        raise UsageError("an approval is signed: give --key")
    raw = args.add_to.read_bytes() if args.add_to else None
    for signer in held:
        raw = approve(args.model_digest, args.appliance, signer, raw)
    path: Path = args.out or args.add_to or Path(f"{args.model_digest}.approval")
    write_file(path, raw or b"")
    keyids = [signature.keyid for signature in dsse.parse(raw or b"", "the approval").signatures]
    value = {
        "file": str(path),
        "model_digest": args.model_digest,
        "appliance": args.appliance,
        "signers": keyids,
    }
    text = (
        f"{printable(str(path))}: {args.model_digest} may run on {printable(args.appliance)}\n"
        f"signed by {len(keyids)} key(s); others add to it with --add-to. The appliance's root says who counts.\n"
        f"The appliance takes it with: cloister model approve {printable(str(path))}"
    )
    emit(args, value, text)
    return 0
