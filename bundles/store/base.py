"""The chunks that a delta leaves out, read from the files of the version it builds on."""

import os
from collections.abc import Callable
from pathlib import Path

from bundles import direct
from bundles.format.chunks import Extent, extents
from bundles.format.errors import BundleError
from bundles.format.manifest import Manifest


class StoredBase:
    """A committed version's chunks; a `pipeline.Base`, which `close` ends.

    Args:
        manifest: of that version.
        path_of: finds a file by its SHA-256.
    """

    def __init__(self, manifest: Manifest, path_of: Callable[[str], Path]) -> None:
        self._reference = manifest.reference
        self._path_of = path_of
        self._sha256, self._fd = "", -1
        self._disk: direct.Direct
        self._places: dict[str, tuple[str, Extent]] = {}
        for file in manifest.files:
            for extent, digest in zip(extents(file.size, manifest.chunk_size), file.chunks, strict=True):
                self._places.setdefault(digest, (file.sha256, extent))
        self.chunks = frozenset(self._places)

    def open(self, digest: str) -> Callable[[memoryview], int]:
        """See `pipeline.Base`; what it reads is hashed like any chunk."""
        sha256, extent = self._places[digest]
        at, end = extent.offset, extent.offset + extent.length

        def read_into(buffer: memoryview) -> int:
            nonlocal at
            done = self._read(sha256, at, buffer[: end - at])
            at += done
            return done

        return read_into

    def close(self) -> None:
        """Close the file that was read last."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._sha256 = -1, ""

    def _read(self, sha256: str, offset: int, buffer: memoryview) -> int:
        done = 0
        try:
            if sha256 != self._sha256:
                self.close()
                self._fd = os.open(self._path_of(sha256), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                self._sha256, self._disk = sha256, direct.reading(self._fd)
            while done < len(buffer) and (got := self._disk.transfer(buffer[done:], offset + done)):
                done += got
            os.posix_fadvise(self._fd, offset, done, os.POSIX_FADV_DONTNEED)
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
