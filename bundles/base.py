"""The chunks of older bundles at hand, for a delta that leaves them out."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple, Self

from bundles.format import manifest as manifests
from bundles.format.container import ContainerReader
from bundles.format.errors import BundleError
from bundles.format.folder import FolderReader
from bundles.format.manifest import Manifest
from bundles.format.members import chunk_member
from bundles.format.source import beside, open_source, sibling
from bundles.reader import BundleReader, open_volume
from bundles.trust import dsse


class _Place(NamedTuple):
    """Where a chunk lies: the volume that holds it, and where there."""

    volume: ContainerReader | FolderReader
    at: int


class BundleBase:
    """Bundles that hold a delta's base, or parts of it, as a `pipeline.Base`; close it after use.

    Nothing of them is believed. Which chunks a delta leaves out is decided by the base's manifest, and that is the
    one whose digest the delta's signed manifest states; the bytes are hashed like any other chunk's.

    Args:
        paths: the base, and, where that is a delta itself, what it was made against, in any order.
        model_digest: SHA-256 of the base's manifest, hex.

    Raises:
        BundleError: BASE_ABSENT, none of them is the base; the SOURCE, CONTAINER, VOLUME and JSON codes.
    """

    def __init__(self, paths: Sequence[Path], model_digest: str) -> None:
        self._stack = ExitStack()
        self._places: dict[str, _Place] = {}
        found = None
        try:
            for path in paths:
                manifest, digest = read_manifest(path)
                self._take(path, manifest)
                found = manifest if digest == model_digest else found
        except BundleError:
            self.close()
            raise
        if found is None:
            self.close()
            raise BundleError("BASE_ABSENT", f"no bundle given as base is the model {model_digest[:12]}..")
        self.chunks = frozenset(digest for file in found.files for digest in file.chunks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, digest: str) -> Callable[[memoryview], int]:
        """See `pipeline.Base`.

        Raises:
            BundleError: BASE_ABSENT, the base is a delta itself and leaves this chunk out; SOURCE_CHANGED.
        """
        place = self._places.get(digest)
        if place is None:
            raise BundleError(
                "BASE_ABSENT", "the base leaves a chunk out that is wanted; give its own base as well"
            )
        place.volume.revisit(chunk_member(digest), place.at)
        return place.volume.read_into

    def damaged(self, why: str) -> BundleError:
        """See `pipeline.Base`."""
        return BundleError("BASE_DAMAGED", f"the base bundle is damaged: {why}; copy it again")

    def close(self) -> None:
        """Close every volume."""
        self._stack.close()

    def _take(self, path: Path, manifest: Manifest) -> None:
        """Note where each chunk is; of the payload only the members' headers are read."""
        for index in range(1, max(1, len(manifest.volumes)) + 1):
            volume = open_source(path) if index == 1 else open_volume(sibling(path, index), manifest, index)
            self._stack.callback(volume.close)
            for name, at in volume.survey():
                folder, _, digest = name.rpartition("/")
                if folder == "c":
                    self._places[digest] = _Place(volume, at)


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """The manifest that a bundle holds, not believed, and its SHA-256, hex.

    Raises:
        BundleError: the SOURCE, CONTAINER, JSON and MANIFEST codes.
    """
    with closing(BundleReader(beside(path))) as reader:
        payload = dsse.parse(reader.read_head().envelope, "the signed manifest").payload
    return manifests.parse(payload), hashlib.sha256(payload).hexdigest()
