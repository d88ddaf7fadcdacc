"""The command line against a real control process on a fresh home: what operators type, and what comes of it."""

import getpass
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.cli import liveness
from appliance.cli.main import main

Cloister = Callable[..., str]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A home made by `cloister init`, with control alone running on it."""
    folder = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    path = folder / "home"
    words = ["--home", str(path), "init", "--operator", f"alice={getpass.getuser()}", "--site", "test"]
    subprocess.run([sys.executable, "-m", "appliance.cli.main", *words, "--profile", "demo"], check=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(folder / "notify"))
        notify.settimeout(30)
        control = subprocess.Popen(
            [sys.executable, "-m", "appliance.control", "--home", str(path)],
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify")},
            stderr=subprocess.DEVNULL,
        )
        try:
            while b"READY=1" not in notify.recv(4096):
                assert control.poll() is None
            yield path
        finally:
            control.send_signal(signal.SIGTERM)
            assert control.wait(30) == 0
            shutil.rmtree(folder)


@pytest.fixture
def cloister(home: Path, capsys: pytest.CaptureFixture[str]) -> Cloister:
    """Runs a command; what it printed, errors included."""

    def run(*words: str, expect: int = 0) -> str:
        status = main(["--home", str(home), *words])
        printed = capsys.readouterr()
        assert status == expect, printed.err
        return printed.err if expect else printed.out

    return run


def parsed(text: str) -> Any:
    return json.loads(text)


def test_a_tenant_is_added_changed_suspended_and_listed(cloister: Cloister) -> None:
    added = parsed(cloister("tenant", "add", "claims", "--max-concurrent", "8", "--weight", "200", "--json"))
    assert (added["name"], added["max_concurrent"], added["weight"], added["suspended"]) == (
        "claims",
        8,
        200,
        False,
    )
    changed = parsed(cloister("tenant", "set", "claims", "--weight", "50", "--json"))
    assert (changed["max_concurrent"], changed["weight"]) == (8, 50)
    assert parsed(cloister("tenant", "suspend", "claims", "--json"))["suspended"] is True
    assert parsed(cloister("tenant", "suspend", "claims", "--resume", "--json"))["suspended"] is False
    listed = cloister("tenant", "list").splitlines()
    assert listed[0].split() == [
        "TENANT",
        "MODELS",
        "OPEN",
        "CONCURRENT",
        "WEIGHT",
        "USED",
        "RESERVED",
        "SUSPENDED",
    ]
    assert ["claims", "-", "0", "8", "50", "0", "0", "no"] in [line.split() for line in listed]


def test_a_change_without_a_change_is_bad_usage(cloister: Cloister) -> None:
    assert "BAD_USAGE" in cloister("tenant", "set", "claims", expect=2)


@pytest.mark.parametrize("number", ["0", "-1", "x", "99999999999"])
def test_a_limit_that_is_no_number_above_zero_is_bad_usage(cloister: Cloister, number: str) -> None:
    with pytest.raises(SystemExit) as end:
        cloister("tenant", "add", "t", "--weight", number)
    assert end.value.code == 2


def test_a_refusal_is_a_line_with_its_code_or_json(cloister: Cloister) -> None:
    line = cloister("tenant", "add", "Not A Name", expect=2)
    assert line.startswith("error: INVALID_NAME: ")
    error = parsed(cloister("tenant", "add", "Not A Name", "--json", expect=2))["error"]
    assert error["code"] == "INVALID_NAME"


def test_an_issued_key_lies_in_private_files_and_its_secret_is_shown_nowhere(
    cloister: Cloister, tmp_path: Path
) -> None:
    cloister("tenant", "add", "wards")
    out = tmp_path / "credentials"
    printed = cloister("key", "issue", "--tenant", "wards", "--app", "summary", "--out", str(out),
                       "--address", "localhost:1", "--json")  # fmt: skip
    issued = parsed(printed)
    secret = (out / "api.key").read_text().strip()
    assert secret not in printed
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert {stat.S_IMODE((out / name).stat().st_mode) for name in ("client.key", "api.key")} == {0o600}
    assert (out / "address").read_text() == "localhost:1\n"
    listed = cloister("key", "list", "--tenant", "wards", "--json")
    assert secret not in listed
    assert [(k["key_id"], k["application"], k["state"]) for k in parsed(listed)] == [
        (issued["key_id"], "summary", "active")
    ]
    cloister("key", "revoke", issued["key_id"])
    assert "revoked" in cloister("key", "list", "--tenant", "wards")


def test_a_key_is_not_issued_into_a_directory_that_has_one(cloister: Cloister, tmp_path: Path) -> None:
    cloister("tenant", "add", "twice")
    words = ("key", "issue", "--tenant", "twice", "--app", "a", "--out", str(tmp_path / "c"))
    cloister(*words)
    assert "CREDENTIALS_EXIST" in cloister(*words, expect=1)
    assert len(parsed(cloister("key", "list", "--tenant", "twice", "--json"))) == 1


def test_no_key_is_issued_for_files_that_cannot_be_written(cloister: Cloister, tmp_path: Path) -> None:
    cloister("tenant", "add", "nowhere")
    (tmp_path / "file").touch()
    words = ("key", "issue", "--tenant", "nowhere", "--app", "a", "--out")
    assert "ENOTDIR" in cloister(*words, str(tmp_path / "file" / "c"), expect=1)
    assert parsed(cloister("key", "list", "--tenant", "nowhere", "--json")) == []


def test_a_key_whose_files_could_not_be_written_is_revoked_and_leaves_none(
    cloister: Cloister, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up half-way: the proto that goes last cannot be copied."""
    cloister("tenant", "add", "unlucky")
    monkeypatch.setattr("appliance.client.credentials._PROTO_SOURCE", tmp_path / "absent")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine").touch()
    words = ("key", "issue", "--tenant", "unlucky", "--app", "a", "--out", str(tmp_path / "c"))
    assert "ENOENT" in cloister(*words, expect=1)
    states = [key["state"] for key in parsed(cloister("key", "list", "--tenant", "unlucky", "--json"))]
    assert states == ["revoked"]
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["mine"]


def test_a_refused_key_leaves_no_folder(cloister: Cloister, tmp_path: Path) -> None:
    cloister("key", "issue", "--tenant", "absent", "--app", "a", "--out", str(tmp_path / "c"), expect=1)
    assert not (tmp_path / "c").exists()


def test_the_doctor_names_what_does_not_answer_and_what_does(home: Path) -> None:
    finding = liveness.check(home)
    assert finding.level == "FAIL"
    for fact in ("importer: not running", "engine-host: not running", "gateway: has not been heard"):
        assert fact in finding.found
    assert finding.found.endswith("answered: control")


def test_status_shows_what_is_missing(cloister: Cloister) -> None:
    status = parsed(cloister("status", "--json"))
    assert {p["name"]: p["connected"] for p in status["peers"]} == {"importer": False, "engine-host": False}
    assert (status["operator"], status["isolation"], status["gateway_address"]) == ("alice", "none", "")
    text = cloister("status")
    assert "NOT CONNECTED" in text
    assert "not up" in text


def test_lists_of_nothing_say_what_to_do(cloister: Cloister) -> None:
    assert "cloister model load" in cloister("model", "list")
    assert cloister("alias", "list") == "no aliases\n"
    assert parsed(cloister("alias", "list", "--json")) == []


def test_an_alias_of_nothing_is_refused(cloister: Cloister) -> None:
    assert cloister("alias", "set", "notes", "absent", expect=1).startswith("error: ")


def test_what_needs_the_importer_says_that_it_is_not_there(cloister: Cloister) -> None:
    assert cloister("bundle", "list", expect=4).startswith("error: ")
