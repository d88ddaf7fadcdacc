"""A delta: a bundle without the chunks of its base, which only the base can complete."""

import os
from pathlib import Path

import pytest

from bundles.format.chunks import extents
from bundles.format.errors import BundleError
from bundles.format.source import beside
from bundles.reader import BundleReader
from bundles.store.base import StoredBase
from bundles.verify import inspect, verify
from tests.bundles.making import (
    INSPECTOR,
    Trust,
    forge_manifest,
    make_bundle,
    make_delta,
    manifest_of,
    members_of,
    sha256,
    split,
    write_members,
)
from tests.bundles.stores import bring, make_home, open_place


@pytest.fixture
def delta(tmp_path: Path, bundle: Path, trust: Trust) -> Path:
    """Sequence 2, against the bundle of sequence 1."""
    return make_delta(make_bundle(tmp_path / "second", trust, sequence=2), bundle, trust)


def _refusal(path: Path, trust: Trust, *bases: Path) -> str:
    with pytest.raises(BundleError) as error:
        verify(path, trust.root, inspector=INSPECTOR, bases=bases)
    return error.value.code


def test_a_delta_and_its_base_are_verified_as_a_whole_bundle_is(
    tmp_path: Path, bundle: Path, delta: Path, trust: Trust
) -> None:
    whole = make_bundle(tmp_path / "whole", trust, sequence=2)
    verified = verify(delta, trust.root, inspector=INSPECTOR, bases=(bundle,))
    assert verified.manifest.files == manifest_of(whole).files
    assert delta.stat().st_size < whole.stat().st_size
    assert verified.manifest.base == verify(bundle, trust.root, inspector=INSPECTOR).model_digest


def test_a_delta_without_its_base_is_refused_and_can_still_be_inspected(
    tmp_path: Path, bundle: Path, delta: Path, trust: Trust
) -> None:
    assert _refusal(delta, trust) == "BASE_ABSENT"
    other = make_bundle(tmp_path / "third", trust, sequence=3)
    assert _refusal(delta, trust, other) == "BASE_ABSENT"
    assert inspect(delta, trust.root).verified is not None


def test_a_delta_s_base_may_be_in_volumes(bundle: Path, tmp_path: Path, trust: Trust) -> None:
    first = split(bundle, trust, 1)
    delta = make_delta(make_bundle(tmp_path / "second", trust, sequence=2), first, trust)
    verify(delta, trust.root, inspector=INSPECTOR, bases=(first,))
    first.with_suffix(".002").unlink()
    assert _refusal(delta, trust, first) == "VOLUME_MISSING"


def test_a_delta_of_a_delta_needs_all_before_it(bundle: Path, delta: Path, tmp_path: Path, trust: Trust) -> None:
    third = make_delta(make_bundle(tmp_path / "third", trust, sequence=3), delta, trust)
    for bases in ((bundle, delta), (delta, bundle)):
        verify(third, trust.root, inspector=INSPECTOR, bases=bases)
    assert _refusal(third, trust, delta) == "BASE_ABSENT"
    assert _refusal(third, trust, bundle) == "BASE_ABSENT"


def test_a_damaged_base_is_refused_and_said_to_be_the_base(bundle: Path, delta: Path, trust: Trust) -> None:
    carried = {name for name, _ in members_of(delta)}
    members = members_of(bundle)
    for index, (name, content) in enumerate(members):
        if name.startswith("c/") and name not in carried:
            damaged = [*members[:index], (name, bytes(len(content) - 1) + b"!"), *members[index + 1 :]]
            write_members(bundle, damaged)
            assert _refusal(delta, trust, bundle) == "BASE_DAMAGED"
            write_members(bundle, [*members[:index], (name, content[:-1]), *members[index + 1 :]])
            assert _refusal(delta, trust, bundle) == "BASE_DAMAGED"
            return
    pytest.fail("the delta leaves out nothing")


def test_a_chunk_of_the_base_is_not_in_a_delta(bundle: Path, delta: Path, trust: Trust) -> None:
    members = members_of(delta)
    kept = next(m for m in members_of(bundle) if m[0].startswith("c/") and m[0] not in dict(members))
    write_members(delta, [*members[:-1], kept, members[-1]])
    assert _refusal(delta, trust, bundle) == "CONTAINER_UNLISTED"


def test_a_chunk_that_the_base_lacks_is_in_a_delta(bundle: Path, delta: Path, trust: Trust) -> None:
    members = members_of(delta)
    write_members(delta, [*members[:-2], members[-1]])
    assert _refusal(delta, trust, bundle) == "CONTAINER_MISSING"


def test_a_whole_bundle_takes_no_chunk_from_anywhere_else(
    tmp_path: Path, bundle: Path, delta: Path, trust: Trust
) -> None:
    forge_manifest(delta, trust, lambda m: m.update(base=None))
    assert _refusal(delta, trust, bundle).startswith("CONTAINER_")
    reader = BundleReader(beside(bundle))
    manifest = manifest_of(bundle)
    reader.read_head()
    reader.expect(manifest, frozenset(manifest.files[0].chunks))
    assert reader.carries(manifest.files[0].chunks[0])
    reader.close()


@pytest.mark.parametrize("carried", [0, 1])
def test_a_delta_may_be_in_volumes_that_carry_what_the_base_lacks(
    bundle: Path, delta: Path, trust: Trust, carried: int
) -> None:
    first = split(delta, trust, carried)
    verify(first, trust.root, inspector=INSPECTOR, bases=(bundle,))
    count = manifest_of(first).volumes[1].chunks
    listed = [{"index": 1, "chunks": carried}, {"index": 2, "chunks": count + 1}]
    forge_manifest(first, trust, lambda m: m.update(volumes=listed))
    assert _refusal(first, trust, bundle) == "MANIFEST_VOLUMES", (
        "fewer than the files have, more than it leaves out"
    )


def test_a_stored_base_opens_each_of_its_files_once_and_closes_them(
    tmp_path: Path, bundle: Path, trust: Trust
) -> None:
    place = open_place(make_home(tmp_path / "home", trust))
    bring(place, bundle)
    place.ledger.close()
    manifest = manifest_of(bundle)
    opened: list[str] = []

    def path_of(digest: str) -> Path:
        opened.append(digest)
        return place.store.path_of(digest)

    before = os.listdir("/proc/self/fd")
    base = StoredBase(manifest, path_of)
    for file in manifest.files:
        for extent, digest in zip(extents(file.size, manifest.chunk_size), file.chunks, strict=True):
            read_into, content = base.open(digest), b""
            while got := read_into(buffer := memoryview(bytearray(1000))):
                content += buffer[:got]
            assert (len(content), sha256(content)) == (extent.length, digest)
    base.close()
    assert max(len(file.chunks) for file in manifest.files) > 2
    assert opened == [file.sha256 for file in manifest.files if file.size]
    assert os.listdir("/proc/self/fd") == before
