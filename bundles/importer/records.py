"""What the ledger remembers, as values: versions, imports, outbox rows, damage."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from bundles.format.manifest import parse_time
from bundles.pipeline import Progress, State
from bundles.trust.policy import Verified

_TUPLES = ("signers", "publishers", "certificates", "files", "requires", "licences", "canaries")


@dataclass(frozen=True)
class ModelVersion:
    """A committed model version.

    Attributes:
        name: the model's.
        version: shown to people.
        sequence: release order.
        model_digest: SHA-256 of the signed manifest, hex.
        kind: model, adapter or draft.
        imported_at: seconds since the epoch.
        issued_at: of the release, seconds since the epoch.
        signers: ids of the release keys that counted.
        publishers: ids of the publisher's keys that counted.
        certificates: of the publisher, issuer and serial number of each; none with raw keys.
        total_size: bytes of all files.
        architecture: as config.json names it.
        files: path, size and SHA-256 of each.
        evidence: digests in the store of the signed documents, by what they are.
        requires: name and model_digest (or None) of the models it works with.
        licences: spdx, sha256 and accept of each.
        canaries: messages, match, expected and max_tokens of each.
        canary_pass_percent: how many of them must pass.
        gpu_memory: least bytes per device it was meant for.
        gpus: number of devices.
    """

    name: str
    version: str
    sequence: int
    model_digest: str
    kind: str
    imported_at: int
    issued_at: int
    signers: tuple[str, ...]
    publishers: tuple[str, ...]
    certificates: tuple[str, ...]
    total_size: int
    architecture: str
    files: tuple[Mapping[str, str | int], ...]
    evidence: Mapping[str, str]
    requires: tuple[Mapping[str, Any], ...] = ()
    licences: tuple[Mapping[str, Any], ...] = ()
    canaries: tuple[Mapping[str, Any], ...] = ()
    canary_pass_percent: int = 100
    gpu_memory: int = 0
    gpus: int = 0

    @classmethod
    def of(cls, verified: Verified, imported_at: int, evidence: Mapping[str, str]) -> "ModelVersion":
        """Of a bundle that passed."""
        manifest = verified.manifest
        return cls(
            name=manifest.name,
            version=manifest.version,
            sequence=manifest.sequence,
            model_digest=verified.model_digest,
            kind=manifest.kind,
            imported_at=imported_at,
            issued_at=int(parse_time(manifest.issued_at).timestamp()),
            signers=verified.signers,
            publishers=verified.publishers,
            certificates=verified.certificates,
            total_size=manifest.total_size,
            architecture=manifest.model.architecture,
            files=tuple({"path": f.path, "size": f.size, "sha256": f.sha256} for f in manifest.files),
            evidence=evidence,
            requires=tuple(need.model_dump() for need in manifest.requires),
            licences=tuple(given.model_dump(include={"spdx", "sha256", "accept"}) for given in manifest.licences),
            canaries=tuple(canary.model_dump(mode="json") for canary in manifest.canary),
            canary_pass_percent=manifest.canary_pass_percent,
            gpu_memory=manifest.resources.gpu_memory,
            gpus=manifest.resources.gpus,
        )

    @property
    def reference(self) -> str:
        """name@version."""
        return f"{self.name}@{self.version}"

    def digests(self) -> Iterator[str]:
        """SHA-256 of everything that the store holds of it: the files and the evidence."""
        return (digest for _, digest in self.paths())

    def paths(self) -> Iterator[tuple[str, str]]:
        """What the store holds of it, with the SHA-256 of each: paths of files, names of evidence."""
        yield from ((str(file["path"]), str(file["sha256"])) for file in self.files)
        yield from self.evidence.items()

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it; of 100 000 files no copy is made."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, text: str) -> "ModelVersion":
        """Of what `as_dict` gave."""
        fields = json.loads(text)
        return cls(**fields | {name: tuple(fields[name]) for name in _TUPLES})


@dataclass(frozen=True)
class Import:
    """One import; times are nanoseconds since the epoch, `offered` is where it took its last volume that was."""

    import_id: str
    path: str
    started_ns: int
    changed_ns: int
    progress: Progress
    offered: str = ""


@dataclass(frozen=True)
class Entry:
    """One outbox row.

    Attributes:
        sequence: grows by one.
        event: import, removal, damage, repair or trust.
        import_id: empty where no import did it.
        state: of the import; None for other events.
        reason: stable code, with a rejection.
        model_version: name@version, once known.
        model_digest: hex, once known.
        detail: what exactly, where the event is no import.
        utc_ns: nanoseconds since the epoch.
    """

    sequence: int
    event: str
    import_id: str
    state: State | None
    reason: str
    model_version: str
    model_digest: str
    detail: str
    utc_ns: int


@dataclass(frozen=True)
class Damage:
    """A file of the store that is not what its name says: changed, absent or unreadable."""

    sha256: str
    finding: str


@dataclass(frozen=True)
class Scrub:
    """Where a scrub is.

    Attributes:
        position: the last digest that was hashed; empty before the first of a round.
        started: seconds since the epoch; 0 when none runs.
        ended: when the last complete one ended, seconds since the epoch; 0 before the first.
        bytes_done: bytes hashed in the running one.
    """

    position: str = ""
    started: int = 0
    ended: int = 0
    bytes_done: int = 0
