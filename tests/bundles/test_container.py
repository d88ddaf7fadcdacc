"""The container: any tar program reads it, and nothing but its one legal encoding is accepted."""

import io
import os
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundles.format.container import ContainerWriter, encode_header, open_file
from bundles.format.errors import BundleError
from bundles.format.source import open_source
from tests.bundles.making import Members, members_of, write_members

_TWO: Members = [("header.json", b"{}"), ("c/abc", b"x" * 700)]


def _with_checksum(header: bytes) -> bytes:
    total = sum(header[:148]) + 256 + sum(header[156:])
    return header[:148] + b"%06o\0 " % total + header[156:]


def _patched(at: int, new: bytes) -> Callable[[bytes], bytes]:
    """Patch the first header and make its checksum right again."""

    def patch(raw: bytes) -> bytes:
        header = raw[:at] + new + raw[at + len(new) : 512]
        return _with_checksum(header) + raw[512:]

    return patch


def _code_of(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    with pytest.raises(BundleError) as error:
        _read_all(path)
    return error.value.code


def _read_all(path: Path) -> None:
    with closing(open_source(path)) as source:
        while source.next() is not None:
            source.read(1000)


def _raw(members: Members) -> bytes:
    stream = io.BytesIO()
    writer = ContainerWriter(stream)
    for name, content in members:
        writer.add(name, content)
    writer.close()
    return stream.getvalue()


def test_what_is_written_is_read_by_us_and_by_any_tar_program(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_members(path, _TWO)
    assert members_of(path) == _TWO
    with tarfile.open(path, "r:") as tar:
        assert [(m.name, m.size, m.mode, m.uid, m.mtime) for m in tar] == [
            ("header.json", 2, 0o444, 0, 0),
            ("c/abc", 700, 0o444, 0, 0),
        ]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_patched(156, b"5"), "CONTAINER_DIRECTORY"),
        (_patched(156, b"7"), "CONTAINER_TYPE"),
        (_patched(156, b"\0"), "CONTAINER_TYPE"),
        (_patched(108, b"0000001\0"), "CONTAINER_HEADER"),
        (_patched(265, b"root"), "CONTAINER_HEADER"),
        (_patched(157, b"target"), "CONTAINER_HEADER"),
        (_patched(0, b"\xff"), "CONTAINER_NAME"),
        (_patched(345, b"prefix"), "CONTAINER_NAME"),
        (_patched(99, b"x"), "CONTAINER_NAME"),
        (_patched(124, b"         2 \0"), "CONTAINER_SIZE"),
        (_patched(257, b"xxxxxx"), "CONTAINER_FORMAT"),
        (lambda raw: b"\x28\xb5\x2f\xfd" + raw, "CONTAINER_COMPRESSED"),
        (lambda raw: b"\x04\x22\x4d\x18" + raw, "CONTAINER_COMPRESSED"),
        (lambda raw: b"7z\xbc\xaf\x27\x1c" + raw, "CONTAINER_COMPRESSED"),
        (lambda raw: raw[:600] + b"!" + raw[601:], "CONTAINER_PADDING"),
        (lambda raw: raw[:-700], "CONTAINER_TRUNCATED"),
        (lambda raw: raw[:1300], "CONTAINER_TRUNCATED"),
        (lambda raw: b"", "CONTAINER_TRUNCATED"),
        (lambda raw: raw[:-1] + b"x", "CONTAINER_TRAILING"),
    ],
)
def test_a_hostile_container_is_refused_by_name(
    tmp_path: Path, change: Callable[[bytes], bytes], code: str
) -> None:
    assert _code_of(tmp_path / "x", change(_raw(_TWO))) == code


def test_the_largest_size_announced_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(encode_header("header.json", 8**11 - 1) + bytes(1024))
    reader = open_source(path)
    reader.next()
    with pytest.raises(BundleError, match="CONTAINER_MEMBER_SIZE"):
        reader.read(4096)
    assert reader.bytes_read == 512


@given(bit=st.integers(0, 512 * 8 - 1))
@settings(max_examples=150, deadline=None)
def test_any_flipped_bit_of_a_header_is_refused(tmp_path_factory: pytest.TempPathFactory, bit: int) -> None:
    raw = bytearray(_raw(_TWO))
    raw[bit // 8] ^= 1 << bit % 8
    path = tmp_path_factory.getbasetemp() / "flipped"
    assert _code_of(path, bytes(raw)).startswith("CONTAINER_")


def test_a_symbolic_link_a_folder_and_a_fifo_are_no_file_and_only_a_folder_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    codes = {
        "link": "SOURCE_SYMLINK",
        ".": "SOURCE_NOT_FILE",
        "fifo": "SOURCE_NOT_FILE",
        "absent": "SOURCE_UNREADABLE",
    }
    for name, code in codes.items():
        with pytest.raises(BundleError) as error:
            open_file(tmp_path / name)
        assert error.value.code == code
        if name != ".":
            with pytest.raises(BundleError, match=code):
                open_source(tmp_path / name)
    open_source(tmp_path).close()


def test_a_writer_keeps_the_size_it_announced() -> None:
    writer = ContainerWriter(io.BytesIO())
    writer.begin("a", 3)
    with pytest.raises(RuntimeError, match="left"):
        writer.write(b"four")
    writer.write(b"ab")
    with pytest.raises(RuntimeError, match="lacks 1 bytes"):
        writer.close()
