"""`cloister bundle`: build, sign, verify and inspect bundles without a daemon; import and list through it."""

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.cli import bundle_page, bundle_preparing, bundle_signing
from appliance.cli.arguments import days, whole
from appliance.cli.failure import UsageError
from appliance.cli.output import emit, printable, size

if TYPE_CHECKING:
    from bundles.builder import Output, Release
    from bundles.difference import Difference
    from bundles.format.manifest import Manifest, Requirement
    from bundles.pipeline import Report
    from bundles.trust.policy import Verified
    from bundles.verify import Inspection

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_SIZE = re.compile(r"([0-9]{1,15})\s*(?:([KMGT]I?)?B?)", re.IGNORECASE | re.ASCII)


def register(parser: argparse.ArgumentParser) -> None:
    """The verbs of `cloister bundle`."""
    from appliance.cli import bundle_import

    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _register_build(verbs.add_parser("build", help="make a bundle from a model's folder"))
    sign = verbs.add_parser("sign", help="sign a bundle, in place")
    _add_bundle(sign, "the bundle, its first volume, or its folder")
    bundle_signing.add_options(sign, required=True)
    _add_bases(sign)
    sign.set_defaults(run=_sign)
    verify = verbs.add_parser("verify", help="verify every signature, chunk and file of a bundle; writes nothing")
    _add_bundle(verify, "the bundle, its first volume, or its folder")
    verify.add_argument(
        "--root", type=Path, required=True, metavar="ROOT.json", help="the root of trust to believe"
    )
    verify.add_argument(
        "--appliance",
        metavar="NAME",
        help="refuse a bundle that this appliance, as `cloister init --site` named it, would not import",
    )
    _add_bases(verify)
    verify.set_defaults(run=_verify)
    inspect = verbs.add_parser("inspect", help="what a bundle says about itself, and what it would change")
    _add_bundle(inspect, "the bundle, its first volume, or its folder")
    inspect.add_argument("--root", type=Path, metavar="ROOT.json", help="verify the signatures against this root")
    inspect.add_argument(
        "--against",
        type=Path,
        metavar="OTHER",
        help="compare with another bundle, or with the record of an installed version "
        "(store/models/NAME/SEQUENCE.json)",
    )
    inspect.set_defaults(run=_inspect)
    bundle_import.register_verbs(verbs)


def _add_bundle(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help=text)


def _add_bases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        type=Path,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="of a delta: the bundle that it was made against, and that one's own base where it has one",
    )


def _register_build(build: argparse.ArgumentParser) -> None:
    build.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="the model's folder, or a GGUF file"
    )
    build.add_argument("--name", required=True, help="the model's name: lower case letters, digits, '.', '_', '-'")
    build.add_argument("--version", required=True, help="shown to people")
    build.add_argument("--sequence", type=int, required=True, help="grows with every release of this name")
    build.add_argument("--out", type=Path, required=True, metavar="BUNDLE")
    build.add_argument("--kind", choices=("model", "adapter", "draft"), default="model", help="(default: model)")
    build.add_argument(
        "--requires",
        type=_requirement,
        action="append",
        default=[],
        metavar="NAME[=DIGEST]",
        help="of an adapter or draft: a model that it works with, by name, or by the digest of one version",
    )
    _register_terms(build)
    _register_form(build)
    bundle_preparing.add_options(build)
    bundle_signing.add_options(build, required=False)
    build.set_defaults(run=_build)


def _register_terms(build: argparse.ArgumentParser) -> None:
    build.add_argument(
        "--licence", default="", metavar="SPDX", help="SPDX expression (default: of the model card)"
    )
    build.add_argument("--licence-file", type=Path, action="append", default=[], metavar="FILE", help="its text")
    build.add_argument(
        "--accept-licence-required", action="store_true", help="an operator must accept it before first use"
    )
    build.add_argument("--attest", type=Path, action="append", default=[], metavar="FILE", help="carried as it is")
    build.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="APPLIANCE",
        help="only the appliance with this name (its `cloister init --site`) imports it; may be repeated",
    )
    build.add_argument("--expires-days", type=days, metavar="N", help="not importable after N days")
    build.add_argument(
        "--issued-at",
        type=_time,
        metavar="TIME",
        help="like 2026-01-31T23:59:59Z; the same input then gives the same bytes (default: SOURCE_DATE_EPOCH, or "
        "now)",
    )
    build.add_argument(
        "--gpu-memory", type=_bytes, default=0, metavar="SIZE", help="least memory of a GPU, such as 80GiB"
    )
    build.add_argument("--gpus", type=whole(0, 1024), default=0, metavar="N", help="least number of GPUs")


def _register_form(build: argparse.ArgumentParser) -> None:
    form = build.add_mutually_exclusive_group()
    form.add_argument(
        "--volume-size",
        type=_bytes,
        metavar="SIZE",
        help="split it into BUNDLE.001, BUNDLE.002 .. of at most this size, such as 32GB",
    )
    form.add_argument("--directory", action="store_true", help="a folder of the same members instead of a file")
    build.add_argument(
        "--base",
        type=Path,
        metavar="BUNDLE",
        help="a signed bundle of the version that appliances have: leave out the chunks that it has",
    )
    build.add_argument(
        "--chunk-size",
        type=_bytes,
        default=64 * 2**20,
        metavar="SIZE",
        help="what a resumed import and a delta count in, 4KiB to 64MiB; the same for a --base (default 64MiB)",
    )


def _build(args: argparse.Namespace) -> int:
    from bundles.builder import build, check, check_signing, prepared, sign, written

    quantisation = bundle_preparing.read_quantisation(args)
    keep = bundle_preparing.keeps_embeddings(args)
    bundle_preparing.check_signing(args, quantisation)
    signing = bundle_signing.read_signing(args) if bundle_signing.wanted(args) else None
    if signing:
        check_signing(signing)
    release, output = _release(args), _output(args)
    check(release, args.model, args.out, output=output)
    with (
        bundle_preparing.tidily(),
        _progress(args) as preparing,
        prepared(args.model, args.out, quantisation, preparing, keep_embeddings=keep) as source,
        _progress(args) as report,
    ):
        preparation = source.preparation
        manifest = build(release, source.folder, args.out, output=output, report=report, preparation=preparation)
        paths = written(args.out, manifest)
        bases = [args.base] if args.base else []
        signers = sign(paths[0], signing, bases=bases, report=report) if signing else ()
    value = {"bundle": str(paths[0]), "volumes": [*map(str, paths)], "signers": signers, **_facts(manifest)}
    state = f"signed by {len(signers)} release key(s)" if signers else "not signed yet: cloister bundle sign"
    volumes = f" and {len(paths) - 1} more volume(s)" if len(paths) > 1 else ""
    text = f"{printable(str(paths[0]))}{volumes}: {manifest.reference}, {size(manifest.total_size)}, {state}"
    if preparation is not None:
        value["preparation"] = {"steps": preparation.steps, "sources": dict(preparation.sources)}
    emit(args, value, "\n".join(filter(None, [text, bundle_preparing.summary(preparation)])))
    return 0


def _sign(args: argparse.Namespace) -> int:
    from bundles.builder import sign

    signing = bundle_signing.read_signing(args)
    with _progress(args) as report:
        signers = sign(args.bundle, signing, bases=args.base, report=report)
    threshold = signing.root.roles["release"].threshold
    value = {"bundle": str(args.bundle), "signers": signers, "threshold": threshold}
    emit(
        args,
        value,
        f"{printable(str(args.bundle))}: signed by {len(signers)} release key(s), {threshold} must sign",
    )
    return 0


def _verify(args: argparse.Namespace) -> int:
    from bundles.trust import roots
    from bundles.trust.policy import Site
    from bundles.verify import verify

    root, now = roots.load(args.root), datetime.now(UTC)
    with _progress(args) as report:
        verified = verify(
            args.bundle, root, site=Site(now, appliance=args.appliance), report=report, bases=args.base
        )
    emit(
        args, {"verified": True, **_proof(verified), **_facts(verified.manifest)}, bundle_page.proof(verified, now)
    )
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from bundles.trust import roots
    from bundles.verify import inspect

    now = datetime.now(UTC)
    seen = inspect(args.bundle, roots.load(args.root) if args.root else None, now=now)
    against = _compare(seen, args.against) if args.against else None
    value: dict[str, Any] = {
        "verified": seen.verified is not None,
        "refusal": {"code": seen.refusal.code, "message": seen.refusal.message} if seen.refusal else None,
        "model_digest": seen.model_digest,
        "keyids": seen.keyids,
        "publisher_signature": seen.oms is not None,
        **(_proof(seen.verified) if seen.verified else {}),
        **_facts(seen.manifest),
        **({"difference": _plain(against)} if against else {}),
    }
    emit(args, value, bundle_page.page(seen, against, now))
    return seen.refusal.exit_status if seen.refusal else 0


def _compare(seen: "Inspection", other: Path) -> "Difference":
    from bundles.difference import difference, read_version, version_of

    return difference(read_version(other), version_of(seen.manifest, seen.model_digest))


def _plain(found: "Difference") -> dict[str, object]:
    return {
        "before": found.before,
        "after": found.after,
        "added": found.added,
        "removed": found.removed,
        "changed": {path: {"before": sizes[0], "after": sizes[1]} for path, sizes in found.changed.items()},
        "same": found.same,
        "new_bytes": found.new_bytes,
        "facts": {change.name: {"before": change.before, "after": change.after} for change in found.facts},
    }


def _release(args: argparse.Namespace) -> "Release":
    from bundles.builder import Release

    issued_at = args.issued_at or _epoch() or datetime.now(UTC)
    return Release(
        name=args.name,
        version=args.version,
        sequence=args.sequence,
        kind=args.kind,
        requires=tuple(args.requires),
        licence=args.licence,
        licence_files=tuple(args.licence_file),
        chunk_size=args.chunk_size,
        accept_licence=args.accept_licence_required,
        attestations=tuple(args.attest),
        targets=tuple(args.target),
        expires=_expiry(issued_at, args.expires_days),
        issued_at=issued_at,
        gpu_memory=args.gpu_memory,
        gpus=args.gpus,
        site_publisher=args.site_publisher is not None,
    )


def _expiry(issued_at: datetime, after_days: int | None) -> datetime | None:
    try:
        return None if after_days is None else issued_at + timedelta(days=after_days)
    except OverflowError:
        raise UsageError("--expires-days leads beyond the year 9999") from None


def _output(args: argparse.Namespace) -> "Output":
    from bundles.builder import Output

    return Output(volume_size=args.volume_size, directory=args.directory, base=args.base)


def _epoch() -> datetime | None:
    """The moment that reproducible builds are told by the environment."""
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if not text:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 11:
        raise UsageError("SOURCE_DATE_EPOCH is not a number of seconds since 1970")
    return datetime.fromtimestamp(int(text), UTC)


def _time(text: str) -> datetime:
    from bundles.format.manifest import parse_time

    try:
        return parse_time(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a time like 2026-01-31T23:59:59Z") from None


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a size like 32GB or 80GiB")
    return int(match[1]) * _UNITS[(match[2] or "").upper()]


def _requirement(text: str) -> "Requirement":
    from pydantic import ValidationError

    from bundles.format.manifest import Requirement

    name, _, digest = text.partition("=")
    try:
        return Requirement(name=name, model_digest=digest or None)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not NAME or NAME=DIGEST (64 hex digits)") from None


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
        "publisher_role": verified.publisher_role,
    }
