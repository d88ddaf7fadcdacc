"""Floors that nothing restored from a backup can lower: newest sequence per model, and a moment that has passed.

Kept beside the trust root, outside store.db; the higher of both holds.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from bundles.durable import write_file
from bundles.format import strict_json
from bundles.format.errors import BundleError
from bundles.format.manifest import format_time, parse_time
from bundles.trust.policy import Floor


@dataclass(frozen=True)
class Floors:
    """What was accepted so far.

    Attributes:
        models: by model name.
        clock: newest `issued_at` accepted; None before the first.
    """

    models: Mapping[str, Floor] = field(default_factory=dict)
    clock: datetime | None = None

    def raised(self, name: str, floor: Floor, issued_at: datetime) -> "Floors":
        """These floors after one more release; none ever sinks."""
        held = self.models.get(name)
        models = dict(self.models)
        if held is None or floor.sequence > held.sequence:
            models[name] = floor
        return Floors(models, max(issued_at, self.clock) if self.clock else issued_at)


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
        case {"clock": str() | None as clock, "models": dict(models)}:
            try:
                return Floors({name: _floor(entry) for name, entry in models.items()}, _moment(clock))
            except ValueError:
                pass
    raise BundleError("FLOORS_DAMAGED", f"{path} is not what the importer wrote; restore it")


def save(path: Path, floors: Floors) -> None:
    """Write the floors, durably."""
    models = {
        name: {"sequence": floor.sequence, "model_digest": floor.model_digest}
        for name, floor in sorted(floors.models.items())
    }
    value = {"clock": format_time(floors.clock) if floors.clock else None, "models": models}
    write_file(path, json.dumps(value, indent=1).encode() + b"\n", 0o600)


def _moment(clock: str | None) -> datetime | None:
    return None if clock is None else parse_time(clock)


def _floor(entry: object) -> Floor:
    match entry:
        case {"sequence": int(sequence), "model_digest": str(model_digest)}:
            return Floor(sequence, model_digest)
    raise ValueError("not a floor")
