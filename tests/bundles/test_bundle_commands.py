"""`cloister trust` and `cloister bundle`, as an operator types them, with their exit statuses."""

import json
from pathlib import Path

import pytest

from appliance.cli.main import main
from bundles.content import inspector
from tests.bundles.making import INSPECTOR, make_model, members_of, replace_member


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspector.Inspector.__init__, "__defaults__", (INSPECTOR.command, 120.0, 60, 8 * 2**30))


def _json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, object]:
    capsys.readouterr()
    assert main(["--json", *map(str, words)]) == 0
    value: dict[str, object] = json.loads(capsys.readouterr().out)
    return value


def _run(*words: str | Path) -> int:
    return main([*map(str, words)])


@pytest.fixture
def keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    _json(capsys, "trust", "init", "--out", tmp_path / "keys")
    return tmp_path / "keys"


def _build(tmp_path: Path, *more: str | Path) -> Path:
    model = tmp_path / "m"
    if not model.exists():
        make_model(model)
    out = tmp_path / "b.bundle"
    words = ("--model", model, "--name", "tiny", "--version", "1", "--sequence", "1", "--out", out)
    assert _run("bundle", "build", *words, *more) == 0
    return out


def _signing(keys: Path) -> tuple[str | Path, ...]:
    release, publisher = keys / "release.key", keys / "publisher.key"
    return ("--root", keys / "root.json", "--release-key", release, "--publisher-key", publisher)


def test_trust_init_makes_private_keys_for_their_owner_alone_and_never_overwrites(
    keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {p.name: p.stat().st_mode & 0o777 for p in keys.glob("*.key")} == {
        "root.key": 0o600,
        "release.key": 0o600,
        "publisher.key": 0o600,
    }
    shown = _json(capsys, "trust", "show", keys / "root.json")
    assert {name: role["threshold"] for name, role in shown["roles"].items()} == {  # type: ignore[attr-defined]  # JSON
        "root": 1,
        "release": 1,
        "publisher": 1,
    }
    before = (keys / "root.key").read_bytes()
    assert _run("trust", "init", "--out", keys) == 1
    assert (keys / "root.key").read_bytes() == before


def test_building_then_signing_is_building_signed(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = keys / "root.json"
    out = _build(tmp_path)
    assert _run("bundle", "verify", out, "--root", root) == 3
    assert "SIGNATURE_MISSING" in capsys.readouterr().err
    assert _run("bundle", "sign", out, *_signing(keys)) == 0
    verified = _json(capsys, "bundle", "verify", out, "--root", root)
    assert verified["verified"] is True
    assert verified["model_version"] == "tiny@1"
    out.unlink()
    _build(tmp_path, *_signing(keys))
    assert _run("bundle", "verify", out, "--root", root) == 0
    assert "VERIFIED against root of trust 1" in capsys.readouterr().out


def test_inspect_says_plainly_what_may_be_believed(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = _build(tmp_path, *_signing(keys))
    capsys.readouterr()
    assert _run("bundle", "inspect", out) == 0
    assert capsys.readouterr().out.startswith("NOT VERIFIED: no root of trust was given")
    assert _run("bundle", "inspect", out, "--root", keys / "root.json") == 0
    assert "signatures VERIFIED against root of trust 1; chunks were not read" in capsys.readouterr().out
    seen = _json(capsys, "bundle", "inspect", out)
    assert seen["verified"] is False
    assert _run("trust", "init", "--out", tmp_path / "other") == 0
    capsys.readouterr()
    assert _run("bundle", "inspect", out, "--root", tmp_path / "other" / "root.json") == 3
    assert "NOT VERIFIED: ROOT_FORKED" in capsys.readouterr().out


def test_a_tampered_bundle_is_refused_with_status_3_and_a_code(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = _build(tmp_path, *_signing(keys))
    chunk = [name for name, _ in members_of(out) if name.startswith("c/")][-1]
    replace_member(out, chunk, lambda raw: b"!" + raw[1:])
    assert _run("bundle", "verify", out, "--root", keys / "root.json") == 3
    assert "error: CHUNK_DIGEST: " in capsys.readouterr().err


def test_signing_without_a_root_is_bad_usage(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "m")
    words = ("--model", model, "--name", "x", "--version", "1", "--sequence", "1", "--out", tmp_path / "b")
    assert _run("bundle", "build", *words, "--release-key", keys / "release.key") == 2
    assert not (tmp_path / "b").exists()
    assert "--root" in capsys.readouterr().err
