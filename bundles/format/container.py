"""The bundle's container: an uncompressed POSIX ustar with one legal encoding of every member.

The writer makes one header for a name and a size; the reader accepts that header and no other, byte by byte, so
whatever an archive can hide (links, devices, sparse maps, long names, owners, times) does not exist here. Both
stream; neither holds more than a header and the caller's buffer. Any tar program can list a bundle.

Source: POSIX.1-2017, pax, "ustar Interchange Format".
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from bundles import direct
from bundles.format.errors import BundleError

BLOCK = 512
MAX_MEMBER = 8**11 - 1
MAX_NAME = 100
_END = bytes(2 * BLOCK)
_PASSING = 64 * 1024  # reads of payload, which a page cache need not keep, have this many bytes
_TYPES = {
    b"1": ("CONTAINER_HARDLINK", "a hard link"),
    b"2": ("CONTAINER_SYMLINK", "a symbolic link"),
    b"3": ("CONTAINER_DEVICE", "a character device"),
    b"4": ("CONTAINER_DEVICE", "a block device"),
    b"5": ("CONTAINER_DIRECTORY", "a directory"),
    b"6": ("CONTAINER_DEVICE", "a FIFO"),
    b"S": ("CONTAINER_SPARSE", "a GNU sparse file"),
    b"x": ("CONTAINER_PAX", "a PAX header"),
    b"g": ("CONTAINER_PAX", "a PAX header"),
    b"L": ("CONTAINER_LONG_NAME", "a GNU long name"),
    b"K": ("CONTAINER_LONG_NAME", "a GNU long link"),
}
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"LZIP": "lzip",
}


class Member(NamedTuple):
    """A member's name and size in bytes."""

    name: str
    size: int


def encode_header(name: str, size: int) -> bytes:
    """The one legal header of a member, 512 bytes.

    Raises:
        ValueError: the name or size cannot be a member's.
    """
    raw = name.encode("ascii")
    if not 0 < len(raw) <= MAX_NAME or not 0 <= size <= MAX_MEMBER:
        raise ValueError(f"no member may be called {name!a} with {size} bytes")
    fields = (
        raw.ljust(100, b"\0"),
        b"0000444\0",  # mode
        b"0000000\0" * 2,  # uid, gid
        b"%011o\0" % size,
        b"00000000000\0",  # mtime
        b" " * 8,  # checksum, as it is while being summed
        b"0",  # regular file
        bytes(100),  # link name
        b"ustar\x0000",
        bytes(64),  # owner, group
        b"0000000\0" * 2,  # device
        bytes(167),  # prefix, padding
    )
    header = b"".join(fields)
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


class ContainerWriter:
    """Writes members one after the other to a stream."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._left = 0
        self._padding = 0

    def begin(self, name: str, size: int) -> None:
        """Start a member; `write` its `size` bytes next.

        Raises:
            RuntimeError: the member before is not complete.
        """
        self._end_member()
        self._stream.write(encode_header(name, size))
        self._left = size
        self._padding = -size % BLOCK

    def write(self, block: bytes | memoryview) -> None:
        """Bytes of the member begun last.

        Raises:
            RuntimeError: more than were announced.
        """
        if len(block) > self._left:
            raise RuntimeError(f"{len(block)} bytes for a member that has {self._left} left")
        self._stream.write(block)
        self._left -= len(block)

    def add(self, name: str, content: bytes) -> None:
        """A whole member."""
        self.begin(name, len(content))
        self.write(content)

    def close(self) -> None:
        """Write the end marker; the stream stays open."""
        self._end_member()
        self._stream.write(_END)

    def _end_member(self) -> None:
        if self._left:
            raise RuntimeError(f"a member lacks {self._left} bytes")
        self._stream.write(bytes(self._padding))
        self._padding = 0


def open_unfollowed(path: Path) -> int:
    """Open what is at `path` for reading, itself and not what a link points to; the caller closes the descriptor.

    Raises:
        BundleError: SOURCE_SYMLINK, SOURCE_UNREADABLE.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink():
            raise BundleError("SOURCE_SYMLINK", f"{path} is a symbolic link; name the file itself") from None
        raise BundleError("SOURCE_UNREADABLE", f"{path}: {error.strerror}") from None


def open_file(path: Path) -> int:
    """Open a regular file as `open_unfollowed` does.

    Raises:
        BundleError: SOURCE_SYMLINK, SOURCE_NOT_FILE, SOURCE_UNREADABLE.
    """
    fd = open_unfollowed(path)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BundleError("SOURCE_NOT_FILE", f"{path} is not a regular file")
    return fd


def read_whole(member: Member, limit: int, read_into: Callable[[memoryview], int]) -> bytes:
    """A member's content through `read_into`, if it is not larger than `limit` bytes.

    Raises:
        BundleError: CONTAINER_MEMBER_SIZE, or as `read_into`.
    """
    if member.size > limit:
        raise BundleError(
            "CONTAINER_MEMBER_SIZE", f"{member.name} has {member.size} bytes, more than {limit} are not accepted"
        )
    buffer = bytearray(member.size)
    read_into(memoryview(buffer))
    return bytes(buffer)


class ContainerReader:
    """Reads members of an open file in order, from its beginning; a `Source`.

    Args:
        fd: a regular file, which `close` closes; read with pread, so its position does not matter.

    Attributes:
        bytes_read: all bytes taken from the file so far.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._size = os.fstat(fd).st_size
        self._disk = direct.reading(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self.bytes_read = 0
        self.rewind()

    def rewind(self) -> None:
        """See `Source`."""
        self._at = self._left = self._padding = 0
        self._name = "the first member"

    def arrange(self, names: Iterable[str], ahead: Member | None, *, all_of: bool = True) -> Member | None:
        """See `Source`; a file has an order of its own."""
        del names, all_of
        return ahead

    def close(self) -> None:
        """See `Source`."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def next(self) -> Member | None:
        """The next member; None at the end, which is then known to be the end of the file.

        Raises:
            BundleError: one of the CONTAINER codes, SOURCE_CHANGED, SOURCE_UNREADABLE.
        """
        self._end_member()
        if self._at == self._size:
            code = "CONTAINER_NO_END" if self._size else "CONTAINER_TRUNCATED"
            raise BundleError(code, "the bundle has no end marker; it is cut short: copy it again")
        header = self._take(BLOCK)
        if not any(header):
            self._finish()
            return None
        member = _decode_header(header, first=self._at == BLOCK)
        self._name, self._left, self._padding = member.name, member.size, -member.size % BLOCK
        return member

    def skip(self) -> None:
        """See `Source`."""
        if self._at + self._left > self._size:
            self._refuse_early_end()
        self._at += self._left
        self._left = 0

    def survey(self) -> Iterator[tuple[str, int]]:
        """Every member's name and where its header begins, from the first; no content is read.

        Raises:
            BundleError: as `next`.
        """
        self.rewind()
        at = 0
        while (member := self.next()) is not None:
            yield member.name, at
            self.skip()
            at = self._at + self._padding

    def revisit(self, name: str, at: int) -> Member:
        """Go back to a member that `survey` found.

        Raises:
            BundleError: SOURCE_CHANGED, it is not there any more; as `next`.
        """
        self._at, self._left, self._padding = at, 0, 0
        member = self.next()
        if member is None or member.name != name:
            raise BundleError("SOURCE_CHANGED", f"{name} is not where it was; the bundle was changed: repeat")
        return member

    def read(self, limit: int) -> bytes:
        """The whole content of the current member, which may not be larger than `limit` bytes.

        Raises:
            BundleError: CONTAINER_MEMBER_SIZE; or as `read_into`.
        """
        return read_whole(Member(self._name, self._left), limit, self.read_into)

    def read_into(self, buffer: memoryview) -> int:
        """Fill `buffer` from the current member; how many bytes it got, fewer only at the member's end.

        Raises:
            BundleError: CONTAINER_TRUNCATED, SOURCE_CHANGED, SOURCE_UNREADABLE.
        """
        wanted = min(len(buffer), self._left)
        self._fill(buffer[:wanted])
        self._left -= wanted
        return wanted

    def _end_member(self) -> None:
        if self._left:
            raise RuntimeError(f"{self._name} was not read to its end")
        padding, self._padding = self._padding, 0
        if padding and any(self._take(padding)):
            raise BundleError("CONTAINER_PADDING", f"bytes are hidden behind {self._name}")

    def _finish(self) -> None:
        if self._size - self._at < BLOCK:
            raise BundleError("CONTAINER_NO_END", "half of the end marker is missing; copy the bundle again")
        if any(self._take(BLOCK)) or self._at != self._size:
            raise BundleError("CONTAINER_TRAILING", "there are bytes after the bundle's end")
        if os.fstat(self._fd).st_size != self._size:
            raise BundleError("SOURCE_CHANGED", "the bundle changed its size while it was read; repeat")

    def _take(self, size: int) -> bytes:
        buffer = bytearray(size)
        self._fill(memoryview(buffer))
        return bytes(buffer)

    def _fill(self, buffer: memoryview) -> None:
        done, start = 0, self._at
        while done < len(buffer):
            try:
                count = self._disk.transfer(buffer[done:], self._at)
            except OSError as error:
                raise BundleError("SOURCE_UNREADABLE", f"the medium cannot be read: {error.strerror}") from None
            if count == 0:
                self._refuse_early_end()
            done += count
            self._at += count
            self.bytes_read += count
        if done >= _PASSING:
            os.posix_fadvise(self._fd, start, done, os.POSIX_FADV_DONTNEED)

    def _refuse_early_end(self) -> NoReturn:
        if os.fstat(self._fd).st_size != self._size:
            raise BundleError("SOURCE_CHANGED", "the bundle changed its size while it was read; repeat")
        raise BundleError("CONTAINER_TRUNCATED", f"the bundle ends inside {self._name}; copy it again")


def _decode_header(header: bytes, *, first: bool) -> Member:
    """The member a header announces, if it is the one legal header for it."""
    if first:
        for magic, name in _COMPRESSED.items():
            if header.startswith(magic):
                raise BundleError("CONTAINER_COMPRESSED", f"the bundle is compressed ({name}); unpack it first")
    if header[257:263] not in (b"ustar\0", b"ustar "):
        raise BundleError("CONTAINER_FORMAT", "this is not a bundle: no ustar header where one must be")
    _check_sum(header)
    _check_type(header[156:157])
    member = Member(_decode_name(header), _decode_size(header[124:136]))
    if header[100:108] != b"0000444\0":
        raise BundleError("CONTAINER_MODE", f"{member.name} has file mode bits that no member may have")
    if encode_header(*member) != header:
        raise BundleError("CONTAINER_HEADER", f"the header of {member.name} is not the one legal encoding of it")
    return member


def _check_sum(header: bytes) -> None:
    total = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    if header[148:156] != b"%06o\0 " % total:
        raise BundleError("CONTAINER_CHECKSUM", "a member's header is damaged; copy the bundle again")


def _check_type(flag: bytes) -> None:
    if flag != b"0":
        code, what = _TYPES.get(flag, ("CONTAINER_TYPE", f"of type {flag!r}"))
        raise BundleError(code, f"a member is {what}; only regular files are accepted")


def _decode_name(header: bytes) -> str:
    raw, _, rest = header[:100].partition(b"\0")
    if any(rest) or any(header[345:500]) or not raw or not all(0x20 < byte < 0x7F for byte in raw):
        raise BundleError("CONTAINER_NAME", "a member's name is not plain ASCII of at most 100 bytes")
    return raw.decode("ascii")


def _decode_size(field: bytes) -> int:
    if field[11:] != b"\0" or not all(0x30 <= byte <= 0x37 for byte in field[:11]):
        raise BundleError("CONTAINER_SIZE", "a member's size is not eleven octal digits")
    return int(field[:11], 8)
