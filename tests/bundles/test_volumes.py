"""A bundle in volumes: each is a file of its own, asked for in its turn, and a wrong one is refused by name."""

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bundles.format.chunks import extents
from bundles.format.errors import BundleError
from bundles.format.manifest import Manifest
from bundles.format.source import Source, beside, open_source
from bundles.pipeline import Progress
from bundles.reader import BundleReader, open_volume
from bundles.trust import dsse
from bundles.verify import inspect, verify
from tests.bundles.making import (
    INSPECTOR,
    Members,
    Trust,
    forge_manifest,
    make_bundle,
    manifest_of,
    members_of,
    replace_member,
    split,
    write_members,
)


@pytest.fixture
def first(bundle: Path, trust: Trust) -> Path:
    """The first of three volumes."""
    return split(bundle, trust, 2, 3)


def _of(first: Path, index: int) -> Path:
    return first.with_suffix(f".{index:03}")


def _refusal(path: Path, trust: Trust) -> str:
    with pytest.raises(BundleError) as error:
        verify(path, trust.root, inspector=INSPECTOR)
    return error.value.code


def test_volumes_beside_each_other_are_verified_like_the_whole(first: Path, bundle: Path, trust: Trust) -> None:
    told: list[Progress] = []
    verified = verify(first, trust.root, inspector=INSPECTOR, report=told.append)
    whole = verify(bundle, trust.root, inspector=INSPECTOR)
    assert verified.manifest == whole.manifest.model_copy(update={"volumes": verified.manifest.volumes})
    assert told[-1].bytes_done == whole.manifest.total_size
    assert len(inspect(first).manifest.volumes) == 3


@pytest.mark.parametrize("counts", [(0,), (1,), (7,), (1, 1, 1, 1, 1, 1, 1), (0, 3, 3)])
def test_a_bundle_may_be_cut_between_any_chunks(bundle: Path, trust: Trust, counts: tuple[int, ...]) -> None:
    first = split(bundle, trust, *counts)
    manifest = verify(first, trust.root, inspector=INSPECTOR).manifest
    assert [volume.chunks for volume in manifest.volumes[:-1]] == list(counts)


def test_every_volume_is_a_container_of_its_own(first: Path) -> None:
    names = [[name for name, _ in members_of(_of(first, index))] for index in (1, 2, 3)]
    assert all((volume[0], volume[-1]) == ("header.json", "end.json") for volume in names)
    assert [sum(name.startswith("c/") for name in volume) for volume in names[:2]] == [2, 3]
    assert [len(volume) - 2 for volume in names[1:]] == [
        sum(name.startswith("c/") for name in volume) for volume in names[1:]
    ]


def _absent(first: Path) -> None:
    _of(first, 2).unlink()


def _repeated(first: Path) -> None:
    shutil.copy(_of(first, 1), _of(first, 2))


def _swapped(first: Path) -> None:
    _of(first, 2).rename(_of(first, 9))
    _of(first, 3).rename(_of(first, 2))
    _of(first, 9).rename(_of(first, 3))


def _linked(first: Path) -> None:
    _of(first, 2).rename(_of(first, 9))
    _of(first, 2).symlink_to(_of(first, 9))


def _end_of_another_volume(first: Path) -> None:
    end = members_of(_of(first, 3))[-1]
    write_members(_of(first, 2), [*members_of(_of(first, 2))[:-1], end])


def _members(index: int, change: Callable[[Members], Members]) -> Callable[[Path], None]:
    def apply(first: Path) -> None:
        write_members(_of(first, index), change(members_of(_of(first, index))))

    return apply


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_absent, "VOLUME_MISSING"),
        (_repeated, "VOLUME_ORDER"),
        (_swapped, "VOLUME_ORDER"),
        (_linked, "SOURCE_SYMLINK"),
        (_end_of_another_volume, "VOLUME_MIXED"),
        (_members(1, lambda m: [*m[:-1], m[-2], m[-1]]), "CONTAINER_DUPLICATE"),
        (_members(1, lambda m: [*m[:-2], m[-1]]), "CONTAINER_MISSING"),
        (_members(2, lambda m: [m[0], *m[2:]]), "CONTAINER_ORDER"),
        (_members(2, lambda m: [m[0], *m[2:0:-1], *m[3:]]), "CONTAINER_ORDER"),
        (_members(2, lambda m: m[:-1]), "CONTAINER_MISSING"),
        (_members(3, lambda m: [*m, ("more", b"")]), "CONTAINER_UNLISTED"),
        (_members(3, lambda m: [*m[:-1], ("c/" + "0" * 64, b""), m[-1]]), "CONTAINER_UNLISTED"),
        (_members(2, lambda m: [("header.json", b"{}"), *m[1:]]), "HEADER_FORMAT"),
        (
            _members(2, lambda m: [("header.json", m[0][1].replace(b'"name":"tiny"', b'"name":"tina"')), *m[1:]]),
            "VOLUME_MIXED",
        ),
        (
            _members(2, lambda m: [("header.json", m[0][1].replace(b'"volumes":3', b'"volumes":4')), *m[1:]]),
            "VOLUME_MIXED",
        ),
        (
            _members(2, lambda m: [("header.json", m[0][1].replace(b'"volume":2', b'"volume":2.0')), *m[1:]]),
            "JSON_FLOAT",
        ),
        (
            _members(1, lambda m: [("header.json", m[0][1].replace(b'"volume":1', b'"volume":true')), *m[1:]]),
            "BUNDLE_MIXED",
        ),
        (
            _members(1, lambda m: [("header.json", m[0][1].replace(b'"volumes":3', b'"volumes":1')), *m[1:]]),
            "BUNDLE_MIXED",
        ),
        (lambda f: os.truncate(_of(f, 2), 2000), "CONTAINER_TRUNCATED"),
    ],
)
def test_volumes_that_do_not_make_the_bundle_are_refused_by_name(
    first: Path, trust: Trust, change: Callable[[Path], object], code: str
) -> None:
    change(first)
    assert _refusal(first, trust) == code


def test_a_volume_of_another_bundle_is_refused_by_name(first: Path, tmp_path: Path, trust: Trust) -> None:
    other = split(make_bundle(tmp_path / "other", trust, sequence=2), trust, 2, 3)
    shutil.copy(_of(other, 2), _of(first, 2))
    assert _refusal(first, trust) == "VOLUME_MIXED"


@pytest.mark.parametrize("index", [2, 3])
def test_a_later_volume_offered_as_the_first_is_told_which_one_is_wanted(
    first: Path, trust: Trust, index: int
) -> None:
    with pytest.raises(BundleError, match=f"volume {index} of 3; volume 1 is wanted") as error:
        verify(_of(first, index), trust.root, inspector=INSPECTOR)
    assert error.value.code == "VOLUME_ORDER"


def test_a_volume_whose_name_says_nothing_of_the_others_is_told_how_they_are_named(
    first: Path, trust: Trust
) -> None:
    renamed = first.rename(first.with_name("renamed"))
    with pytest.raises(BundleError, match=r"VOLUME_MISSING.*NAME\.001"):
        verify(renamed, trust.root, inspector=INSPECTOR)


def _skip_all(reader: BundleReader, manifest: Manifest, but: int = -1) -> None:
    """Step over every chunk, but one that is read."""
    places = (
        (digest, extent.length)
        for file in manifest.files
        for extent, digest in zip(extents(file.size, manifest.chunk_size), file.chunks, strict=True)
    )
    for number, (digest, length) in enumerate(places):
        if number == but:
            reader.open_chunk(digest, length)
            assert reader.read_into(memoryview(bytearray(length))) == length
        else:
            reader.skip_chunk(digest, length)


def test_a_medium_is_asked_for_when_the_one_before_is_read_to_its_end_and_closed(
    first: Path, trust: Trust
) -> None:
    asked: list[tuple[int, bool]] = []
    sources: list[Source] = []

    def volumes(index: int) -> Source:
        asked.append((index, all(source._fd < 0 for source in sources)))  # type: ignore[attr-defined]  # of a file
        sources.append(open_source(_of(first, index)))
        return sources[-1]

    with closing(BundleReader(volumes)) as reader:
        manifest = manifest_of(first)
        reader.read_head()
        reader.expect(manifest)
        for document in manifest.documents:
            reader.read_document(document)
        assert asked == [(1, True)], "documents are all in the first volume"
        _skip_all(reader, manifest, but=manifest.chunk_count - 1)
        reader.read_end()
    assert asked == [(1, True), (3, True)], "of the second nothing was wanted"


@pytest.mark.parametrize("kept", [False, True])
def test_whatever_is_wanted_only_the_volumes_that_have_it_are_asked_for(
    first: Path, tmp_path: Path, kept: bool
) -> None:
    manifest, contents = manifest_of(first), [dict(members_of(_of(first, index))) for index in (1, 2, 3)]
    bounds = [0, 2, 5, manifest.chunk_count]
    head = tmp_path / "head"
    write_members(head, [member for member in members_of(first)[:-1] if not member[0].startswith("c/")])
    places = [
        (digest, extent.length)
        for file in manifest.files
        for extent, digest in zip(extents(file.size, manifest.chunk_size), file.chunks, strict=True)
    ]
    for wanted in range(2 ** len(places)):
        asked: list[int] = []

        def volumes(index: int, asked: list[int] = asked) -> Source:
            asked.append(index)
            return open_source(_of(first, index))

        with closing(BundleReader(volumes, open_source(head) if kept else None)) as reader:
            reader.read_head()
            reader.expect(manifest)
            for document in manifest.documents:
                reader.read_document(document)
            for number, (digest, length) in enumerate(places):
                if not wanted >> number & 1:
                    reader.skip_chunk(digest, length)
                    continue
                reader.open_chunk(digest, length)
                content = bytearray(length)
                assert reader.read_into(memoryview(content)) == length
                assert content in [volume.get(f"c/{digest}") for volume in contents]
            reader.read_end()
        having = [v + 1 for v in range(3) if any(wanted >> n & 1 for n in range(bounds[v], bounds[v + 1]))]
        assert asked == sorted({*having, *([] if kept else [1])}), f"{wanted:b}"


def test_skipped_chunks_are_not_read_and_their_places_are_still_checked(first: Path, bundle: Path) -> None:
    manifest = manifest_of(bundle)
    with closing(BundleReader(beside(bundle))) as reader:
        reader.read_head()
        reader.expect(manifest)
        for document in manifest.documents:
            reader.read_document(document)
        before, chunks = reader.bytes_read, manifest.chunk_count
        _skip_all(reader, manifest)
        reader.read_end()
        assert reader.bytes_read - before < 1024 * (chunks + 3), "headers and padding"
    os.truncate(bundle, bundle.stat().st_size - 3072)
    with closing(BundleReader(beside(bundle))) as reader:
        reader.read_head()
        reader.expect(manifest)
        for document in manifest.documents:
            reader.read_document(document)
        with pytest.raises(BundleError, match="CONTAINER_"):
            _skip_all(reader, manifest)


def test_a_medium_is_judged_before_it_is_read(first: Path, tmp_path: Path, trust: Trust) -> None:
    manifest = manifest_of(first)
    source = open_volume(_of(first, 2), manifest, 2)
    member = source.next()
    assert member is not None, "it is read from its beginning"
    assert member.name == "header.json"
    source.close()
    other = split(make_bundle(tmp_path / "other", trust, sequence=2), trust, 2, 3)
    stray = tmp_path / "stray"
    write_members(stray, [("c/" + "0" * 64, b"")])
    for path, code in ((_of(first, 3), "VOLUME_ORDER"), (_of(other, 2), "VOLUME_MIXED"), (stray, "HEADER_FORMAT")):
        with pytest.raises(BundleError, match=code):
            open_volume(path, manifest, 2)


def _volumes(*chunks: int) -> Callable[[dict[str, Any]], None]:
    return lambda m: m.update(volumes=[{"index": i, "chunks": c} for i, c in enumerate(chunks, start=1)])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_volumes(8), "MANIFEST_VOLUMES"),
        (_volumes(2, 3), "MANIFEST_VOLUMES"),
        (_volumes(2, 300), "MANIFEST_VOLUMES"),
        (_volumes(8, 0), "MANIFEST_VOLUMES"),
        (lambda m: m.update(volumes=[{"index": 2, "chunks": 2}, {"index": 1, "chunks": 6}]), "MANIFEST_VOLUMES"),
        (lambda m: m.update(volumes=[{"index": 1, "chunks": 2}, {"index": 1, "chunks": 6}]), "MANIFEST_VOLUMES"),
        (lambda m: m.update(volumes=[{"index": 1, "chunks": -1}, {"index": 2, "chunks": 9}]), "MANIFEST_SCHEMA"),
        (lambda m: m.update(volumes=[{"index": 1, "chunks": 1}] * 1000), "MANIFEST_VOLUMES"),
        (lambda m: m.update(volumes=[{"index": 1000, "chunks": 1}] * 2), "MANIFEST_SCHEMA"),
    ],
)
def test_volumes_that_cannot_be_are_refused_in_the_manifest(
    bundle: Path, trust: Trust, change: Callable[[dict[str, Any]], None], code: str
) -> None:
    forge_manifest(bundle, trust, change)
    assert _refusal(bundle, trust) == code


def test_a_bundle_in_one_volume_that_names_several_is_not_taken_for_whole(bundle: Path, trust: Trust) -> None:
    count = manifest_of(bundle).chunk_count
    forge_manifest(bundle, trust, _volumes(2, count - 2))
    assert _refusal(bundle, trust) == "BUNDLE_MIXED"


def test_a_fault_in_a_signature_is_found_before_another_volume_is_asked_for(first: Path, trust: Trust) -> None:
    def unsigned(raw: bytes) -> bytes:
        envelope = dsse.parse(raw, "it")
        return dsse.Envelope(envelope.payload, envelope.payload_type).encode()

    replace_member(first, "manifest.dsse.json", unsigned)
    for index in (2, 3):
        _of(first, index).unlink()
    assert _refusal(first, trust) == "SIGNATURE_MISSING"
