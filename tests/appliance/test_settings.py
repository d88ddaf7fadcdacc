"""`cloister.toml`: what it may say, how a fault in it is told, and that the processes do what it says."""

import json
import logging
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import grpc
import pytest

from appliance import settings
from appliance.cli import doctor
from appliance.control import limits as control_limits
from appliance.errors import CloisterError
from appliance.gateway import limits as gateway_limits
from appliance.processes import table
from appliance.settings import Settings
from appliance.settings_file import example, load
from tests.e2e.appliance import ROOT, cloister

DOCS = ROOT / "docs"


@pytest.fixture
def home() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def refusal(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(CloisterError) as caught:
        load(path)
    assert (caught.value.code, caught.value.status) == ("CONFIG_INVALID", grpc.StatusCode.FAILED_PRECONDITION)
    return caught.value.message


def test_a_home_without_a_file_and_the_example_both_leave_every_setting_as_it_is(tmp_path: Path) -> None:
    assert load(tmp_path / "none.toml").settings == Settings()
    (tmp_path / "example.toml").write_text(example())
    configuration = load(tmp_path / "example.toml")
    assert configuration.settings == Settings()
    assert {entry.source for entry in configuration.entries()} == {"default"}


def test_the_example_with_its_comments_taken_off_sets_every_setting_to_its_default(tmp_path: Path) -> None:
    lines = [line.removeprefix("# ") if " = " in line else line for line in example().splitlines()]
    (tmp_path / "all.toml").write_text("\n".join(lines))
    configuration = load(tmp_path / "all.toml")
    assert configuration.settings == Settings()
    assert {entry.source for entry in configuration.entries()} == {"file"}
    assert all(len(line) <= 115 for line in lines)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[audit]\nwait_second = 5\n", "audit.wait_second: no such setting; did you mean audit.wait_seconds?"),
        ("listen = 'a:1'\n", "line 1: listen: no such setting; did you mean gateway.listen?"),
        ("[audit]\n\nkept = 1\n", "line 3: audit.kept: no such setting; did you mean logs.kept?"),
        ("[gatway]\nlisten = 'a:1'\n", "line 1: gatway: no such setting; did you mean [gateway]?"),
        ("[gateway]\nmax_streams = 0\n", "gateway.max_streams: is 0, must be a whole number from 1 to 8192"),
        ("[gateway]\nmax_streams = 1.5\n", "is 1.5, must be a whole number"),
        ("[gateway]\nmax_streams = true\n", "is True, must be a whole number"),
        ("[gateway]\nmax_streams = '5'\n", "is '5', must be a whole number"),
        ("[gateway]\nstall_seconds = nan\n", "is nan, must be a number of seconds from 0.1 to 3600"),
        ("[gateway]\nlisten = 'nowhere'\n", "is 'nowhere', must be HOST:PORT"),
        ("[gateway]\nlisten = 'a:99999'\n", "must be HOST:PORT"),
        ("[gateway]\nlisten = '::1:8443'\n", "must be HOST:PORT, an IPv6 host in brackets"),
        ("[gateway]\nadvertise = 'llm.ward.example:8443'\n", "must be a host name or address, IPv6 in brackets"),
        ("[gateway]\nadvertise = '::1'\n", "must be a host name or address, IPv6 in brackets"),
        ("[gateway]\nadvertise = '[llm]'\n", "must be a host name or address, IPv6 in brackets"),
        ("[logs]\nlevel = 'LOUD'\n", "is 'LOUD', must be one of DEBUG, INFO, WARNING, ERROR"),
        ("[import]\nlicences = ['MIT', 'a b']\n", "import.licences.1: is 'a b', must be a list of SPDX"),
        ("[import]\nlicences = 'MIT'\n", "import.licences: is 'MIT', must be a list of SPDX identifiers"),
        ("[import]\nquota_bytes = -1\n", "import.quota_bytes: is -1, must be a whole number of bytes from 0"),
        ("[imports]\nquota = 1\n", "imports: no such setting; did you mean [import]?"),
        ("gateway = 3\n", "line 1: gateway: is a table, [gateway]"),
        ("[logs]\nkept = 1\nkept = 2\n", "not TOML"),
        ("[logs\n", "not TOML"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_line_its_key_and_what_would_do(tmp_path: Path, text: str, told: str) -> None:
    message = refusal(tmp_path / "x.toml", text)
    assert told in message
    assert str(tmp_path / "x.toml") in message


def test_every_fault_of_a_file_is_told_at_once_in_its_order(tmp_path: Path) -> None:
    message = refusal(tmp_path / "x.toml", "[gateway]\nmax_streams = 0\nwhat = 1\n[audit]\nwait_seconds = 99\n")
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:4]] == ["line 2", "line 3", "line 5"]


def test_a_file_that_is_no_text_or_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"[logs]\n\xff\n")
    with pytest.raises(CloisterError, match="not UTF-8 from byte 7 on"):
        load(tmp_path / "x.toml")
    with pytest.raises(CloisterError, match="cannot be read"):
        load(tmp_path)


def test_a_flag_goes_before_the_environment_and_both_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.toml").write_text('[logs]\nlevel = "ERROR"\n[gateway]\nlisten = "a:1"\nmax_streams = 7\n')
    monkeypatch.setenv("CLOISTER_LOG", "DEBUG")
    entries = {e.key: (e.value, e.source) for e in load(tmp_path / "x.toml", {"gateway.listen": "b:2"}).entries()}
    assert entries["logs.level"] == ("DEBUG", "environment")
    assert entries["gateway.listen"] == ("b:2", "flag")
    assert entries["gateway.max_streams"] == (7, "file")
    monkeypatch.setenv("CLOISTER_LOG", "LOUD")
    with pytest.raises(CloisterError, match=r"environment: logs\.level: is 'LOUD'"):
        load(tmp_path / "x.toml")


def test_addresses_of_ipv6_are_taken_in_brackets(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('[gateway]\nlisten = "[::]:8443"\nadvertise = "[fd00::1]"\n')
    found = load(tmp_path / "x.toml").settings.gateway
    assert (found.listen, found.advertise) == ("[::]:8443", "[fd00::1]")


def test_a_process_started_by_itself_has_the_defaults_of_the_file() -> None:
    """The processes know no settings file and no pydantic; their own defaults must not drift from it."""
    known = Settings()
    for limit in fields(gateway_limits.Limits):
        assert getattr(known.gateway, limit.name) == limit.default
    own = control_limits.Limits()
    assert own.audit_wait_seconds == known.audit.wait_seconds
    assert {name: getattr(own, name) for name in type(known.tenants).model_fields} == known.tenants.model_dump()
    assert own.canary_seconds == known.models.canary_seconds


def test_every_setting_reaches_a_process_or_is_used_by_serve_itself(tmp_path: Path) -> None:
    inventory = tmp_path / "recorded.json"
    inventory.touch()
    words: dict[str, str] = {
        "listen": "host:1",
        "advertise": "a-host",
        "inventory": str(inventory),
        "level": "DEBUG",
    }
    changed = {
        section: {name: words.get(name, value if name in words else value + 1) for name, value in values.items()}
        for section, values in Settings().model_dump(by_alias=True, exclude={"imports": {"licences"}}).items()
    }
    changed["import"]["licences"] = ["MIT"]
    changed["gateway"]["max_request_bytes"] = 4096
    before, after = (
        {word for spec in table(known) for word in spec.argv(Path("/h"))}
        for known in (Settings(), Settings.model_validate(changed))
    )
    used_by_serve = {"logs"}
    for section, values in changed.items():
        for name, value in values.items():
            given = value[0] if isinstance(value, list) else value
            reached = any(word.endswith(f"={given}") for word in after - before)
            assert reached or section in used_by_serve, f"{section}.{name} changes nothing"


def test_a_gateway_that_may_drain_for_long_is_not_killed_meanwhile() -> None:
    patient = Settings.model_validate({"gateway": {"drain_seconds": 600.0}})
    (gateway,) = (spec for spec in table(patient) if spec.name == "gateway")
    assert gateway.drain_within > 600
    assert "--drain-seconds=600.0" in gateway.arguments


def test_check_show_and_example_say_what_holds(home: Path) -> None:
    (home / "cloister.toml").write_text("[logs]\nkept = 9\n")
    assert "sets 1 of" in cloister("--home", str(home), "config", "check").stdout
    shown = json.loads(cloister("--home", str(home), "--json", "config", "show", "--listen", "[::1]:9").stdout)
    assert (shown["logs.kept"]["value"], shown["logs.kept"]["source"]) == (9, "file")
    assert (shown["gateway.listen"]["value"], shown["gateway.listen"]["source"]) == ("[::1]:9", "flag")
    assert shown["gateway.drain_seconds"]["unit"] == "seconds"
    assert tomllib.loads(cloister("config", "example").stdout).keys() == dict(settings.sections()).keys()
    (home / "cloister.toml").write_text("[logs]\nkept = -9\n")
    failed = cloister("--home", str(home), "config", "check", expect=3)
    assert failed.stderr.startswith("error: CONFIG_INVALID:")
    assert "line 2: logs.kept: is -9" in failed.stderr


def test_serve_starts_nothing_with_an_invalid_file(home: Path) -> None:
    for name in ("control", "run"):
        (home / name).mkdir(mode=0o700)
    (home / "cloister.toml").write_text("[gateway]\nmax_streams = 'many'\n")
    assert "CONFIG_INVALID" in cloister("--home", str(home), "serve", expect=3).stderr
    assert list((home / "run").iterdir()) == []
    assert not (home / "logs").exists()


@pytest.mark.parametrize("source", ["file", "flag"])
def test_an_inventory_that_engine_host_would_refuse_is_found_before_anything_is_started(
    home: Path, source: str
) -> None:
    recorded = home / "recorded.json"
    recorded.write_text('{"devices": [{"id": "cpu"}]}')
    for name in ("control", "run"):
        (home / name).mkdir(mode=0o700)
    flags = ("--inventory", str(recorded)) if source == "flag" else ()
    if source == "file":
        (home / "cloister.toml").write_text(f'[devices]\ninventory = "{recorded}"\n')
        failed = cloister("--home", str(home), "config", "check", expect=3)
        assert "line 2: devices.inventory: INVENTORY_INVALID: " in failed.stderr
        assert doctor._settings(home).level == "FAIL"
    failed = cloister("--home", str(home), "serve", *flags, expect=3)
    assert failed.stderr.startswith("error: CONFIG_INVALID:")
    assert "device 1 lacks kind" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert list((home / "run").iterdir()) == []
    recorded.write_text(
        '{"devices": [{"id": "cpu", "kind": "cpu", "name": "x", "memory_bytes": 2, "memory_available_bytes": 1}]}'
    )
    cloister("--home", str(home), "config", "show", *flags)


def test_the_documented_settings_are_those_of_the_code() -> None:
    (block,) = (DOCS / "configuration.md").read_text().split("```toml\n")[1:]
    assert block.split("```")[0] == example()


def test_a_level_is_one_that_logging_knows() -> None:
    levels = logging.getLevelNamesMapping()
    field = settings.LogSettings.model_fields["level"]
    assert all(word.strip(",") in levels for word in settings.accepts(field).split()[2:])


def test_the_doctor_finds_a_file_that_serve_would_refuse(home: Path) -> None:
    assert doctor._settings(home).level == "OK"
    (home / "cloister.toml").write_text("[logs]\nkeep = 1\n")
    finding = doctor._settings(home)
    assert (finding.level, finding.check) == ("FAIL", "settings")
    assert "did you mean logs.kept?" in finding.found
