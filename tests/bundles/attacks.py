"""What an attack is: a number of the list of refusals, a bundle forged for it, and the code it must end with."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from bundles.importer.workplace import Workplace
from bundles.pipeline import Progress
from bundles.trust.policy import Site
from tests.bundles.forging import Ceremony, Draft
from tests.bundles.making import CHUNK, write_members

Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class Scene:
    """Where an attack is prepared.

    Attributes:
        folder: an empty one of its own; the medium.
        good: a bundle that would be imported.
        base: the bundle that the store holds already, an older release of the same model.
        model: the folder that `good` was built from.
    """

    folder: Path
    good: Draft
    base: Draft
    model: Path

    @property
    def keys(self) -> Ceremony:
        return self.good.keys

    def write(self, bundle: Draft | bytes, name: str = "hostile.bundle") -> Path:
        """The bundle as a file on the medium."""
        path = self.folder / name
        if isinstance(bundle, bytes):
            path.write_bytes(bundle)
        else:
            write_members(path, list(bundle.members))
        return path

    def write_folder(self, bundle: Draft) -> Path:
        """The bundle as a folder on the medium."""
        folder = self.folder / "hostile"
        for name, content in bundle.members:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder

    def raw(self, bundle: Draft | None = None) -> bytes:
        """The bytes of a bundle; of the good one where none is given."""
        return self.write(bundle or self.good, "raw").read_bytes()


@dataclass(frozen=True)
class Attack:
    """A forged bundle and what surrounds its import.

    Attributes:
        source: what the operator names.
        site: the workplace that it comes to, made of an ordinary one: another clock, a smaller quota.
        watch: what the attacker does while it is imported.
        around: holds during the import.
        volumes: what the operator offers, one after the other, when a volume is wanted; what is refused then ends
            the import.
        verified: by `verify`, held to this, in the place of an import, which waits for a missing volume and knows
            no GPUs.
    """

    source: Path
    site: Callable[[Workplace], Workplace] = lambda place: place
    watch: Watch = lambda _: None
    around: AbstractContextManager[object] = field(default_factory=nullcontext)
    volumes: tuple[Path, ...] = ()
    verified: Site | None = None


@dataclass(frozen=True)
class Refusal:
    """One way to attack.

    Attributes:
        number: in the list of refusals.
        name: this variant of it.
        code: what the import ends with.
        attack: makes it; a bundle or its bytes where nothing else is needed.
        early: it is refused before the first byte of a chunk is read.
    """

    number: int
    name: str
    code: str
    attack: Callable[[Scene], "Attack | Draft | bytes"]
    early: bool = True

    def prepare(self, scene: Scene) -> Attack:
        made = self.attack(scene)
        return made if isinstance(made, Attack) else Attack(scene.write(made))


def manifest(change: Callable[[dict[str, object]], object]) -> Callable[[Scene], Draft]:
    """An attack with a manifest that the release keys signed."""
    return lambda scene: scene.good.described(change)


def payload(change: Callable[[bytes], bytes]) -> Callable[[Scene], Draft]:
    """An attack with manifest bytes that the release keys signed."""
    return lambda scene: scene.good.stated(change(scene.good.payload))


def spliced(name: str, change: Callable[[bytes], bytes]) -> Callable[[Scene], bytes]:
    """An attack on the bytes of the container from one member's header on."""

    def forge(scene: Scene) -> bytes:
        raw, at = scene.raw(), header_at(scene.good, _first_chunk(scene.good) if name == "chunk" else name)
        return raw[:at] + change(raw[at:])

    return forge


def header_at(bundle: Draft, name: str) -> int:
    """Where a member's header begins, bytes."""
    before = bundle.members[: bundle.where(name)]
    return sum(512 + -(-len(content) // 512) * 512 for _, content in before)


def _first_chunk(bundle: Draft) -> str:
    return bundle.chunks[0]


def full_chunk(bundle: Draft) -> str:
    """The name of a chunk of a file with several."""
    return next(name for name in bundle.chunks if len(bundle[name]) == CHUNK)


def end_of(bundle: Draft, **changes: object) -> bytes:
    """Another `end.json`."""
    return json.dumps(json.loads(bundle["end.json"]) | changes).encode()
