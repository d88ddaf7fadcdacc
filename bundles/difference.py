"""What changes when one version of a model takes the place of another: files, bytes, parameters, licences."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bundles.base import read_manifest
from bundles.format import strict_json
from bundles.format.container import open_file
from bundles.format.errors import BundleError
from bundles.format.manifest import Manifest

_MAX_RECORD = 64 * 1024 * 1024


class Content(NamedTuple):
    """A file's size in bytes and its SHA-256, hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Version:
    """A version, as a bundle or as the store's record of it has it; nothing of it is believed here.

    Attributes:
        reference: name@version.
        model_digest: SHA-256 of its manifest, hex.
        files: by path.
        facts: texts by name; a record knows fewer than a bundle.
    """

    reference: str
    model_digest: str
    files: Mapping[str, Content]
    facts: Mapping[str, str]


class Change(NamedTuple):
    """A file, or a fact, that is not the same."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Difference:
    """What is not the same in two versions.

    Attributes:
        before: reference of the one.
        after: reference of the other.
        added: files that only the other has, with their sizes.
        removed: files that only the one had, with their sizes.
        changed: files with other bytes, with their sizes before and after.
        same: how many files are the same.
        new_bytes: of files whose bytes the one has under no name; what a store must find room for.
        facts: what else is stated otherwise.
    """

    before: str
    after: str
    added: Mapping[str, int]
    removed: Mapping[str, int]
    changed: Mapping[str, tuple[int, int]]
    same: int
    new_bytes: int
    facts: tuple[Change, ...]


def version_of(manifest: Manifest, model_digest: str) -> Version:
    """The version that a manifest states."""
    files = {file.path: Content(file.size, file.sha256) for file in manifest.files}
    model = manifest.model
    facts = {
        "kind": manifest.kind,
        "sequence": str(manifest.sequence),
        "architecture": model.architecture,
        "parameters": f"{model.parameters:,}",
        "dtype": model.dtype,
        "context": f"{model.max_context_tokens:,}",
        "capabilities": ", ".join(model.capabilities),
        "licences": _licences([(licence.spdx, licence.accept) for licence in manifest.licences]),
        "canaries": f"{len(manifest.canary)}, {manifest.canary_pass_percent}% must pass",
        "GPU memory": f"{manifest.resources.gpu_memory:,} bytes",
        "GPUs": str(manifest.resources.gpus),
    }
    return Version(manifest.reference, model_digest, files, facts)


def read_version(path: Path) -> Version:
    """The version in a bundle, or in the record that a store keeps of one (models/NAME/SEQUENCE.json).

    Raises:
        BundleError: RECORD_UNREADABLE; of a bundle the codes of its head.
    """
    if path.suffix == ".json" and path.is_file():
        return _of_record(path)
    return version_of(*read_manifest(path))


def difference(before: Version, after: Version) -> Difference:
    """What `after` has other than `before`."""
    common = before.files.keys() & after.files.keys()
    held = {content.sha256 for content in before.files.values()}
    new = {content.sha256: content.size for content in after.files.values() if content.sha256 not in held}
    changed = sorted(path for path in common if before.files[path] != after.files[path])
    return Difference(
        before=before.reference,
        after=after.reference,
        added={path: after.files[path].size for path in sorted(after.files.keys() - common)},
        removed={path: before.files[path].size for path in sorted(before.files.keys() - common)},
        changed={path: (before.files[path].size, after.files[path].size) for path in changed},
        same=len(common) - len(changed),
        new_bytes=sum(new.values()),
        facts=tuple(
            Change(name, before.facts[name], value)
            for name, value in after.facts.items()
            if name in before.facts and before.facts[name] != value
        ),
    )


def _of_record(path: Path) -> Version:
    with open(open_file(path), "rb") as stream:
        raw = stream.read(_MAX_RECORD)
    try:
        record = strict_json.parse_object(raw, str(path))
    except BundleError:
        raise _no_record(path) from None
    match record:
        case {
            "name": str(name),
            "version": str(version),
            "model_digest": str(digest),
            "sequence": int(sequence),
            "kind": str(kind),
            "architecture": str(architecture),
            "files": list(files),
            "licences": list(licences),
            "canaries": list(canaries),
            "canary_pass_percent": int(percent),
        }:
            try:
                listed = {str(f["path"]): Content(int(f["size"]), str(f["sha256"])) for f in files}
                given = _licences([(str(licence["spdx"]), bool(licence["accept"])) for licence in licences])
            except (KeyError, TypeError, ValueError):
                raise _no_record(path) from None
            facts = {"kind": kind, "sequence": str(sequence), "architecture": architecture, "licences": given}
            facts["canaries"] = f"{len(canaries)}, {percent}% must pass"
            return Version(f"{name}@{version}", digest, listed, facts)
    raise _no_record(path)


def _no_record(path: Path) -> BundleError:
    return BundleError("RECORD_UNREADABLE", f"{path} is no record of a model version (store/models/NAME/N.json)")


def _licences(given: list[tuple[str, bool]]) -> str:
    return ", ".join(dict.fromkeys(f"{spdx} (to be accepted)" if accept else spdx for spdx, accept in given))
