"""`cloister trust` and `cloister bundle`, as an operator types them, with their exit statuses."""

import json
from pathlib import Path

import pytest

from appliance.cli.main import main
from bundles.content import inspector
from bundles.format.errors import exit_status_of
from bundles.trust.keys import save_private_key
from bundles.trust.signers import new_signer
from tests.bundles.making import INSPECTOR, make_model, make_root, members_of, replace_member


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
        "revocation.key": 0o600,
    }
    shown = _json(capsys, "trust", "show", keys / "root.json")
    assert {name: role["threshold"] for name, role in shown["roles"].items()} == {  # type: ignore[attr-defined]  # JSON
        "root": 1,
        "release": 1,
        "publisher": 1,
        "revocation": 1,
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


def test_two_holders_of_release_keys_sign_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {name: new_signer("ed25519") for name in ("root", "first", "second")}
    made["publisher"] = new_signer("ecdsa-sha2-nistp384")
    for name, key in made.items():
        save_private_key(key.private, tmp_path / f"{name}.key")
    roles = {
        "root": [made["root"]],
        "release": [made["first"], made["second"]],
        "publisher": [made["publisher"]],
    }
    root = tmp_path / "root.json"
    root.write_bytes(make_root(1, roles, {"release": 2}).raw)
    out = _build(tmp_path)
    publisher = ("--publisher-key", tmp_path / "publisher.key")
    first, second = (("--release-key", tmp_path / f"{name}.key") for name in ("first", "second"))
    assert _json(capsys, "bundle", "sign", out, "--root", root, *publisher, *first)["threshold"] == 2
    assert _run("bundle", "sign", out, "--root", root, *publisher, *second) == 2
    assert "error: ALREADY_SIGNED: " in capsys.readouterr().err
    assert _run("bundle", "verify", out, "--root", root) == 3
    assert "SIGNATURE_THRESHOLD" in capsys.readouterr().err
    assert len(_signers(_json(capsys, "bundle", "sign", out, "--root", root, *second))) == 2
    assert len(_signers(_json(capsys, "bundle", "verify", out, "--root", root))) == 2


def _signers(value: dict[str, object]) -> list[str]:
    signers = value["signers"]
    assert isinstance(signers, list)
    return signers


def test_a_target_is_told_and_judged_where_an_appliance_is_named(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = _build(tmp_path, "--target", "ward-3", *_signing(keys))
    verify = ("bundle", "verify", out, "--root", keys / "root.json")
    capsys.readouterr()
    assert _run(*verify) == 0
    assert "for           ward-3\n" in capsys.readouterr().out
    assert _run(*verify, "--appliance", "ward-3") == 0
    assert _run(*verify, "--appliance", "ward-4") == 3
    assert "error: WRONG_TARGET: " in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-5", "36501", "99999999", "1e3", "\u0665x"])
def test_a_number_of_days_beyond_reason_is_bad_usage_and_leaves_nothing(tmp_path: Path, number: str) -> None:
    model = make_model(tmp_path / "m")
    words = ("--model", model, "--name", "x", "--version", "1", "--sequence", "1", "--out", tmp_path / "b")
    for command in (
        ("trust", "init", "--out", tmp_path / "keys", f"--days={number}"),
        ("bundle", "build", *words, f"--expires-days={number}"),
    ):
        with pytest.raises(SystemExit) as ended:
            _run(*command)
        assert ended.value.code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_an_exit_status_tells_a_failure_from_a_slip_from_a_refusal(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ("--root", keys / "root.json")
    model = make_model(tmp_path / "m")

    def build(name: str, sequence: str, model: Path = model) -> int:
        words = ("--name", name, "--version", "1", "--sequence", sequence, "--out", tmp_path / "b")
        return _run("bundle", "build", "--model", model, *words)

    assert _run("bundle", "verify", tmp_path / "absent", *root) == 1
    assert _run("bundle", "verify", "/dev/null", *root) == 1
    assert _run("trust", "show", tmp_path / "absent") == 1
    assert build("Bad Name", "1") == build("x", "0") == build("x", str(2**53)) == 2
    assert build("x", "1", tmp_path / "absent") == 1
    (model / "evil.py").write_text("")
    assert build("x", "1") == 3
    assert "INTERNAL" not in capsys.readouterr().err
    codes = ("STORE_SPACE", "STORE_IO", "INTERRUPTED", "INTERNAL", "ROLLBACK_REFUSED", "UNSUPPORTED_ARCHITECTURE")
    assert [exit_status_of(code) for code in codes] == [1, 1, 1, 1, 3, 3]
