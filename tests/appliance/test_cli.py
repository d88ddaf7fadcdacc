"""The frame of the command line: help, global options, exit statuses, and what may reach a terminal."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from admin_tui.terminal import Terminal
from appliance.cli import doctor, failure, liveness, model_activate, output
from appliance.cli.doctor import CHECKS
from appliance.cli.finding import Finding
from appliance.cli.main import NOUNS, _noun_of, build_parser, main
from appliance.cli.progress import ProgressBar
from appliance.errors import CloisterError
from appliance.protos import admin_pb2, inference_pb2

HEAVY = (
    "grpc",
    "torch",
    "sqlalchemy",
    "cryptography",
    "google.protobuf",
    "asyncio",
    "pydantic",
    "numpy",
    "jinja2",
)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom appliance.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert all(noun in done.stdout for noun in NOUNS)


@pytest.mark.parametrize("noun", sorted(NOUNS))
def test_every_command_has_help_and_takes_json(noun: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Leaf verbs are found by walking the parser, so a new verb is covered by being there."""
    parser = build_parser(noun)
    leaves = list(_leaves(parser, noun))
    assert leaves
    for words in leaves:
        with pytest.raises(SystemExit) as end:
            build_parser(noun).parse_args([*words, "--help"])
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert "--json" in shown
        assert "--home" in shown


def _leaves(parser: object, noun: str) -> "list[list[str]]":
    def groups(p: object) -> list[dict[str, object]]:
        return [a.choices for a in p._actions if type(a).__name__ == "_SubParsersAction"]  # type: ignore[attr-defined]  # argparse names none of this

    def walk(p: object, words: list[str]) -> list[list[str]]:
        below = [walk(child, [*words, name]) for group in groups(p) for name, child in group.items()]
        return [leaf for leaves in below for leaf in leaves] if below else [words]

    return walk(groups(parser)[0][noun], [noun])


@pytest.mark.parametrize("folder", ["appliance", "bundles", "engine", "demo", "docs", "README.md", "install.sh"])
def test_every_command_that_a_text_of_ours_names_exists(folder: str) -> None:
    """Messages, help and documentation say what to type next; `cloister NOUN VERB` must be a command."""
    commands = {tuple(leaf) for noun in NOUNS for leaf in _leaves(build_parser(noun), noun)}
    known = {command[:length] for command in commands for length in (1, 2)}
    place = Path(__file__).parents[2] / folder
    paths = [place] if place.is_file() else [p for p in place.rglob("*") if p.suffix in (".py", ".md", ".proto")]
    for path in paths:
        for noun, verb in re.findall(r"`cloister ([a-z]+)(?: ([a-z]+))?[^`]*`", path.read_text()):
            nested = (noun,) not in commands
            assert ((noun, verb) if nested and verb else (noun,)) in known, f"{path}: cloister {noun} {verb}"


@pytest.mark.parametrize(
    "words",
    [
        ["--home", "/x", "version", "--json"],
        ["--json", "version", "--home", "/x"],
        ["--home=/x", "--json", "version"],
    ],
)
def test_global_options_hold_before_and_after_the_verb(words: list[str]) -> None:
    args = build_parser("version").parse_args(words)
    assert (args.home, args.json) == (Path("/x"), True)
    assert _noun_of(words) == "version"


def test_the_home_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOISTER_HOME", "/from/env")
    assert build_parser("version").parse_args(["version"]).home == Path("/from/env")


def test_a_noun_as_a_value_of_home_is_not_the_noun() -> None:
    assert _noun_of(["--home", "model", "version"]) == "version"


@pytest.mark.parametrize("words", [["nonsense"], ["model"], ["version", "--nonsense"], ["serve", "--listen", "x"]])
def test_bad_usage_exits_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "usage: cloister" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--home", "/x\udcff", "version"],
        ["tenant", "add", "name\udcff"],
        ["chat", "m", "text", "--seed", "9" * 23],
        ["chat", "m", "text", "--seed", str(1 << 64)],
        ["chat", "m", "text", "--top-k", "-1"],
        ["chat", "m", "text", "--max-tokens", "9" * 5000],
        ["chat", "m", "text", "--temperature", "nan"],
        ["chat", "m", "text", "--timeout", "1e30"],
        ["status", "--wait", "0"],
        ["init", "--site", "x", "--operator", "alice="],
    ],
)
def test_a_word_that_does_not_fit_is_bad_usage_and_no_defect(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert "usage: cloister" in printed
    assert "INTERNAL" not in printed


def test_the_largest_seed_fits() -> None:
    assert build_parser("chat").parse_args(["chat", "m", "t", "--seed", str((1 << 64) - 1)]).seed == (1 << 64) - 1


def test_a_home_in_the_environment_that_is_no_text_is_bad_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLOISTER_HOME", "/x\udcff")
    with pytest.raises(SystemExit) as end:
        main(["status"])
    assert end.value.code == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_standard_input_that_is_no_text_is_bad_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    assert main(["chat", "notes", "-", "--credentials", str(tmp_path)]) == 2
    assert "byte 1 is 0xff" in capsys.readouterr().err


def test_an_operator_without_a_user_is_told_how_to_name_oneself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["init", "--site", "x", "--operator", "alice="])
    assert "alice=$(id -un)" in capsys.readouterr().err


def test_no_command_at_all_shows_help_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


def test_version_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cloister"]


class RefusalError(Exception):
    code = "SIGNATURE_INVALID"
    exit_status = 3


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (CloisterError("NOT_RUNNING", "x", grpc.StatusCode.INTERNAL), "NOT_RUNNING", 4),
        (CloisterError("UNAVAILABLE", "x", grpc.StatusCode.UNAVAILABLE), "UNAVAILABLE", 4),
        (CloisterError("A", "x", grpc.StatusCode.PERMISSION_DENIED), "A", 3),
        (CloisterError("A", "x", grpc.StatusCode.UNAUTHENTICATED), "A", 3),
        (CloisterError("A", "x", grpc.StatusCode.FAILED_PRECONDITION), "A", 3),
        (CloisterError("A", "x", grpc.StatusCode.DATA_LOSS), "A", 3),
        (CloisterError("A", "x", grpc.StatusCode.NOT_FOUND), "A", 1),
        (CloisterError("CREDENTIALS_MISSING", "x", grpc.StatusCode.FAILED_PRECONDITION), "CREDENTIALS_MISSING", 1),
        (CloisterError("INVALID_NAME", "x", grpc.StatusCode.INVALID_ARGUMENT), "INVALID_NAME", 2),
        (CloisterError("NOT_INITIALISED", "x"), "NOT_INITIALISED", 1),
        (RefusalError("bad"), "SIGNATURE_INVALID", 3),
        (failure.UsageError("x"), "BAD_USAGE", 2),
        (FileNotFoundError(2, "No such file", "/x"), "ENOENT", 1),
        (ConnectionRefusedError(111, "refused"), "ECONNREFUSED", 4),
        (RuntimeError("x"), "INTERNAL", 1),
    ],
)
def test_an_error_has_one_exit_status(error: Exception, code: str, status: int) -> None:
    found = failure.describe(error)
    assert (found.code, found.exit_status) == (code, status)


def test_errors_are_one_line_or_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    failed = failure.Failure("CODE", "what\x1b[2Jwas wrong", 3, {"limit": "1"})
    output.emit_error(False, failed)
    output.emit_error(True, failed)
    text, line = capsys.readouterr().err.splitlines()
    assert text == "error: CODE: what\\x1b[2Jwas wrong"
    assert json.loads(line) == {
        "error": {"code": "CODE", "message": "what\x1b[2Jwas wrong", "metadata": {"limit": "1"}}
    }


def test_an_appliance_that_does_not_run_is_not_reachable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--home", str(tmp_path), "status"]) == 4
    assert capsys.readouterr().err.startswith("error: NOT_RUNNING: ")


def test_a_reader_that_went_away_is_no_error() -> None:
    command = f"{sys.executable} -m appliance.cli.main version --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.strip() in {"0", "141"}


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("a\rb\x08", "a\\x0db\\x08"),
        ("txt.\u202eexe", "txt.\\u202eexe"),
        ("\u2066x\u2069\u200f\ufeff", "\\u2066x\\u2069\\u200f\\ufeff"),
        ("file\udcff", "file\\udcff"),
        ("Zoë 日本 👍", "Zoë 日本 👍"),
    ],
)
def test_foreign_text_cannot_command_a_terminal(hostile: str, shown: str) -> None:
    assert output.printable(hostile) == shown
    assert output.printable_text(hostile) == shown


def test_an_answer_keeps_its_newlines_and_tabs_and_a_name_does_not() -> None:
    assert output.printable_text("a\n\tb") == "a\n\tb"
    assert output.printable("a\n\tb") == "a\\x0a\\x09b"


def test_no_control_character_survives() -> None:
    everything = "".join(map(chr, range(0x110000)))
    shown = output.printable(everything)
    assert not [c for c in shown if ord(c) < 32 or 127 <= ord(c) < 160]


def test_json_for_programs_is_plain_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit(Namespace(json=True), {"name": "\x1b\u202e"}, "")
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert "\x1b" not in printed
    assert json.loads(printed) == {"name": "\x1b\u202e"}


def test_a_table_aligns_numbers_right_and_spells_out_controls() -> None:
    assert output.table(("name", "n"), [("a\x1b", 1), ("bb", 1234), ("", 5)]) == (
        "NAME       N\na\\x1b      1\nbb     1,234\n-          5"
    )


def test_messages_become_plain_values() -> None:
    tenant = admin_pb2.Tenant(name="t", models=["a"], tokens_used=1 << 60)
    tenant.created_at.FromSeconds(0)
    assert output.plain(tenant) == {
        "name": "t",
        "models": ["a"],
        "max_concurrent": 0,
        "weight": 0,
        "suspended": False,
        "created_at": "1970-01-01T00:00:00Z",
        "tokens_used": 1 << 60,
        "tokens_reserved": 0,
        "requests_open": 0,
    }
    assert output.plain(inference_pb2.Receipt(leaf_hash=b"\xab"))["leaf_hash"] == "ab"
    assert output.plain(inference_pb2.GenerateRequest(text=""))["text"] == ""
    assert "token_ids" not in output.plain(inference_pb2.GenerateRequest(text=""))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def bar(columns: int = 80, tty: bool = True, utf8: bool = False) -> tuple[ProgressBar, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return ProgressBar(stream, Terminal(tty, columns, utf8, False), clock), stream, clock


def test_progress_shows_bytes_rate_time_left_file_and_state() -> None:
    progress, stream, clock = bar(columns=100)
    clock.now = 2.0
    progress.update("streaming", 50 << 20, 150 << 20, "model.safetensors")
    painted = stream.getvalue()
    assert painted.startswith("\r[#####..........] streaming")
    for fact in ("33%", "50.0 MiB of 150.0 MiB", "25.0 MiB/s", "0:04 left", "model.safetensors"):
        assert fact in painted


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_progress_never_fills_the_last_column(columns: int) -> None:
    progress, stream, clock = bar(columns, utf8=True)
    for done in range(10):
        clock.now += 1
        progress.update(
            "streaming", done << 20, 10 << 20, "a/very/long/name/of/a/file/model-00001-of-00002.safetensors"
        )
    assert max(len(line) for line in stream.getvalue().split("\r")) < columns


def test_progress_repaints_at_most_ten_times_a_second_but_never_hides_a_state() -> None:
    progress, stream, clock = bar()
    for number in range(100):
        clock.now = number / 1000
        progress.update("streaming", number, 1000)
    progress.update("committed", 1000, 1000)
    assert stream.getvalue().count("\r") == 2
    assert "committed" in stream.getvalue()


def test_progress_into_a_file_is_a_line_for_each_state_without_carriage_returns() -> None:
    progress, stream, clock = bar(tty=False)
    for state in ("quarantine", "signed", "streaming", "streaming", "committed"):
        clock.now += 0.1
        progress.update(state, 0, 10)
    progress.close()
    assert "\r" not in stream.getvalue()
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == [
        "quarantine", "signed", "streaming", "committed",
    ]  # fmt: skip


def test_progress_does_not_obey_a_file_name() -> None:
    progress, stream, _ = bar()
    progress.update("streaming", 1, 2, "\x1b[2J")
    assert "\x1b" not in stream.getvalue()


def test_a_finding_of_the_doctor_that_is_not_ok_has_a_remedy(tmp_path: Path) -> None:
    findings = [check(tmp_path) for check in CHECKS]
    assert all(isinstance(f, Finding) and (f.level == "OK") == (f.remedy == "") for f in findings)
    by_name = {f.check: f for f in findings}
    assert by_name["home"].remedy == "run `cloister init`"
    assert by_name["processes"].level == "WARN"


def test_the_doctor_refuses_a_home_that_others_can_enter(tmp_path: Path) -> None:
    for name in ("run", "control"):
        (tmp_path / name).mkdir()
    tmp_path.chmod(0o700)
    (tmp_path / "control").chmod(0o755)
    (tmp_path / "run").chmod(0o700)
    finding = doctor._home(tmp_path)
    assert finding.level == "FAIL"
    assert finding.remedy.endswith(f"chmod 0700 {tmp_path / 'control'}")


def test_the_doctor_refuses_a_home_too_long_for_sockets(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90)
    assert doctor._sockets(long).level == "FAIL"
    assert liveness.check(long).found.startswith("none answers")


def test_serve_refuses_a_home_that_was_never_initialised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--home", str(tmp_path), "serve"]) == 1
    assert "NOT_INITIALISED" in capsys.readouterr().err


def test_serve_refuses_a_home_whose_sockets_would_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / ("x" * 90)
    for name in ("run", "control"):
        (home / name).mkdir(parents=True)
    assert main(["--home", str(home), "serve"]) == 1
    assert "PATH_TOO_LONG" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["127.0.0.1:{port}", "no-such-host.invalid:1", "x" * 64 + ":1"])
def test_serve_starts_nothing_when_it_cannot_listen(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="cl-", dir="/tmp") as home,
        socket.create_server(("127.0.0.1", 0)) as taken,
    ):
        for name in ("run", "control"):
            (Path(home) / name).mkdir()
        address = where.format(port=taken.getsockname()[1])
        assert main(["--home", home, "serve", "--listen", address]) == 1
        assert list((Path(home) / "logs").iterdir()) == []
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: ADDRESS_UNUSABLE: cannot listen on {address}: ")


def test_waiting_for_an_appliance_that_does_not_come_ends_in_time_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--home", str(tmp_path), "status", "--wait", "0.01"]) == 4
    assert "NOT_READY: after 0.01 s not connected: control" in capsys.readouterr().err


def test_a_process_that_takes_connections_and_says_nothing_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(liveness, "_ANSWER_S", 0.2)
    with tempfile.TemporaryDirectory(prefix="cl-", dir="/tmp") as home, socket.socket(socket.AF_UNIX) as mute:
        (Path(home) / "run").mkdir()
        mute.bind(f"{home}/run/importer.sock")
        mute.listen()
        finding = liveness.check(Path(home))
    assert finding.level == "FAIL"
    assert "importer: does not answer" in finding.found
    assert "engine-host: not running" in finding.found
    assert "answered:" not in finding.found


def test_chat_without_credentials_is_bad_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CLOISTER_CREDENTIALS", raising=False)
    assert main(["chat", "notes", "hello"]) == 2
    assert "--credentials" in capsys.readouterr().err


@pytest.mark.parametrize("noun", ["chat", "generate"])
def test_the_text_may_stand_before_or_after_the_options(noun: str) -> None:
    for words in (["m", "text", "--seed", "1"], ["m", "--seed", "1", "text"], ["--seed", "1", "m", "text"]):
        args = build_parser(noun).parse_args([noun, *words])
        assert (args.model, args.text, args.seed) == ("m", "text", 1)


def test_ctrl_c_exits_130(tmp_path: Path) -> None:
    """The command waits for its standard input when the signal comes."""
    words = [sys.executable, "-m", "appliance.cli.main", "chat", "notes", "-", "--credentials", str(tmp_path)]
    for name in ("ca.pem", "client.pem", "client.key", "api.key"):
        (tmp_path / name).write_text("x")
    (tmp_path / "address").write_text("127.0.0.1:1")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _until_reading(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_who_leaves_an_activation_is_told_that_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def steps() -> Iterator[admin_pb2.Activation]:
        yield admin_pb2.Activation(stage="loading", message="waits for ward-2 to be ready")
        raise KeyboardInterrupt

    assert model_activate._watch(Namespace(json=False, alias="ward"), steps()) == 130
    said = capsys.readouterr()
    assert said.out.startswith("loading")
    assert "it goes on, and ends by itself: the same command watches it again" in said.err


def _until_reading(pid: int) -> None:
    """Wait until the process sleeps in read(0, ...); proc(5), /proc/PID/syscall."""
    while True:
        fields = Path(f"/proc/{pid}/syscall").read_text().split()
        if len(fields) > 1 and int(fields[0]) == 0 and int(fields[1], 16) == 0:
            return
        os.sched_yield()
