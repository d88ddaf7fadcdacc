"""A trust bundle: roots and revocations without a model, read as strictly as any bundle, in a file or a folder."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bundles.format.errors import BundleError
from bundles.format.members import trust_members
from bundles.trust import revocation
from bundles.trust.roots import Root
from bundles.verify import inspect, kind_of, read_trust_bundle, verify, verify_trust_bundle
from tests.bundles.making import Members, Trust, make_root, make_trust, members_of, unpack, write_members

NOW = datetime.now(UTC)


def _roots(trust: Trust) -> tuple[Root, Root]:
    """The first root, and the second, which has a key for revocations."""
    roles = {"root": [trust.root_key], "release": [trust.release_key], "publisher": [trust.publisher_key]}
    return trust.root, make_root(2, roles | {"revocation": [trust.release_key]})


@pytest.fixture
def brought(tmp_path: Path, trust: Trust) -> Path:
    """A trust bundle with the second root and a revocation of nothing but a key."""
    document = revocation.make(1, NOW, NOW + timedelta(days=40), keys=["0" * 64])
    raw = revocation.sign(document, [trust.release_key])
    path = tmp_path / "monthly.trust"
    write_members(path, list(trust_members([(2, _roots(trust)[1].raw)], raw)))
    return path


def test_a_trust_bundle_brings_a_root_and_revocations(brought: Path, tmp_path: Path, trust: Trust) -> None:
    for path in (brought, unpack(brought, tmp_path / "folder")):
        assert kind_of(path) == "trust"
        verified = verify_trust_bundle(path, trust.root)
        assert (verified.root.version, [root.version for root in verified.new_roots]) == (2, [2])
        assert verified.revocations is not None
        assert verified.revocations.keys == {"0" * 64}
    assert brought.stat().st_size < 16 * 1024


def test_a_trust_bundle_of_strangers_is_refused(brought: Path) -> None:
    with pytest.raises(BundleError, match="ROOT_NOT_SIGNED_BY_OLD"):
        verify_trust_bundle(brought, make_trust().root)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: [m[0], m[-1]], "CONTAINER_MISSING"),
        (lambda m: m[:-1], "CONTAINER_MISSING"),
        (lambda m: [m[0], m[1], m[-1]], "BUNDLE_MIXED"),
        (lambda m: [m[0], m[2], m[1], m[3]], "CONTAINER_ORDER"),
        (lambda m: [m[0], m[1], m[1], *m[2:]], "CONTAINER_DUPLICATE"),
        (lambda m: [*m[:-1], ("c/" + "0" * 64, b""), m[-1]], "CONTAINER_UNLISTED"),
        (lambda m: [*m[:-1], ("oms.sig", b""), m[-1]], "CONTAINER_ORDER"),
        (lambda m: [*m, ("more", b"")], "CONTAINER_UNLISTED"),
        (lambda m: [("header.json", m[0][1].replace(b"}", b', "name": "x"}')), *m[1:]], "HEADER_FORMAT"),
        (lambda m: [("header.json", m[0][1].replace(b"trust", b"treat")), *m[1:]], "HEADER_FORMAT"),
        (lambda m: [("header.json", m[0][1].replace(b":1", b":true")), *m[1:]], "HEADER_FORMAT"),
        (lambda m: [*m[:-1], ("end.json", m[-1][1].replace(b"2", b"3"))], "BUNDLE_MIXED"),
    ],
)
def test_a_trust_bundle_of_another_form_is_refused_by_name(
    brought: Path, change: Callable[[Members], Members], code: str
) -> None:
    write_members(brought, change(members_of(brought)))
    with pytest.raises(BundleError) as error:
        read_trust_bundle(brought)
    assert error.value.code == code


def test_a_trust_bundle_is_no_model_and_a_model_no_trust_bundle(brought: Path, bundle: Path, trust: Trust) -> None:
    for read in (lambda: verify(brought, trust.root), lambda: inspect(brought), lambda: read_trust_bundle(bundle)):
        with pytest.raises(BundleError, match="HEADER_FORMAT"):
            read()
    assert kind_of(bundle) == "model"
