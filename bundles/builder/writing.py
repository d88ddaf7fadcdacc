"""Writes a bundle's members: as one container, as several volumes, or as files of a folder.

What is written appears under its name when all of it is complete; after a failure nothing of it is left.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from bundles.builder.volumes import volume_paths
from bundles.durable import DISK
from bundles.format.container import ContainerWriter
from bundles.format.errors import BundleError
from bundles.format.manifest import Manifest
from bundles.format.members import (
    END,
    HEADER,
    MANIFEST,
    OMS,
    REVOCATION,
    chunk_member,
    encode_hints,
    end_document,
    header_hints,
    root_member,
)
from bundles.trust.policy import Head
from bundles.trust.roots import parse


class Writer(Protocol):
    """Takes members one after the other; a volume's file or a folder."""

    def begin(self, name: str, size: int) -> None:
        """Start a member; `write` its `size` bytes next."""

    def write(self, block: bytes | memoryview) -> None:
        """Bytes of the member begun last."""

    def add(self, name: str, content: bytes) -> None:
        """A whole member."""

    def close(self) -> None:
        """The last member is complete; all is durable."""

    def abandon(self) -> None:
        """Close what is open, whatever state it is in."""


class FileWriter(ContainerWriter):
    """Members in a container, in a new file."""

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(DISK.create(path, 0o644), "wb")
        super().__init__(self._file)

    def close(self) -> None:
        """See `Writer`."""
        super().close()
        self._file.flush()
        DISK.fsync(self._file.fileno())
        self.abandon()

    def abandon(self) -> None:
        """See `Writer`."""
        with suppress(OSError):  # of what was still to be written, where that failed before
            self._file.close()


class FolderWriter:
    """Members as files below a new folder; one that occurs again is written once."""

    def __init__(self, folder: Path) -> None:
        DISK.mkdir(folder)
        folder.chmod(0o755)
        self._folder = folder
        self._fd = -1
        self._seen: set[str] = set()

    def begin(self, name: str, size: int) -> None:
        """See `Writer`."""
        del size
        self._finish()
        if name not in self._seen:
            self._seen.add(name)
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            self._fd = DISK.create(path, 0o444)

    def write(self, block: bytes | memoryview) -> None:
        """See `Writer`."""
        done = 0
        while self._fd >= 0 and done < len(block):
            done += os.write(self._fd, memoryview(block)[done:])

    def add(self, name: str, content: bytes) -> None:
        """See `Writer`."""
        self.begin(name, len(content))
        self.write(content)

    def close(self) -> None:
        """See `Writer`."""
        self._finish()
        for folder in (*(path for path in self._folder.iterdir() if path.is_dir()), self._folder):
            DISK.sync_folder(folder)

    def abandon(self) -> None:
        """See `Writer`."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _finish(self) -> None:
        if self._fd >= 0:
            DISK.fsync(self._fd)
        self.abandon()


class BundleWriter:
    """A bundle's members in order, each in the volume where the manifest has it.

    Args:
        manifest: decides the volumes.
        carried: chunks that are in the bundle, each as often as it occurs.
        paths: of the volumes; more than one only where the manifest has them.
        directory: the one path becomes a folder.
    """

    def __init__(self, manifest: Manifest, carried: int, paths: Sequence[Path], *, directory: bool) -> None:
        self._manifest = manifest
        self._counts = [volume.chunks for volume in manifest.volumes] or [carried]
        self._paths = paths
        self._directory = directory
        self._volume = self._chunks = 0
        self._writer = self._open()

    def write_head(self, head: Head, documents: Mapping[str, bytes]) -> None:
        """What is before the chunks; `documents` by member, in manifest order."""
        write_head(self._writer, head, documents)

    def begin_chunk(self, digest: str, length: int) -> None:
        """Start a chunk, in the next volume where this one has all of its own."""
        while self._chunks == self._counts[self._volume] and self._volume + 1 < len(self._counts):
            self._end_volume()
            self._volume, self._chunks = self._volume + 1, 0
            self._writer = self._open()
            self._writer.add(HEADER, encode_hints(header_hints(self._manifest, self._volume + 1)))
        self._writer.begin(chunk_member(digest), length)
        self._chunks += 1

    def write(self, block: bytes) -> None:
        """Bytes of the chunk begun last."""
        self._writer.write(block)

    def close(self) -> None:
        """The last chunk is complete."""
        self._end_volume()

    def abandon(self) -> None:
        """Close what is open."""
        self._writer.abandon()

    def _open(self) -> Writer:
        path = self._paths[self._volume]
        return FolderWriter(path) if self._directory else FileWriter(path)

    def _end_volume(self) -> None:
        end = end_document(self._manifest, self._counts[self._volume], self._volume + 1)
        self._writer.add(END, encode_hints(end))
        self._writer.close()


def check_place(out: Path, *, directory: bool) -> None:
    """Refuse a name under which no bundle can be written.

    Raises:
        BundleError: OUTPUT_EXISTS; a folder is never replaced.
        OSError: there is no folder to write in.
    """
    if directory and os.path.lexists(out):
        raise BundleError("OUTPUT_EXISTS", f"{out} is there already; a folder is never replaced")
    if out.is_dir():
        raise BundleError("OUTPUT_EXISTS", f"{out} is a folder; name the file to write in it")
    with os.scandir(out.parent):
        pass


@contextmanager
def writing(out: Path, manifest: Manifest, carried: int, *, directory: bool) -> Iterator[BundleWriter]:
    """A writer of a new bundle, which appears as `out`, or as its volumes, when the block ends without an error.

    Raises:
        BundleError, OSError: as `check_place`.
    """
    check_place(out, directory=directory)
    paths = volume_paths(out, () if directory else manifest.volumes)
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        writer = BundleWriter(manifest, carried, temporary, directory=directory)
        try:
            yield writer
            writer.close()
        finally:
            writer.abandon()
        for made, path in zip(temporary, paths, strict=True):
            DISK.rename(made, path)
    except BaseException:
        for made in temporary:
            _remove(made)
        raise
    DISK.sync_folder(out.parent)


def write_head(writer: Writer, head: Head, documents: Mapping[str, bytes]) -> None:
    """The members before the chunks, in order."""
    for name, content in head_members(head, documents):
        writer.add(name, content)


def head_members(head: Head, documents: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each member before the chunks, in order."""
    yield HEADER, head.header
    for raw in head.roots:
        yield root_member(parse(raw).version), raw
    if head.revocation is not None:
        yield REVOCATION, head.revocation
    yield MANIFEST, head.envelope
    if head.oms is not None:
        yield OMS, head.oms
    yield from documents.items()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        DISK.remove_tree(path)
    else:
        path.unlink(missing_ok=True)
