"""A first volume with another beginning: a new file whose chunks are the old one's, so a crash leaves old or new.

They are copied by the kernel, or shared where the file system can: XFS and btrfs let two files have the same
blocks when they lie equally far into one, and blanks in the header see to that. ext4 cannot.

Source: copy_file_range(2); ioctl_ficlonerange(2), "must be aligned to the file system block size".
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from bundles.builder.stating import SLSA, stated_volume_size
from bundles.builder.volumes import member_size
from bundles.builder.writing import head_members, write_head
from bundles.durable import replacing
from bundles.format.container import BLOCK, ContainerWriter, open_file
from bundles.format.errors import BundleError
from bundles.format.members import MAX_HEADER
from bundles.trust.policy import Head

FS_BLOCK = 4096
_COPY = 64 * 1024 * 1024


Identity = tuple[int, ...]
"""Of a file as it was at a moment; empty of none."""


def rewrite(path: Path, found: Identity, head: Head, documents: Mapping[str, bytes], payload_at: int) -> None:
    """Replace what is before the chunks of a whole bundle, or of its first volume.

    Args:
        path: the file.
        found: what it was when it was read.
        head: its first members from now on.
        documents: by member, those that follow, in order.
        payload_at: where the chunks begin now, bytes.

    Raises:
        BundleError: RELEASE_INVALID, the volume would be larger than it was built to be; SOURCE_CHANGED, it
            is not what was read, or becomes shorter.
    """
    fd = open_file(path)
    with open(fd, "rb") as old, replacing(path) as new:
        write_head(_Beginning(new), _aligned(head, documents, payload_at), documents)
        size = new.tell() + os.fstat(fd).st_size - payload_at
        limit = stated_volume_size(documents.get(SLSA, b""))
        if limit is not None and size > limit:
            raise BundleError(
                "RELEASE_INVALID",
                f"signed so, the first volume would have {size} bytes, over the {limit} that it was built for; "
                "build the bundle again with a larger --volume-size",
            )
        _append_rest(old, new, payload_at)
        new.flush()
        os.fsync(new.fileno())
        check_unchanged(path, found)


def identity(path: Path) -> Identity:
    """What tells a file from those that come after it under its name, changed ones too."""
    try:
        status = path.lstat()
    except OSError:  # whoever reads it says so
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_unchanged(path: Path, found: Identity) -> None:
    """Refuse to replace what is not what was read: another's signature would be lost.

    Raises:
        BundleError: SOURCE_CHANGED.
    """
    if identity(path) != found:
        raise BundleError(
            "SOURCE_CHANGED", "the bundle changed while it was signed, or another signed it meanwhile; repeat"
        )


class _Beginning(ContainerWriter):
    """Members at the beginning of a container whose rest is appended; each is padded at once."""

    def __init__(self, stream: BinaryIO) -> None:
        self._to = stream
        super().__init__(stream)

    def add(self, name: str, content: bytes) -> None:
        """See `ContainerWriter`."""
        self.begin(name, len(content))
        self.write(content)
        self._end_member()

    def abandon(self) -> None:
        """Nothing is open but the stream, which is another's."""


def _aligned(head: Head, documents: Mapping[str, bytes], at: int) -> Head:
    """With blanks in its header, so that chunks that were at `at` lie as far into a block as they did."""
    header = head.header.rstrip() + b"\n"
    members = head_members(replace(head, header=header), documents)
    size = sum(member_size(len(content)) for _, content in members)
    filled = header.ljust(len(header) + -len(header) % BLOCK + (at - size) % FS_BLOCK)
    return replace(head, header=filled if len(filled) <= MAX_HEADER else header)


def _append_rest(old: BinaryIO, new: BinaryIO, at: int) -> None:
    """Append what `old` has from `at` on: up to the next block by a copy, then whole blocks, shared or copied."""
    new.flush()
    end, further = os.fstat(old.fileno()).st_size, new.tell() - at

    def send(at: int, count: int) -> int:
        return os.sendfile(new.fileno(), old.fileno(), at, count)

    def share(at: int, count: int) -> int:
        return os.copy_file_range(old.fileno(), new.fileno(), count, at, at + further)

    _pass(send, at, min(end, at + -at % FS_BLOCK))
    with suppress(OSError):  # of a file system that knows no such call; what is missing is sent
        _pass(share, new.seek(0, os.SEEK_END) - further, end)
    _pass(send, new.seek(0, os.SEEK_END) - further, end)


def _pass(some: Callable[[int, int], int], at: int, end: int) -> None:
    while at < end:
        count = some(at, min(_COPY, end - at))
        if not count:
            raise BundleError("SOURCE_CHANGED", "the bundle became shorter while it was signed; repeat")
        at += count
