"""`cloister trust show`: a root, a revocation document, what a bundle brings of them, or what is in force."""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli.output import emit, plain, printable, table

if TYPE_CHECKING:
    from appliance.protos import admin_pb2
    from bundles.trust.revocation import Revocations
    from bundles.trust.roots import Root

Verbs = argparse._SubParsersAction  # the type of what add_subparsers returns has no public name

_UNSIGNED = ("ROOT_THRESHOLD", "ROOT_NOT_SIGNED_BY_OLD", "PQ_SIGNATURE_MISSING", "CLASSICAL_SIGNATURE_MISSING")
_GROUP = 4  # characters of a fingerprint that are read aloud at once


def register_verbs(verbs: "Verbs[argparse.ArgumentParser]") -> None:
    """Add `show` to `cloister trust`."""
    show = verbs.add_parser("show", help="roles, thresholds, fingerprints and revocations, of a file or in force")
    show.add_argument(
        "file",
        type=Path,
        nargs="?",
        metavar="FILE",
        help="a root, a revocation document or any bundle; without it, what is in force in the appliance",
    )
    show.set_defaults(run=_show)


def facts_of(root: "Root") -> dict[str, object]:
    """A root for programs."""
    from bundles.format.manifest import format_time
    from bundles.trust import roots

    return {
        "version": root.version,
        "fingerprint": roots.fingerprint(root.raw),
        "expires": format_time(root.expires),
        "roles": {
            name: {
                "threshold": role.threshold,
                "keys": [{"keyid": key.keyid, "scheme": key.scheme} for key in root.role_keys(name)],
                "hybrid": name in root.extension.hybrid,
                "certificate_authorities": [
                    certificate.subject.rfc4514_string()
                    for certificate in root.extension.authorities.get(name, ())
                ],
                "crl_required": name in root.extension.crl_required,
            }
            for name, role in root.roles.items()
        },
    }


def describe(root: "Root") -> str:
    """A root for people."""
    from bundles.format.manifest import format_time
    from bundles.trust import roots

    rows = [
        (name, f"{role.threshold} of {len(role.keyids)}", key.scheme, key.keyid)
        for name, role in root.roles.items()
        for key in root.role_keys(name)
    ]
    lines = [
        f"root of trust, version {root.version}, valid until {format_time(root.expires)}",
        f"fingerprint: {grouped(roots.fingerprint(root.raw))}",
        table(("role", "must sign", "scheme", "key"), rows),
        *_beyond(root),
    ]
    return "\n".join(lines)


def grouped(digest: str) -> str:
    """A digest in groups that two people can compare over a telephone."""
    return " ".join(digest[i : i + _GROUP] for i in range(0, len(digest), _GROUP))


def tell(
    args: argparse.Namespace,
    path: Path,
    raw: bytes,
    value: Mapping[str, object],
    advice: str,
    old: "Root | None" = None,
) -> None:
    """Tell of a root that was written: what it says, whether enough have signed it; `old` is the version before.

    Raises:
        BundleError: ROOT_SCHEMA, ROOT_SKIPPED, and the like.
    """
    from bundles.trust import roots

    root, missing = roots.read(raw), _missing(raw, old)
    value = {"root": str(path), "complete": not missing, "missing": missing, **value, **facts_of(root)}
    if missing:
        advice = f"written to {printable(str(path))}, {_incomplete(path, root, missing)}"
    emit(args, value, f"{describe(root)}\n\n{advice}")


def _incomplete(path: Path, root: "Root", missing: str) -> str:
    """What to do about a root that lacks signatures."""
    before = "--root ROOT.json " if root.version > 1 else ""
    return (
        f"NOT COMPLETE: {missing}.\nEvery other holder of a root key compares the fingerprint above, then runs: "
        f"cloister trust sign {printable(str(path))} {before}--key KEY"
        + (f", where ROOT.json is version {root.version - 1}" if before else "")
    )


def _missing(raw: bytes, old: "Root | None") -> str:
    """Whose signatures a root lacks; empty where it is complete."""
    from bundles.format.errors import BundleError
    from bundles.trust import roots

    try:
        root = roots.parse(raw)
        if old is not None:
            roots.advance(old, [root])
    except BundleError as error:
        if error.code not in _UNSIGNED:
            raise
        return error.message
    return ""


def _beyond(root: "Root") -> Iterable[str]:
    for role in sorted(root.extension.hybrid):
        yield f"{role}: a classical and a post-quantum key must both sign"
    for role, authorities in root.extension.authorities.items():
        lists = ", with a revocation list in force" if role in root.extension.crl_required else ""
        for authority in authorities:
            name = printable(authority.subject.rfc4514_string())
            yield f"{role}: code-signing certificates of {name}{lists}"


def revocation_facts(revocations: "Revocations") -> dict[str, object]:
    """A revocation document for programs."""
    return {**revocations.document.model_dump(mode="json", by_alias=True), "digest": revocations.digest}


def describe_revocations(revocations: "Revocations") -> str:
    """A revocation document for people."""
    said = revocations.document
    rows = [
        *(("key", keyid) for keyid in said.keys),
        *(("manifest", digest) for digest in said.manifests),
        *(("certificate", f"{entry.serial} of {entry.issuer_sha256}") for entry in said.certificates),
        *(("list of", crl.issuer.rfc4514_string()) for crl in revocations.crls),
        *(("minimum", f"{name} {sequence}") for name, sequence in said.minimum_sequences.items()),
    ]
    heading = f"revocations, sequence {said.sequence}, of {said.issued_at}, the next due by {said.expires}"
    return f"{heading}\n{table(('revoked', 'which'), rows)}" if rows else f"{heading}: nothing is revoked"


def _show(args: argparse.Namespace) -> int:
    if args.file is None:
        return _show_in_force(args)
    raw = _text_of(args.file)
    if raw is None:
        return _show_bundle(args)
    return _show_revocations(args, raw) if b'"payloadType"' in raw else _show_root(args)


def _text_of(path: Path) -> bytes | None:
    """A JSON document; None for a bundle, which may be large."""
    from bundles.trust.revocation import MAX_REVOCATION

    if path.is_dir():
        return None
    with path.open("rb") as stream:
        raw = stream.read(MAX_REVOCATION + 1)
    return raw if raw.lstrip()[:1] == b"{" else None


def _show_root(args: argparse.Namespace) -> int:
    from bundles.trust import roots

    raw = args.file.read_bytes()
    root, missing = roots.read(raw), _missing(raw, None)
    value = {"complete": not missing, "missing": missing, **facts_of(root)}
    note = f"\n\n{_incomplete(args.file, root, missing)}" if missing else ""
    emit(args, value, describe(root) + note)
    return 0


def _show_revocations(args: argparse.Namespace, raw: bytes) -> int:
    from bundles.trust import revocation

    found = revocation.parse(raw)
    emit(args, revocation_facts(found), f"{describe_revocations(found)}\nNOT VERIFIED: no root was asked")
    return 0


def _show_bundle(args: argparse.Namespace) -> int:
    from bundles.trust import revocation, roots

    chain, document = _trust_in(args.file)
    found = [roots.parse(raw) for raw in chain]
    held = revocation.parse(document) if document is not None else None
    value = {
        "roots": [facts_of(root) for root in found],
        "revocations": revocation_facts(held) if held else None,
    }
    parts = [*map(describe, found), *([describe_revocations(held)] if held else [])]
    note = "NOT VERIFIED: this is what the bundle brings; an appliance believes what follows from its own root"
    emit(args, value, "\n\n".join([*parts, note]))
    return 0


def _trust_in(path: Path) -> tuple[tuple[bytes, ...], bytes | None]:
    from contextlib import closing

    from bundles.format.source import beside
    from bundles.reader import BundleReader

    with closing(BundleReader(beside(path))) as reader:
        head = reader.read_trust() if reader.read_header() == "trust" else reader.read_head()
    return head.roots, head.revocation


def _show_in_force(args: argparse.Namespace) -> int:
    from appliance.client.admin import AdminClient
    from appliance.protos import admin_pb2

    with AdminClient(args.home) as admin:
        trust = admin.models.GetTrust(admin_pb2.GetTrustRequest())
    emit(args, plain(trust), _describe_in_force(trust))
    return 0


def _describe_in_force(trust: "admin_pb2.GetTrustResponse") -> str:
    rows = [
        (role.name, f"{role.threshold} of {len(role.keyids)}", "hybrid" if role.hybrid else "", keyid)
        for role in trust.roles
        for keyid in role.keyids or ("by certificate",)
    ]
    lines = [
        f"root of trust, version {trust.root_version}, valid until {_time(trust.root_expires)}",
        table(("role", "must sign", "", "key"), rows),
    ]
    if trust.revocation_sequence:
        due = _time(trust.revocation_expires)
        lines.append(
            f"revocations, sequence {trust.revocation_sequence}, of {_time(trust.revocation_issued)}, the next "
            f"due by {due}"
        )
    lines.extend(_floors(trust.sequence_floors))
    lines.extend(f"ATTENTION: {printable(warning)}" for warning in trust.warnings)
    return "\n".join(lines)


def _time(moment: object) -> str:
    from google.protobuf.timestamp_pb2 import Timestamp

    return moment.ToJsonString() if isinstance(moment, Timestamp) else ""


def _floors(floors: Mapping[str, int]) -> Iterable[str]:
    for name, sequence in sorted(floors.items()):
        yield f"{printable(name)}: nothing below sequence {sequence} is imported any more"
