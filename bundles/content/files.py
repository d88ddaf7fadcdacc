"""A model's files as judging sees them: sizes by path, and bytes on demand, whoever holds them."""

import os
from collections.abc import Mapping
from typing import Protocol

from bundles.format.errors import BundleError


class ModelFiles(Protocol):
    """Files of a builder, a verifier or the importer; up to 100 000, so none is held open."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file, by its path in the model's folder."""

    def read(self, path: str, offset: int, length: int) -> bytes:
        """The bytes of a file from `offset` on, fewer than `length` at its end only.

        Every holder has at hand the header of weights, their first `forbidden.HEAD_BYTES` and their last
        `forbidden.TAIL_BYTES`; any others may take one that keeps little as long as reading a chunk again.

        Raises:
            BundleError: SOURCE_CHANGED.
        """


class FolderFiles:
    """The files of an open folder, opened below it when they are read; the last one stays open.

    Args:
        folder: descriptor of the folder; `close` closes it.
        names: path below that folder of each file, by its path in the model's folder.
        sizes: bytes, by path in the model's folder.
    """

    def __init__(self, folder: int, names: Mapping[str, str], sizes: Mapping[str, int]) -> None:
        self._folder = folder
        self._names = names
        self._open = ("", -1)
        self.sizes = sizes

    def read(self, path: str, offset: int, length: int) -> bytes:
        """See `ModelFiles`; a link is not followed."""
        parts: list[bytes] = []
        end = min(offset + length, self.sizes[path])
        try:
            fd = self._descriptor(path)
            while offset < end and (part := os.pread(fd, end - offset, offset)):
                parts.append(part)
                offset += len(part)
        except OSError as error:
            raise BundleError("SOURCE_CHANGED", f"{path!a} cannot be read again: {error.strerror}") from None
        if offset < end:
            raise BundleError("SOURCE_CHANGED", f"{path!a} became shorter while it was judged; repeat")
        return b"".join(parts)

    def close(self) -> None:
        """Close what is open."""
        self._leave()
        os.close(self._folder)

    def _descriptor(self, path: str) -> int:
        if self._open[0] != path:
            self._leave()
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            self._open = (path, os.open(self._names[path], flags, dir_fd=self._folder))
        return self._open[1]

    def _leave(self) -> None:
        _, fd = self._open
        self._open = ("", -1)
        if fd >= 0:
            os.close(fd)
