"""`init`: a complete home once, or nothing that stands in the way of trying again."""

import fcntl
import json
import os
import pwd
import shutil
import socket
import sqlite3
import stat
from pathlib import Path

import pytest
from cryptography import x509

from appliance.control import init
from appliance.control.audit import load_public_key
from appliance.control.audit.verification import verify
from appliance.control.init import main

USER = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    (tmp_path / "root.json").write_text('{"signed": {}}')
    return ["--home", str(tmp_path / "home"), "--operator", f"alice={USER}", "--site", "test", "--profile", "demo",
            "--listen-name", "box.site", "--root", str(tmp_path / "root.json"), "--json"]  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def changed(argv: list[str], option: str, value: str) -> list[str]:
    at = argv.index(option) + 1
    return [*argv[:at], value, *argv[at + 1 :]]


def test_a_home_is_made_whole_and_private(
    argv: list[str], home: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(argv) == 0
    facts = json.loads(capfd.readouterr().out)
    assert {p.name for p in home.iterdir()} == {
        "run",
        "control",
        "gateway",
        "trust",
        "store",
        "logs",
        "cloister.toml",
    }
    for path in home.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path.suffix == ".pub", path
    assert (home / "trust" / "1.root.json").read_bytes() == (tmp_path / "root.json").read_bytes()
    certificate = x509.load_pem_x509_certificate((home / "gateway" / "tls.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"localhost", "box.site", socket.gethostname()} <= set(names.get_values_for_type(x509.DNSName))
    assert {"127.0.0.1", "::1"} == {str(a) for a in names.get_values_for_type(x509.IPAddress)}
    control = home / "control"
    verdict = verify(
        control / "audit.db", control / "audit.head", load_public_key(control / "keys" / "audit-head.pub")
    )
    assert (verdict.intact, verdict.size) == (True, 1)
    genesis = json.loads(sqlite3.connect(control / "audit.db").execute("SELECT body FROM rec").fetchone()[0])
    assert (genesis["kind"], genesis["facts"]["profile"]) == ("appliance.genesis", "demo")
    assert genesis["facts"]["ca_sha256"] == facts["ca_sha256"]


def test_no_private_key_is_printed(argv: list[str], home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    printed = "".join(capfd.readouterr())
    for path in home.rglob("*.key"):
        content = path.read_bytes()
        assert content.hex() not in printed
        assert not content.isascii() or content.decode() not in printed


def test_a_second_init_is_refused_and_changes_nothing(
    argv: list[str], home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main(argv)
    before = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    assert main(argv) == 3
    assert "ALREADY_INITIALISED" in capfd.readouterr().err
    assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("step", ["issue_server", "_fill_database", "_fill_audit", "_move"])
def test_an_interrupted_init_can_be_run_again(
    argv: list[str], home: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = init.Authority if step == "issue_server" else init
    original, calls = getattr(owner, step), []

    def power_cut(*args: object) -> object:
        calls.append(args)
        if step == "_move" and len(calls) < 4:
            return original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, step, power_cut)
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    assert not (home / "control").exists()
    monkeypatch.undo()
    assert main(argv) == 0
    assert {p.name for p in home.iterdir()} == {
        "run",
        "control",
        "gateway",
        "trust",
        "store",
        "logs",
        "cloister.toml",
    }
    assert (home / "trust" / "1.root.json").exists()


@pytest.mark.parametrize(
    ("option", "value", "status", "code"),
    [
        ("--operator", "alice", 2, "USER_UNKNOWN"),
        ("--operator", "alice=no-such-user", 2, "USER_UNKNOWN"),
        ("--operator", f"Alice={USER}", 2, "INVALID_NAME"),
        ("--operator", f"alice={os.getuid() + 1}", 3, "OPERATOR_NOT_CREATOR"),
        ("--site", "a b", 2, "INVALID_NAME"),
        ("--listen-name", "a\nb", 2, "INVALID_NAME"),
        ("--root", "/nonexistent", 2, "TRUST_ROOT_UNREADABLE"),
    ],
)
def test_bad_words_are_refused_before_anything_is_made(
    argv: list[str], home: Path, capfd: pytest.CaptureFixture[str], option: str, value: str, status: int, code: str
) -> None:
    assert main(changed(argv, option, value)) == status
    assert code in capfd.readouterr().err
    assert not home.exists()


def test_the_appliance_of_a_system_is_never_root_s(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    words = changed(changed(argv, "--home", "/var/lib/cloister-none"), "--operator", "alice=0")
    assert main(words) == 3
    assert "OPERATOR_IS_ROOT" in capfd.readouterr().err
    assert not Path("/var/lib/cloister-none").exists()


def test_while_a_process_answers_in_the_home_init_is_refused(
    argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    import tempfile

    home = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    try:
        (home / "run").mkdir()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(home / "run" / "importer.sock"))
            sock.listen()
            assert main(changed(argv, "--home", str(home))) == 3
        assert "RUNNING" in capfd.readouterr().err
        assert [p.name for p in home.iterdir()] == ["run"]
    finally:
        shutil.rmtree(home)


def test_two_inits_at_once_do_not_make_one_home(
    argv: list[str], home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home.mkdir()
    descriptor = os.open(home, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert main(argv) == 3
    finally:
        os.close(descriptor)
    assert "INIT_RUNNING" in capfd.readouterr().err
    assert list(home.iterdir()) == []


def test_what_somebody_else_put_into_the_home_is_not_overwritten(
    argv: list[str], home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (home / "gateway").mkdir(parents=True)
    (home / "gateway" / "precious").write_text("mine")
    assert main(argv) == 3
    assert "HOME_NOT_EMPTY" in capfd.readouterr().err
    assert (home / "gateway" / "precious").read_text() == "mine"
