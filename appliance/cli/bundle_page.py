"""What a bundle is, on one page for people: 80 columns, every foreign character spelled out that is not text."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from appliance.cli.output import printable, size

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from bundles.difference import Difference
    from bundles.format.manifest import Manifest
    from bundles.trust.policy import Verified
    from bundles.verify import Inspection

WIDTH = 80
_INDENT = 14
_MOST_FILES = 20
_MOST_SOURCES = 4
_MOST_CANARIES = 3
_MOST_TEXT = 1600  # of one fact: 25 lines; a bundle may state megabytes


def page(seen: "Inspection", against: "Difference | None", now: datetime) -> str:
    """The page of a bundle that was inspected; what it would change where there is something to compare."""
    manifest = seen.manifest
    sections = [
        _verdict(seen),
        "\n".join(_identity(manifest, seen.model_digest, now)),
        _section("signed by", _signers(seen)),
        _section("needs", _needs(manifest)),
        _section("licences", _licences(manifest)),
        _section("statements", _statements(manifest, seen.documents)),
        _section("canaries", _canaries(manifest)),
        _section("files", _files(manifest)),
        _section("compared", _changes(against)) if against else "",
    ]
    return "\n\n".join(filter(None, sections))


def proof(verified: "Verified", now: datetime) -> str:
    """The page of a bundle that was verified whole."""
    manifest = verified.manifest
    return "\n\n".join(
        (
            f"VERIFIED against root of trust {verified.root.version}: every signature, chunk and file",
            "\n".join(_identity(manifest, verified.model_digest, now)),
            _section("signed by", _proven(verified)),
            _section("needs", _needs(manifest)),
            _section("licences", _licences(manifest)),
            _section("files", _files(manifest)),
        )
    )


def _changes(found: "Difference") -> Iterator[str]:
    yield from _fact("with", found.before)
    for change in found.facts:
        yield from _fact(change.name, f"{change.before or '-'} -> {change.after or '-'}")
    counts = (("added", found.added), ("removed", found.removed), ("changed", found.changed))
    if not found.facts and not any(files for _, files in counts):
        yield "  nothing: the same files under the same statements"
        return
    yield from _fact(
        "files", ", ".join([*(f"{len(f):,} {name}" for name, f in counts), f"{found.same:,} the same"])
    )
    yield from _fact("new bytes", f"{size(found.new_bytes)} that are in no file of the other")
    lines = [(f"+ {path}", size(count)) for path, count in found.added.items()]
    lines += [(f"- {path}", size(count)) for path, count in found.removed.items()]
    lines += [(f"* {path}", f"{size(b)} -> {size(a)}") for path, (b, a) in found.changed.items()]
    yield from _rows(lines)


def _section(title: str, lines: Iterable[str]) -> str:
    body = "\n".join(lines)
    return f"{printable(title).upper()}\n{body}" if body else ""


def _fact(name: str, text: str) -> list[str]:
    """One named text, wrapped behind its name."""
    shown = _clip(printable(_clip(text, _MOST_TEXT)), _MOST_TEXT)
    lines = textwrap.wrap(shown, WIDTH - _INDENT - 2, break_on_hyphens=False) or ["-"]
    label = f"  {printable(name)}"
    wide = (
        [_clip(label, WIDTH)] if len(label) > _INDENT else []
    )  # a name that leaves no room has a line of its own
    first = "" if wide else label
    behind = [f"{(first if i == 0 else '').ljust(_INDENT + 2)}{line}".rstrip() for i, line in enumerate(lines)]
    return wide + behind


def _rows(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Names with something at the right; those beyond the first are counted."""
    for name, value in rows[:_MOST_FILES]:
        room = WIDTH - len(value) - 4
        yield f"  {_clip(printable(name), room).ljust(room)}  {value}"
    if len(rows) > _MOST_FILES:
        yield f"  and {len(rows) - _MOST_FILES:,} more: all with --json"


def _clip(text: str, room: int) -> str:
    """The ends of a text that is too long: the end of a path says the most, its beginning where it is."""
    if len(text) <= room:
        return text
    return f"{text[: room // 3]}...{text[len(text) - (room - room // 3 - 3) :]}"


def _verdict(seen: "Inspection") -> str:
    if seen.verified is not None:
        version = seen.verified.root.version
        return (
            f"signatures VERIFIED against root of trust {version}; chunks were not read\n"
            "(cloister bundle verify reads them)"
        )
    if seen.refusal is not None:
        text = printable(f"NOT VERIFIED: {seen.refusal}. Nothing below may be believed.")
    else:
        text = "NOT VERIFIED: no root of trust was given (--root). Nothing below may be believed."
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _identity(manifest: "Manifest", model_digest: str, now: datetime) -> Iterator[str]:
    model = manifest.model
    yield from _fact("bundle", f"{manifest.reference} ({manifest.kind}), sequence {manifest.sequence}")
    yield from _fact("digest", model_digest)
    yield from _fact("model", f"{model.architecture}, {model.dtype}, {model.parameters:,} parameters")
    if model.max_context_tokens:
        yield from _fact("context", f"{model.max_context_tokens:,} tokens; {', '.join(model.capabilities)}")
    yield from _fact("size", f"{size(manifest.total_size)} in {len(manifest.files):,} files")
    yield from _fact("issued", manifest.issued_at)
    yield from _fact("expires", _expiry(manifest, now))
    yield from _fact("for", ", ".join(manifest.targets) or "any appliance")


def _expiry(manifest: "Manifest", now: datetime) -> str:
    from bundles.format.manifest import parse_time

    if manifest.expires is None:
        return "never"
    left = parse_time(manifest.expires) - now
    if left.total_seconds() <= 0:
        return f"{manifest.expires}: EXPIRED, {-left.days} days ago"
    return f"{manifest.expires}, in {left.days} days"


def _signers(seen: "Inspection") -> Iterator[str]:
    if seen.verified is not None:
        yield from _proven(seen.verified)
    else:
        for keyid in seen.keyids:
            yield from _fact("claimed", f"release key {keyid}")
        if not seen.keyids:
            yield from _fact("release", "nobody yet: cloister bundle sign")
    if seen.oms is None:
        yield from _fact("publisher", "nobody yet: cloister bundle sign --publisher-key")
    else:
        yield from _publisher(seen.oms, claimed=seen.verified is None)


def _proven(verified: "Verified") -> Iterator[str]:
    role = verified.root.roles["release"]
    yield from _fact("release", f"{len(verified.signers)} of {len(role.keyids)} keys; {role.threshold} must sign")
    for keyid in verified.signers:
        yield from _key(verified, keyid)
    yield from _fact("publisher", f"role {verified.publisher_role}")
    for keyid in verified.publishers:
        yield from _key(verified, keyid)


def _key(verified: "Verified", keyid: str) -> list[str]:
    key = verified.root.keys.get(keyid)
    return _fact("", f"{keyid} {key.scheme if key else 'by certificate'}")


def _publisher(raw: bytes, *, claimed: bool) -> Iterator[str]:
    """The certificate that an OMS signature carries, in its own words."""
    from bundles.format.errors import BundleError
    from bundles.trust import oms

    try:
        signature = oms.read(raw)
    except BundleError as error:
        yield from _fact("publisher", f"a signature that cannot be read: {error.code}")
        return
    if claimed and not signature.chain:
        yield from _fact("claimed", f"publisher's key with SHA-256 of its PEM {signature.hint or 'not stated'}")
    for certificate in signature.chain[:1]:
        yield from _certificate(certificate)
    if len(signature.envelope.signatures) > 1:
        yield from _fact("", f"{len(signature.envelope.signatures)} signatures, of which the first is ECDSA")


def _certificate(certificate: "Certificate") -> list[str]:
    """Whose it is; its fields are parsed only here, and may be anything until it is verified."""
    from bundles.trust.certificates import MALFORMED

    try:
        subject, issuer = certificate.subject.rfc4514_string(), certificate.issuer.rfc4514_string()
        until = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
    except MALFORMED:
        return _fact("certificate", "one that cannot be read")
    return [
        *_fact("certificate", subject),
        *_fact("", f"issued by {issuer}"),
        *_fact("", f"valid until {until}"),
    ]


def _needs(manifest: "Manifest") -> Iterator[str]:
    yield from _fact("engine", f"Cloister {manifest.min_engine} or newer")
    if manifest.not_before != manifest.issued_at:
        yield from _fact("not before", manifest.not_before)
    resources = manifest.resources
    if resources.gpus or resources.gpu_memory:
        memory = f" with {size(resources.gpu_memory)} each" if resources.gpu_memory else ""
        yield from _fact("GPUs", f"{max(1, resources.gpus)}{memory}")
    for required in manifest.requires:
        which = f"manifest {required.model_digest}" if required.model_digest else "any version"
        yield from _fact("model", f"{required.name}: {which}")
    if manifest.base:
        yield from _fact("base", f"holds only what changed since the model with the manifest {manifest.base}")
    if manifest.volumes:
        yield from _fact("volumes", f"{len(manifest.volumes)}, carried in one after the other")


def _licences(manifest: "Manifest") -> Iterator[str]:
    for licence in manifest.licences:
        accept = "; an operator must accept it before first use" if licence.accept else ""
        yield from _fact(licence.member.removeprefix("licence/"), f"{licence.spdx}{accept}")


def _statements(manifest: "Manifest", documents: Mapping[str, bytes]) -> Iterator[str]:
    for document in manifest.attestations:
        name = document.member.removeprefix("attest/")
        yield from _fact(name, f"{size(document.size)}{_about(name, documents.get(document.member, b''))}")


def _about(name: str, content: bytes) -> str:
    """What a statement that building makes says, in a few words."""
    from bundles.format import strict_json
    from bundles.format.errors import BundleError

    try:
        if name == "mlbom.json":
            return _about_materials(strict_json.parse_object(content, name, any_number=True))
        if name == "slsa.json":
            return _about_provenance(strict_json.parse_object(content, name, any_number=True))
        if name == "preparation.json":
            return _about_preparation(strict_json.parse_object(content, name, any_number=True))
    except BundleError:
        return ""
    return "; the signature of the source it was made from, kept" if name == "upstream-model.sig" else ""


def _about_materials(bom: Mapping[str, Any]) -> str:
    match bom:
        case {
            "bomFormat": "CycloneDX",
            "specVersion": version,
            "components": [*components],
            "metadata": dict(meta),
        }:
            kinds = Counter(str(c.get("type")) for c in components if isinstance(c, dict))
            parts = [f"{count:,} {kind}{'s' if count > 1 else ''}" for kind, count in kinds.most_common(4)]
            return f"; CycloneDX {version}: {', '.join(parts)}{_about_card(meta.get('component'))}"
    return ""


def _about_card(component: object) -> str:
    match component:
        case {"modelCard": {"modelParameters": dict(known)}, **rest}:
            said = [f"task {known['task']}"] if "task" in known else []
            names = _names(known.get("datasets"))
            said += [f"datasets {', '.join(names)}"] if names else []
            match rest:
                case {"pedigree": {"ancestors": [{"name": ancestor}, *_]}}:
                    said.append(f"made from {ancestor}")
            return "; " + "; ".join(said) if said else ""
    return ""


def _about_provenance(statement: Mapping[str, Any]) -> str:
    match statement:
        case {
            "predicateType": "https://slsa.dev/provenance/v1",
            "predicate": {
                "runDetails": {"builder": {"version": dict(tools)}},
                "buildDefinition": dict(definition),
            },
        }:
            sources = _names(definition.get("resolvedDependencies"))
            more = f" and {len(sources) - _MOST_SOURCES} more" if len(sources) > _MOST_SOURCES else ""
            made_from = f", from {', '.join(sources[:_MOST_SOURCES])}{more}" if sources else ""
            return f"; SLSA v1: built by {' '.join(f'{k} {v}' for k, v in tools.items())}{made_from}"
    return ""


def _about_preparation(account: Mapping[str, Any]) -> str:
    said = []
    for step in account.get("steps") or ():
        match step:
            case {"from": "gguf"}:
                said.append("converted from GGUF")
            case {"bits": int(bits), "calibration": {"perplexity_before": before, "perplexity_after": after}}:
                said.append(f"quantised to int{bits}, perplexity {before} before and {after} after")
            case {"bits": int(bits)}:
                said.append(f"quantised to int{bits}")
    return "; " + ", ".join(said) if said else ""


def _names(listed: object) -> list[str]:
    """What the objects of a list are called."""
    return [str(d.get("name")) for d in listed if isinstance(d, dict)] if isinstance(listed, list) else []


def _canaries(manifest: "Manifest") -> Iterator[str]:
    if not manifest.canary:
        yield "  none: nothing shows that it works before it is used"
        return
    kinds = Counter(canary.match for canary in manifest.canary)
    how = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    yield from _fact("asked", f"{len(manifest.canary)} ({how}); {manifest.canary_pass_percent}% must pass")
    for canary in manifest.canary[:_MOST_CANARIES]:
        asked = printable(" ".join(canary.messages[-1].content.split()))
        yield f"  {textwrap.shorten(asked, WIDTH - 2, placeholder=' ...')}"


def _files(manifest: "Manifest") -> Iterator[str]:
    counts, sizes = Counter[str](), Counter[str]()
    for file in manifest.files:
        counts[file.role] += 1
        sizes[file.role] += file.size
    for role, count in counts.most_common():
        yield from _fact(role, f"{count:,} file{'s' if count > 1 else ''}, {size(sizes[role])}")
    yield from _rows([(file.path, f"{size(file.size)}  {file.sha256[:16]}") for file in manifest.files])
