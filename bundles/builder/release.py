"""What a person states of a release, and how it is to be written."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from bundles.format.chunks import CHUNK_SIZE
from bundles.format.manifest import Kind, Requirement

SIGNATURE_ROOM = 1024 * 1024


@dataclass(frozen=True)
class Release:
    """What a release states about a model beyond its files. Equal releases of equal files are equal bytes.

    Attributes:
        name: the model's name: lower case, digits, '.', '_', '-'.
        version: free text without spaces, shown to people.
        sequence: grows with every release of this name; an appliance never goes back.
        kind: model, adapter or draft.
        requires: models that an adapter or draft needs.
        licence: SPDX expression; where empty, the one that the folder's model card states.
        licence_files: its text, where the folder has no LICENSE file.
        accept_licence: an operator must accept it before first use.
        attestations: more of them (scan reports), carried as they are.
        targets: appliances it is for; any where empty.
        expires: when it stops being importable.
        issued_at: now where not given.
        gpu_memory: least memory per device, bytes; 0 where a CPU is enough.
        gpus: least number of devices.
        site_publisher: the site signs the model itself; a publisher's signature in the folder becomes provenance.
        chunk_size: bytes, a multiple of 4096; what a resumed import and a delta count in.
    """

    name: str
    version: str
    sequence: int
    kind: Kind = "model"
    requires: tuple[Requirement, ...] = ()
    licence: str = ""
    licence_files: tuple[Path, ...] = ()
    accept_licence: bool = False
    attestations: tuple[Path, ...] = ()
    targets: tuple[str, ...] = ()
    expires: datetime | None = None
    issued_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    gpu_memory: int = 0
    gpus: int = 0
    site_publisher: bool = False
    chunk_size: int = CHUNK_SIZE


@dataclass(frozen=True)
class Output:
    """How a bundle is written; the same release is the same model in every form.

    Attributes:
        volume_size: bytes that no volume exceeds; None for one file of any size.
        directory: a folder of members instead of a file.
        base: a signed bundle of the model that this one is a delta of; chunks that it has are left out.
        signature_room: bytes kept free in the first of several volumes, for signatures and roots; smaller in tests
            only.
    """

    volume_size: int | None = None
    directory: bool = False
    base: Path | None = None
    signature_room: int = SIGNATURE_ROOM
