"""The format's vectors: made by a second writer, read by this reader and by a second one, all after the page."""

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bundles.format.source import beside
from bundles.reader import BundleReader
from bundles.trust import roots
from bundles.trust.policy import Site
from bundles.verify import verify
from tests.bundles.making import INSPECTOR, members_of
from tests.bundles.vectors.format import make, read

HERE = Path(make.__file__).parent
SITE = Site(datetime.now(UTC))  # the root expires in 2099
FORMS: dict[str, tuple[str, ...]] = {
    "whole.bundle": (),
    "volumes.bundle.001": (),
    "folder": (),
    "delta.bundle": ("whole.bundle",),
}


def test_the_committed_vectors_are_what_the_command_writes() -> None:
    written = make.vectors()
    committed = [path for path in HERE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".md")]
    assert {path.relative_to(HERE).as_posix(): path.read_bytes() for path in committed} == written


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_verified_here(form: str) -> None:
    root = roots.load(HERE / "root.json")
    bases = tuple(HERE / name for name in FORMS[form])
    verified = verify(HERE / form, root, site=SITE, inspector=INSPECTOR, bases=bases)
    assert verified.manifest.name == "vector"
    assert len(verified.signers) == 2


def _contents(name: str) -> list[bytes]:
    if name == "volumes.bundle.001":
        return [(HERE / f"volumes.bundle.00{n}").read_bytes() for n in (1, 2)]
    return [(HERE / name).read_bytes()]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "folder"])
def test_a_reader_of_nothing_but_the_page_reads_the_same_files(form: str) -> None:
    base = {name[2:]: content for name, content in members_of(HERE / "whole.bundle") if name.startswith("c/")}
    files = read.read(_contents(form), (HERE / "root.json").read_bytes(), base)
    expected = make._model(changed=form == "delta.bundle")
    assert files == expected


def test_the_folder_holds_the_members_of_the_whole_bundle() -> None:
    folder = {
        p.relative_to(HERE / "folder").as_posix(): p.read_bytes()
        for p in (HERE / "folder").rglob("*")
        if p.is_file()
    }
    assert folder == dict(members_of(HERE / "whole.bundle"))


def _changed(change: Callable[[bytes], bytes], at: int = 0) -> list[bytes]:
    contents = _contents("volumes.bundle.001")
    contents[at] = change(contents[at])
    return contents


@pytest.mark.parametrize(
    "contents",
    [
        _changed(lambda raw: raw.replace(b"MEU", b"MEV").replace(b"ed25519", b"ed25518")),
        _changed(lambda raw: raw[:-1025] + b"x" + raw[-1024:]),
        _changed(lambda raw: raw.replace(b"Do as you like", b"Do as you lick"), 0),
        _changed(lambda raw: raw, 1)[:1],
        _changed(lambda raw: raw, 1)[::-1],
        [_contents("volumes.bundle.001")[0]] * 2,
    ],
)
def test_the_second_reader_refuses_what_it_must(contents: list[bytes]) -> None:
    with pytest.raises((ValueError, KeyError)):
        read.read(contents, (HERE / "root.json").read_bytes())


def test_the_trust_bundle_brings_the_next_root() -> None:
    pinned = roots.load(HERE / "root.json")
    with closing(BundleReader(beside(HERE / "trust.bundle"))) as reader:
        assert reader.read_header() == "trust"
        head = reader.read_trust()
    assert head.revocation is None
    assert roots.advance(pinned, [roots.parse(raw) for raw in head.roots]).version == 2


def test_the_model_digest_of_a_vector_is_the_one_on_the_page() -> None:
    payload = read._object((HERE / "folder" / "manifest.dsse.json").read_bytes())["payload"]
    import base64

    digest = hashlib.sha256(base64.b64decode(payload)).hexdigest()
    page = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text()
    assert digest in page
    assert json.loads(base64.b64decode(payload))["name"] == "vector"
