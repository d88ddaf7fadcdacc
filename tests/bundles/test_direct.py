"""Large aligned transfers go past the page cache; whatever else, and on whatever disk, the bytes are the same."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from bundles.direct import READ_ALIGNMENT, Direct, aligned_buffer, reading, writing

MIB = 1 << 20


class Watched:
    """Reads by preadv, and remembers what was asked and which way it was to go; may know only one."""

    def __init__(self, path: Path, *, refuses: bool = False) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.refuses = refuses
        self.moves: list[tuple[bool, int]] = []

    def __call__(self, block: memoryview, offset: int) -> int:
        past = bool(fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_DIRECT)
        self.moves.append((past, len(block)))
        if past and self.refuses:
            raise OSError(errno.EINVAL, "Invalid argument")
        return os.preadv(self.fd, [block], offset)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(os.urandom(4 * MIB + 700))
    return tmp_path / "file"


def _all(watched: Watched, path: Path, start: int = 0) -> list[tuple[bool, int]]:
    """Read everything from `start`, as a reader does; the moves it took."""
    size = path.stat().st_size - start
    disk, buffer, done = Direct(watched.fd, watched, READ_ALIGNMENT), aligned_buffer(size), 0
    try:
        while done < size:
            done += disk.transfer(buffer[done:], start + done)
    finally:
        os.close(watched.fd)
    assert bytes(buffer) == path.read_bytes()[start:]
    return watched.moves


def test_what_is_aligned_goes_past_the_cache_and_the_rest_does_not(path: Path) -> None:
    assert _all(Watched(path), path) == [(True, 4 * MIB + 512), (False, 188)]
    assert _all(Watched(path), path, 512) == [(True, 4 * MIB), (False, 188)]
    assert _all(Watched(path), path, 100) == [(False, 4 * MIB + 600)]


def test_a_disk_that_knows_no_such_thing_is_asked_once(path: Path) -> None:
    watched = Watched(path, refuses=True)
    disk, buffer = Direct(watched.fd, watched, READ_ALIGNMENT), aligned_buffer(2 * MIB)
    for offset in (0, 2 * MIB):
        assert disk.transfer(buffer, offset) == 2 * MIB
        assert bytes(buffer) == path.read_bytes()[offset : offset + 2 * MIB]
    os.close(watched.fd)
    assert [past for past, _ in watched.moves] == [True, False, False]


def test_an_error_of_the_disk_is_no_reason_to_try_another_way(path: Path) -> None:
    def broken(block: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(OSError, match="Input/output error"):
        Direct(fd, broken, READ_ALIGNMENT).transfer(aligned_buffer(MIB), 0)
    os.close(fd)


def test_a_file_written_in_pieces_of_any_size_is_what_was_written(tmp_path: Path, path: Path) -> None:
    content = memoryview(path.read_bytes())
    buffer = aligned_buffer(2 * MIB)
    fd = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    disk, offset = writing(fd, os.pwrite), 0
    for piece in (2 * MIB, MIB + 77, MIB - 77, 700):
        block = buffer[:piece]
        block[:] = content[offset : offset + piece]
        done = 0
        while done < piece:
            done += disk.transfer(block[done:], offset + done)
        offset += piece
    os.close(fd)
    assert (tmp_path / "copy").read_bytes() == content


def test_nothing_goes_past_the_cache_where_that_is_not_wanted(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    disk, buffer = reading(fd, able=False), aligned_buffer(4 * MIB)
    assert disk.transfer(buffer, 0) == 4 * MIB
    assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    os.close(fd)
