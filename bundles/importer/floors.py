"""What nothing restored from a backup can lower: newest sequence per model, trust, and a moment that has passed.

Kept beside the trust root, outside store.db; the higher of both holds.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from bundles.durable import DISK, Fs
from bundles.format import strict_json
from bundles.format.errors import BundleError
from bundles.format.manifest import format_time, parse_time
from bundles.trust.policy import Floor, floor_in_force
from bundles.trust.revocation import Revocations
from bundles.trust.roots import REVOCATION, Root


@dataclass(frozen=True)
class Floors:
    """What was accepted so far.

    Attributes:
        models: by model name.
        clock: newest `issued_at` accepted; None before the first.
        root: highest version of a trust root that was in force; 0 before the first.
        revocation: highest sequence of a revocation document that was in force; 0 before the first.
        revocation_role: which keys vouched for it (`role_digest`). Others than those begin anew: else whoever
            stole one could close the way for good with the highest sequence there is.
    """

    models: Mapping[str, Floor] = field(default_factory=dict)
    clock: datetime | None = None
    root: int = 0
    revocation: int = 0
    revocation_role: str = ""

    def join(self, other: "Floors", revocations: Revocations | None = None) -> "Floors":
        """The higher of both; `other` is the newer where the keys of revocation were replaced.

        None ever sinks, but one that a revoked release set gives way to any other, as `floor_in_force` has it.
        """
        models = dict(self.models)
        for name, floor in other.models.items():
            held = floor_in_force(name, models.get(name), revocations)
            stands = floor_in_force(name, floor, revocations) is not None
            if held is None or (stands and floor.sequence > held.sequence):
                models[name] = floor
        clocks = [clock for clock in (self.clock, other.clock) if clock is not None]
        revocation, role = self.revocation, self.revocation_role
        if other.revocation and (other.revocation_role != role or other.revocation > revocation):
            revocation, role = other.revocation, other.revocation_role
        return Floors(models, max(clocks, default=None), max(self.root, other.root), revocation, role)


def of_trust(root: Root, revocations: Revocations | None) -> Floors:
    """What the trust in force sets."""
    if revocations is None:
        return Floors(root=root.version)
    return Floors({}, revocations.issued_at, root.version, revocations.sequence, role_digest(root))


def role_digest(root: Root) -> str:
    """Names the keys of a root's role for revocations; empty where it has none."""
    role = root.roles.get(REVOCATION)
    return hashlib.sha256(repr((sorted(role.keyids), role.threshold)).encode()).hexdigest() if role else ""


def load(path: Path) -> Floors:
    """The floors in a file; none when it does not exist.

    Raises:
        BundleError: FLOORS_DAMAGED; nothing is imported on a guess.
    """
    try:
        value = strict_json.parse_object(path.read_bytes(), str(path))
    except FileNotFoundError:
        return Floors()
    except BundleError as error:
        raise BundleError("FLOORS_DAMAGED", error.message) from None
    match value:
        case {
            "clock": str() | None as clock,
            "models": dict(models),
            "root": int(root),
            "revocation": int(revocation),
            "revocation_role": str(role),
        }:
            try:
                held = {name: _floor(entry) for name, entry in models.items()}
                return Floors(held, _moment(clock), root, revocation, role)
            except ValueError:
                pass
    raise BundleError("FLOORS_DAMAGED", f"{path} is not what the importer wrote; restore it")


def save(path: Path, floors: Floors, fs: Fs = DISK) -> None:
    """Write the floors, durably, unless the file has them."""
    models = {
        name: {"sequence": floor.sequence, "model_digest": floor.model_digest}
        for name, floor in sorted(floors.models.items())
    }
    clock = format_time(floors.clock) if floors.clock else None
    value = {
        "clock": clock,
        "models": models,
        "root": floors.root,
        "revocation": floors.revocation,
        "revocation_role": floors.revocation_role,
    }
    content = json.dumps(value, indent=1).encode() + b"\n"
    if not path.exists() or path.read_bytes() != content:
        fs.write_file(path, content, 0o600)


def _moment(clock: str | None) -> datetime | None:
    return None if clock is None else parse_time(clock)


def _floor(entry: object) -> Floor:
    match entry:
        case {"sequence": int(sequence), "model_digest": str(model_digest)}:
            return Floor(sequence, model_digest)
    raise ValueError("not a floor")
