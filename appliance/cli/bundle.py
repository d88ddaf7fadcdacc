"""`cloister bundle`: build, sign, verify and inspect bundles without a daemon; import and list through it."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli.arguments import days
from appliance.cli.failure import UsageError
from appliance.cli.output import emit, printable, size, table

if TYPE_CHECKING:
    from bundles.builder import Release, Signing
    from bundles.format.manifest import Manifest
    from bundles.pipeline import Report
    from bundles.trust.policy import Verified
    from bundles.verify import Inspection

_UNVERIFIED = "NOT VERIFIED: no root of trust was given (--root). Nothing below may be believed."


def register(parser: argparse.ArgumentParser) -> None:
    """The verbs of `cloister bundle`."""
    from appliance.cli import bundle_import

    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _register_build(verbs.add_parser("build", help="make a bundle from a model's folder"))
    sign = verbs.add_parser("sign", help="sign a bundle, in place")
    sign.add_argument("bundle", type=Path, metavar="BUNDLE")
    _add_signing(sign, required=True)
    sign.set_defaults(run=_sign)
    verify = verbs.add_parser("verify", help="verify every signature, chunk and file of a bundle; writes nothing")
    verify.add_argument("bundle", type=Path, metavar="BUNDLE")
    verify.add_argument(
        "--root", type=Path, required=True, metavar="ROOT.json", help="the root of trust to believe"
    )
    verify.add_argument(
        "--appliance",
        metavar="NAME",
        help="refuse a bundle that this appliance, as `cloister init --site` named it, would not import",
    )
    verify.set_defaults(run=_verify)
    inspect = verbs.add_parser("inspect", help="what a bundle says about itself")
    inspect.add_argument("bundle", type=Path, metavar="BUNDLE")
    inspect.add_argument("--root", type=Path, metavar="ROOT.json", help="verify the signatures against this root")
    inspect.set_defaults(run=_inspect)
    bundle_import.register_verbs(verbs)


def _register_build(build: argparse.ArgumentParser) -> None:
    build.add_argument("--model", type=Path, required=True, metavar="DIR", help="the model's folder")
    build.add_argument("--name", required=True, help="the model's name: lower case letters, digits, '.', '_', '-'")
    build.add_argument("--version", required=True, help="shown to people")
    build.add_argument("--sequence", type=int, required=True, help="grows with every release of this name")
    build.add_argument("--out", type=Path, required=True, metavar="BUNDLE")
    build.add_argument(
        "--licence", default="", metavar="SPDX", help="SPDX expression (default: of the model card)"
    )
    build.add_argument("--licence-file", type=Path, action="append", default=[], metavar="FILE", help="its text")
    build.add_argument("--attest", type=Path, action="append", default=[], metavar="FILE", help="carried as it is")
    build.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="APPLIANCE",
        help="only the appliance with this name (its `cloister init --site`) imports it; may be repeated",
    )
    build.add_argument("--expires-days", type=days, metavar="N", help="not importable after N days")
    _add_signing(build, required=False)
    build.set_defaults(run=_build)


def _add_signing(parser: argparse.ArgumentParser, *, required: bool) -> None:
    keys = parser.add_argument_group(
        "signing" if required else "signing at once (otherwise: cloister bundle sign)"
    )
    keys.add_argument(
        "--root", type=Path, required=required, metavar="ROOT.json", help="root of trust over the keys"
    )
    keys.add_argument(
        "--release-key", type=Path, action="append", default=[], metavar="KEY", help="signs the manifest"
    )
    keys.add_argument("--publisher-key", type=Path, metavar="KEY", help="signs the model (OpenSSF Model Signing)")
    keys.add_argument(
        "--model-sig", type=Path, metavar="FILE", help="the publisher's own model.sig, kept as it is"
    )


def _build(args: argparse.Namespace) -> int:
    from bundles.builder import build, sign

    signing = _signing(args) if args.root or args.release_key or args.publisher_key or args.model_sig else None
    release = _release(args)
    with _progress(args) as report:
        manifest = build(release, args.model, args.out, report=report)
        signers = sign(args.out, signing, report=report) if signing else ()
    value = {"bundle": str(args.out), "signers": signers, **_facts(manifest)}
    state = f"signed by {len(signers)} release key(s)" if signers else "not signed yet: cloister bundle sign"
    emit(args, value, f"{printable(str(args.out))}: {manifest.reference}, {size(manifest.total_size)}, {state}")
    return 0


def _sign(args: argparse.Namespace) -> int:
    from bundles.builder import sign

    signing = _signing(args)
    with _progress(args) as report:
        signers = sign(args.bundle, signing, report=report)
    threshold = signing.root.roles["release"].threshold
    value = {"bundle": str(args.bundle), "signers": signers, "threshold": threshold}
    emit(
        args,
        value,
        f"{printable(str(args.bundle))}: signed by {len(signers)} release key(s), {threshold} must sign",
    )
    return 0


def _verify(args: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    from bundles.trust import roots
    from bundles.trust.policy import Site
    from bundles.verify import verify

    root = roots.load(args.root)
    site = Site(datetime.now(UTC), appliance=args.appliance)
    with _progress(args) as report:
        verified = verify(args.bundle, root, site=site, report=report)
    emit(args, {"verified": True, **_proof(verified), **_facts(verified.manifest)}, _describe_proof(verified))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from bundles.trust import roots
    from bundles.verify import inspect

    seen = inspect(args.bundle, roots.load(args.root) if args.root else None)
    value = {
        "verified": seen.verified is not None,
        "refusal": {"code": seen.refusal.code, "message": seen.refusal.message} if seen.refusal else None,
        "model_digest": seen.model_digest,
        "keyids": seen.keyids,
        "publisher_signature": seen.has_oms,
        **_facts(seen.manifest),
    }
    emit(args, value, f"{_verdict(seen)}\n\n{_describe(seen.manifest)}")
    return seen.refusal.exit_status if seen.refusal else 0


def _release(args: argparse.Namespace) -> "Release":
    from datetime import UTC, datetime, timedelta

    from bundles.builder import Release

    now = datetime.now(UTC)
    return Release(
        name=args.name,
        version=args.version,
        sequence=args.sequence,
        licence=args.licence,
        licence_files=tuple(args.licence_file),
        attestations=tuple(args.attest),
        targets=tuple(args.target),
        expires=None if args.expires_days is None else now + timedelta(days=args.expires_days),
        issued_at=now,
    )


def _signing(args: argparse.Namespace) -> "Signing":
    from bundles.builder import Signing
    from bundles.trust import roots
    from bundles.trust.signers import FileSigner

    if args.root is None:
        raise UsageError("signing needs --root ROOT.json, the root of trust over the keys")
    if args.publisher_key and args.model_sig:
        raise UsageError("give either --publisher-key or --model-sig: a model has one publisher's signature")
    return Signing(
        root=roots.load(args.root),
        release_keys=tuple(map(FileSigner, args.release_key)),
        publisher_key=FileSigner(args.publisher_key) if args.publisher_key else None,
        oms=args.model_sig.read_bytes() if args.model_sig else None,
    )


@contextmanager
def _progress(args: argparse.Namespace) -> Iterator["Report"]:
    """A bar on standard error; nothing with --json."""
    if args.json:
        yield lambda progress: None
        return
    from appliance.cli.progress import ProgressBar

    bar = ProgressBar()
    try:
        yield lambda progress: bar.update(progress.state, progress.bytes_done, progress.bytes_total, progress.file)
    finally:
        bar.close()


def _facts(manifest: "Manifest") -> dict[str, object]:
    return {"model_version": manifest.reference, "manifest": manifest.model_dump(mode="json", by_alias=True)}


def _proof(verified: "Verified") -> dict[str, object]:
    return {
        "model_digest": verified.model_digest,
        "root_version": verified.root.version,
        "signers": verified.signers,
        "publishers": verified.publishers,
    }


def _verdict(seen: "Inspection") -> str:
    if seen.verified is not None:
        version = seen.verified.root.version
        return (
            f"signatures VERIFIED against root of trust {version}; chunks were not read (cloister bundle verify)"
        )
    if seen.refusal is not None:
        return printable(f"NOT VERIFIED: {seen.refusal}. Nothing below may be believed.")
    return _UNVERIFIED


def _describe_proof(verified: "Verified") -> str:
    rows = [("release", keyid) for keyid in verified.signers] + [
        ("publisher", keyid) for keyid in verified.publishers
    ]
    return (
        f"VERIFIED against root of trust {verified.root.version}: every signature, chunk and file\n"
        f"{table(('signed as', 'key'), rows)}\n\n{_describe(verified.manifest)}"
    )


def _describe(manifest: "Manifest") -> str:
    model = manifest.model
    facts = [
        ("bundle", f"{manifest.reference} ({manifest.kind}), sequence {manifest.sequence}"),
        ("issued", manifest.issued_at + (f", expires {manifest.expires}" if manifest.expires else "")),
        ("for", ", ".join(manifest.targets) or "any appliance"),
        ("model", f"{model.architecture}, {model.dtype}, {model.parameters:,} parameters"),
        ("context", f"{model.max_context_tokens:,} tokens"),
        ("licence", ", ".join(f"{licence.spdx} ({licence.member})" for licence in manifest.licences)),
        ("canaries", str(len(manifest.canary))),
    ]
    lines = "\n".join(f"{name + ':':<10}{printable(text)}" for name, text in facts)
    files = table(("file", "bytes", "sha256"), [(file.path, file.size, file.sha256) for file in manifest.files])
    return f"{lines}\n\n{files}"
