"""A bundle as a folder: the same members as files, nothing else, and nothing through a link."""

import fcntl
import os
import socket
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from bundles.direct import aligned_buffer
from bundles.format.errors import BundleError
from bundles.format.folder import FolderReader
from bundles.format.source import Source, open_source
from bundles.verify import inspect, verify
from tests.bundles.making import INSPECTOR, Trust, make_bundle, make_delta, manifest_of, members_of, unpack


@pytest.fixture
def folder(tmp_path: Path, bundle: Path) -> Path:
    return unpack(bundle, tmp_path / "folder")


def _refusal(folder: Path, trust: Trust) -> str:
    with pytest.raises(BundleError) as error:
        verify(folder, trust.root, inspector=INSPECTOR)
    return error.value.code


def test_a_folder_is_verified_like_the_file_with_the_same_members(
    folder: Path, bundle: Path, trust: Trust
) -> None:
    assert verify(folder, trust.root, inspector=INSPECTOR) == verify(bundle, trust.root, inspector=INSPECTOR)
    assert inspect(folder).manifest == inspect(bundle).manifest


def test_a_chunk_that_files_share_is_in_a_folder_once_and_read_as_often_as_it_occurs(
    tmp_path: Path, trust: Trust
) -> None:
    def twice(model: Path) -> None:
        (model / "notice.txt").write_bytes((model / "LICENSE").read_bytes())

    path = make_bundle(tmp_path / "b", trust, prepare=twice)
    names = [name for name, _ in members_of(path)]
    assert len(set(names)) == len(names) - 1
    verify(unpack(path, tmp_path / "folder"), trust.root, inspector=INSPECTOR)


def _chunk(folder: Path) -> Path:
    return max((folder / "c").iterdir(), key=lambda path: path.stat().st_size)


def _instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Puts something else in the place of a chunk."""

    def change(folder: Path) -> None:
        path = _chunk(folder)
        path.rename(folder.parent / "chunk")
        make(path)

    return change


def _linked(name: str) -> Callable[[Path], None]:
    """Moves a member away and leaves a link to it."""

    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return change


def _socket(path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        os.chdir(path.parent)  # a socket's path has 107 bytes at most
        listener.bind(path.name)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda f: (f / "evil.sh").write_text("x"), "CONTAINER_UNLISTED"),
        (lambda f: (f / "c" / ("0" * 64)).write_text("x"), "CONTAINER_UNLISTED"),
        (lambda f: (f / "c" / "\udcff").write_text("x"), "CONTAINER_UNLISTED"),
        (
            lambda f: (f / "attest").mkdir(exist_ok=True) or (f / "attest" / "x").write_text("x"),
            "CONTAINER_UNLISTED",
        ),
        (lambda f: (f / "trust" / "01.root.json").write_text("x"), "CONTAINER_UNLISTED"),
        (lambda f: (f / "licence" / ".hidden").write_text("x"), "CONTAINER_UNLISTED"),
        (lambda f: (f / "c" / "deeper").mkdir(), "CONTAINER_UNLISTED"),
        (lambda f: (f / "header.json").unlink(), "CONTAINER_MISSING"),
        (lambda f: (f / "manifest.dsse.json").unlink(), "CONTAINER_MISSING"),
        (lambda f: (f / "oms.sig").unlink(), "OMS_MISSING"),
        (lambda f: (f / "licence" / "LICENSE").unlink(), "CONTAINER_MISSING"),
        (lambda f: _chunk(f).unlink(), "CONTAINER_MISSING"),
        (lambda f: (f / "c").rename(f.parent / "c"), "CONTAINER_MISSING"),
        (lambda f: (f / "end.json").unlink(), "CONTAINER_MISSING"),
        (lambda f: os.truncate(_chunk(f), 100), "CONTAINER_MEMBER_SIZE"),
        (lambda f: os.truncate(f / "header.json", 5000), "CONTAINER_MEMBER_SIZE"),
        (_linked("header.json"), "CONTAINER_SYMLINK"),
        (_linked("oms.sig"), "CONTAINER_SYMLINK"),
        (_linked("c"), "CONTAINER_SYMLINK"),
        (_linked("trust"), "CONTAINER_SYMLINK"),
        (_instead(lambda path: path.symlink_to("/dev/zero")), "CONTAINER_SYMLINK"),
        (_instead(lambda path: path.symlink_to("nowhere")), "CONTAINER_SYMLINK"),
        (_instead(os.mkfifo), "CONTAINER_DEVICE"),
        (_instead(_socket), "CONTAINER_DEVICE"),
        (_instead(os.mkdir), "CONTAINER_DIRECTORY"),
        (lambda f: os.link(_chunk(f), f.parent / "second"), "CONTAINER_HARDLINK"),
        (lambda f: _chunk(f).chmod(0o4755), "CONTAINER_MODE"),
        (lambda f: (f / "end.json").write_text("{}"), "BUNDLE_MIXED"),
    ],
)
def test_a_folder_with_anything_else_in_it_is_refused_by_name(
    folder: Path, trust: Trust, change: Callable[[Path], object], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)  # and back, whatever a change does
    change(folder)
    assert _refusal(folder, trust) == code


def test_a_folder_that_is_no_bundle_is_said_to_be_none(tmp_path: Path, trust: Trust) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(BundleError, match="not a bundle"):
        verify(tmp_path, trust.root)


def test_a_link_to_a_folder_is_no_source(folder: Path, trust: Trust) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder)
    assert _refusal(link, trust) == "SOURCE_SYMLINK"


def test_a_file_of_the_folder_that_changes_while_it_is_read_is_refused(folder: Path) -> None:
    for change in (lambda path: os.truncate(path, 3), lambda path: path.write_bytes(bytes(4000))):
        with closing(open_source(folder)) as source:
            source.next()
            change(folder / "header.json")
            with pytest.raises(BundleError, match="SOURCE_CHANGED"):
                _read_on(source)


def _read_on(source: Source) -> None:
    source.read(10_000)
    source.next()


def test_reading_a_folder_leaves_no_descriptor_open(folder: Path, trust: Trust) -> None:
    before = len(os.listdir("/proc/self/fd"))
    verify(folder, trust.root, inspector=INSPECTOR)
    with suppress(BundleError):
        (folder / "evil").write_bytes(b"")
        verify(folder, trust.root, inspector=INSPECTOR)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_delta_may_be_a_folder_and_its_base_too(tmp_path: Path, bundle: Path, trust: Trust) -> None:
    newer = make_delta(make_bundle(tmp_path / "newer", trust, sequence=2), bundle, trust)
    base = unpack(bundle, tmp_path / "base")
    folder = unpack(newer, tmp_path / "delta")
    assert len(list((folder / "c").iterdir())) < manifest_of(newer).chunk_count
    assert verify(folder, trust.root, inspector=INSPECTOR, bases=(base,)).manifest.sequence == 2
    kept = next((base / "c").iterdir())
    if not (folder / "c" / kept.name).exists():
        (folder / "c" / kept.name).write_bytes(kept.read_bytes())
        with pytest.raises(BundleError, match="CONTAINER_UNLISTED"):
            verify(folder, trust.root, inspector=INSPECTOR, bases=(base,))


def test_chunks_of_a_folder_go_past_the_page_cache_and_leave_nothing_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, moves, dropped = os.urandom(2 * 2**20 + 700), [], []
    for name in ("c/x", "licence/x"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        moves.append((bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT), len(buffers[0])))
        return real(fd, buffers, offset)

    def advise(fd: int, offset: int, length: int, advice: int) -> None:
        dropped.append((os.readlink(f"/proc/self/fd/{fd}"), offset, length, advice))

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    with closing(FolderReader(os.open(tmp_path, os.O_RDONLY))) as source:
        for name in ("licence/x", "c/x"):
            buffer = aligned_buffer(source.revisit(name, 0).size)
            moves.clear()
            assert source.read_into(buffer) == len(content)
            assert bytes(buffer) == content
    assert moves == [(True, 2 * 2**20 + 512), (False, 188)]
    assert dropped == [(str(tmp_path / "c" / "x"), 0, 0, os.POSIX_FADV_DONTNEED)]
