"""The chunks that a delta leaves out, read from the files of the version it builds on."""

import os
from collections.abc import Callable
from pathlib import Path

from bundles.format.chunks import Extent, extents
from bundles.format.errors import BundleError
from bundles.format.manifest import Manifest


class StoredBase:
    """A committed version's chunks; a `pipeline.Base`.

    Args:
        manifest: of that version.
        path_of: finds a file by its SHA-256.
    """

    def __init__(self, manifest: Manifest, path_of: Callable[[str], Path]) -> None:
        self._reference = manifest.reference
        self._path_of = path_of
        self._places: dict[str, tuple[str, Extent]] = {}
        for file in manifest.files:
            for extent, digest in zip(extents(file.size, manifest.chunk_size), file.chunks, strict=True):
                self._places.setdefault(digest, (file.sha256, extent))
        self.chunks = frozenset(self._places)

    def open(self, digest: str) -> Callable[[memoryview], int]:
        """See `pipeline.Base`; what it reads is hashed like any chunk."""
        sha256, extent = self._places[digest]
        left = extent.length

        def read_into(buffer: memoryview) -> int:
            nonlocal left
            done = self._read(sha256, extent.offset + extent.length - left, buffer[:left])
            left -= done
            return done

        return read_into

    def _read(self, sha256: str, offset: int, buffer: memoryview) -> int:
        done = 0
        try:
            fd = os.open(self._path_of(sha256), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                while done < len(buffer) and (got := os.preadv(fd, [buffer[done:]], offset + done)):
                    done += got
                os.posix_fadvise(fd, offset, done, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        except OSError as error:
            raise self.damaged(error.strerror or "it cannot be read") from None
        if done < len(buffer):
            raise self.damaged("a file became shorter")
        return done

    def damaged(self, why: str) -> BundleError:
        """The refusal of a delta whose base is not what it was."""
        return BundleError(
            "BASE_DAMAGED",
            f"{self._reference} in the store is damaged ({why}); import its bundle again, then this",
        )
