"""Building refuses what importing would, and takes along what belongs to a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bundles.builder import Signing, build, sign
from bundles.format.errors import BundleError
from bundles.trust import oms
from bundles.verify import verify
from tests.bundles.making import (
    INSPECTOR,
    Trust,
    make_model,
    make_release,
    members_of,
    replace_member,
    sha256,
)


def test_building_refuses_what_importing_would(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    out = tmp_path / "b"

    def code(**changes: Any) -> str:
        with pytest.raises(BundleError) as error:
            build(make_release(**changes), model, out, inspector=INSPECTOR)
        assert not out.exists()
        return error.value.code

    for wrong in (
        {"name": "Bad Name"},
        {"version": "a b"},
        {"sequence": 0},
        {"sequence": 2**53},
        {"targets": ("",)},
        {"licence": "x" * 129},
    ):
        assert code(**wrong) == "RELEASE_INVALID"
    (model / "evil.py").write_text("")
    assert code() == "CONTENT_CODE"
    (model / "evil.py").unlink()
    (model / "link.json").symlink_to("/etc/passwd")
    assert code() == "SOURCE_SYMLINK"
    (model / "link.json").unlink()
    for bad in (
        '{"canaries": [{"messages": 1}]}',
        '{"canaries": 1}',
        '{"canaries": [{"messages": [{"role": "user", "content": ""}], "expected": "x", "match": "json"}]}',
        '{"canaries": [{"messages": [{"role": "user", "content": ""}], "expected": "1", "match": "json_fields"}]}',
        '{"canaries": [], "decoding": {"max_tokens": "x"}}',
    ):
        (model / "canaries.json").write_text(bad)
        assert code() == "MANIFEST_SCHEMA"
    (model / "canaries.json").unlink()
    (model / "LICENSE").unlink()
    assert code() == "LICENCE_MISSING"
    shutil.rmtree(model)
    assert code() == "SOURCE_UNREADABLE"


@pytest.mark.parametrize("answers", [["embed"], ["rerank"], ["generate"]])
def test_canaries_of_a_model_that_has_no_conversations_are_refused(tmp_path: Path, answers: list[str]) -> None:
    model = make_model(tmp_path / "m")
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "answers": answers}))
    with pytest.raises(BundleError, match=rf"CANARIES_UNANSWERED.* answers {answers[0]};"):
        build(make_release(), model, tmp_path / "b", inspector=INSPECTOR)
    (model / "canaries.json").unlink()
    assert build(make_release(), model, tmp_path / "b", inspector=INSPECTOR).model.capabilities == (*answers,)


def test_a_place_where_nothing_can_be_written_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "medium").mkdir()
    for out, error in ((tmp_path / "medium", BundleError), (tmp_path / "absent" / "b", FileNotFoundError)):
        with pytest.raises(error, match=r"OUTPUT_EXISTS|absent"):
            build(make_release(), tmp_path / "no model either", out, inspector=INSPECTOR)
    assert [path.name for path in tmp_path.iterdir()] == ["medium"]


def test_a_folder_of_licences_is_files_of_the_model(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    (model / "LICENSES").mkdir()
    (model / "LICENSES" / "MIT.txt").write_text("Do as you like.")
    manifest = build(make_release(), model, tmp_path / "b", inspector=INSPECTOR)
    assert [licence.member for licence in manifest.licences] == ["licence/LICENSE"]
    assert "LICENSES/MIT.txt" in {file.path for file in manifest.files}


def test_hidden_files_stay_behind_and_a_published_signature_is_kept_byte_for_byte(
    tmp_path: Path, trust: Trust
) -> None:
    model = make_model(tmp_path / "m")
    (model / ".gitattributes").write_text("x")
    (model / "canaries.json").unlink()
    listed = [p.name for p in model.iterdir() if not p.name.startswith(".")]
    resources = [oms.Resource(name, sha256((model / name).read_bytes())) for name in listed]
    published = oms.sign_model("their-name", resources, trust.publisher_key)
    (model / "model.sig").write_bytes(published)
    path = tmp_path / "b"
    manifest = build(make_release(), model, path, inspector=INSPECTOR)
    assert [file.path for file in manifest.files] == sorted(listed)
    sign(path, Signing(trust.root, (trust.release_key,)))
    assert dict(members_of(path))["oms.sig"] == published
    verify(path, trust.root, inspector=INSPECTOR)


def test_signing_refuses_a_key_without_the_role_and_a_damaged_bundle(bundle: Path, trust: Trust) -> None:
    with pytest.raises(BundleError, match="KEY_NOT_IN_ROLE"):
        sign(bundle, Signing(trust.root, (trust.root_key,)))
    chunk = next(name for name, _ in members_of(bundle) if name.startswith("c/"))
    replace_member(bundle, chunk, lambda raw: b"!" + raw[1:])
    before = bundle.read_bytes()
    with pytest.raises(BundleError, match="CHUNK_DIGEST"):
        sign(bundle, Signing(trust.root, (trust.release_key,)))
    assert bundle.read_bytes() == before
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name]


def test_a_new_publisher_s_signature_never_drops_release_signatures(bundle: Path, trust: Trust) -> None:
    before = bundle.read_bytes()
    there = dict(members_of(bundle))["oms.sig"]
    resources = [
        oms.Resource(f.path, f.sha256) for f in verify(bundle, trust.root, inspector=INSPECTOR).manifest.files
    ]
    other = oms.sign_model("tiny", resources, trust.publisher_key)
    for signing in (trust.signing(), Signing(trust.root, (trust.release_key,), oms=other)):
        with pytest.raises(BundleError, match="ALREADY_SIGNED"):
            sign(bundle, signing)
    assert bundle.read_bytes() == before
    sign(bundle, Signing(trust.root, (trust.release_key,), oms=there))
    verify(bundle, trust.root, inspector=INSPECTOR)


def test_equal_and_empty_files_travel(tmp_path: Path, trust: Trust) -> None:
    model = make_model(tmp_path / "m")
    for name in ("a.txt", "b/a.txt"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("same")
    (model / "empty.txt").write_bytes(b"")
    path = tmp_path / "b"
    build(make_release(), model, path, inspector=INSPECTOR)
    sign(path, trust.signing())
    files = {f.path: f for f in verify(path, trust.root, inspector=INSPECTOR).manifest.files}
    assert files["a.txt"].chunks == files["b/a.txt"].chunks
    assert files["empty.txt"].chunks == ()


def test_a_model_card_states_the_licence_where_there_is_no_licence_file(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    (model / "LICENSE").unlink()
    (model / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# It\n")
    (licence,) = build(make_release(), model, tmp_path / "b", inspector=INSPECTOR).licences
    assert (licence.spdx, licence.member) == ("apache-2.0", "licence/README.md")
    (model / "README.md").write_text("# It\nlicense: apache-2.0\n")
    with pytest.raises(BundleError, match="LICENCE_MISSING"):
        build(make_release(), model, tmp_path / "b", inspector=INSPECTOR)
