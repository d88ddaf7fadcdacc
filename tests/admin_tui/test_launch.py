"""What is decided before Textual is imported: whether there is a terminal for it, its colours, its characters."""

import io
import os
import subprocess
import sys

import pytest

from admin_tui.launch import Setting, setting
from tests.admin_tui.test_terminal import tty

__all__ = ["tty"]
CLOISTER = [sys.executable, "-m", "appliance.cli.main"]
UTF8 = {"LANG": "en_GB.UTF-8"}


def test_without_a_terminal_the_console_names_the_commands_and_exits_2() -> None:
    done = subprocess.run([*CLOISTER, "console"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "NO_TERMINAL" in done.stderr
    assert "cloister status" in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["console", "--help"], ["console", "--keys"], ["console"]])
def test_textual_is_not_loaded_where_no_console_runs(words: list[str]) -> None:
    code = (
        "import sys; from appliance.cli.main import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        "sys.exit(any(name.partition('.')[0] == 'textual' for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0


def test_a_dumb_terminal_is_refused(tty: io.TextIOWrapper) -> None:
    for term in ("dumb", ""):
        assert "TERM" in setting(tty, tty, {"TERM": term, **UTF8}).refusal


def test_output_into_a_file_is_refused(tty: io.TextIOWrapper) -> None:
    pipe = io.TextIOWrapper(io.BytesIO())
    assert setting(tty, pipe, {"TERM": "xterm"}).refusal
    assert setting(pipe, tty, {"TERM": "xterm"}).refusal


@pytest.mark.parametrize(
    ("environ", "ansi"),
    [
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, False),
        ({"TERM": "tmux-256color", "COLORTERM": "truecolor"}, False),
        ({"TERM": "screen-256color", "COLORTERM": "truecolor"}, False),
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor", "NO_COLOR": "1"}, True),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor", "SSH_CONNECTION": "1 2 3 4"}, True),
        ({"TERM": "linux", "COLORTERM": "truecolor"}, True),
        ({"TERM": "vt100", "COLORTERM": "truecolor"}, True),
        ({"TERM": "screen", "COLORTERM": "truecolor"}, True),
    ],
)
def test_the_terminals_own_colours_where_others_are_not_wanted_or_not_there(
    tty: io.TextIOWrapper, environ: dict[str, str], ansi: bool
) -> None:
    assert setting(tty, tty, {**environ, **UTF8}) == Setting("", ansi, environ["TERM"] not in ("linux", "vt100"))


@pytest.mark.parametrize(
    ("environ", "utf8"),
    [
        ({"LANG": "C.UTF-8"}, True),
        ({"LC_ALL": "de_DE.utf8"}, True),
        ({"LANG": "en_GB.UTF-8", "LC_ALL": "C"}, False),
        ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, False),
        ({"LC_CTYPE": "en_GB.UTF-8", "LANG": "C"}, True),
        ({"LANG": "en_GB.ISO-8859-1"}, False),
        ({}, False),
    ],
)
def test_characters_beyond_ascii_where_the_locale_is_utf8(
    tty: io.TextIOWrapper, environ: dict[str, str], utf8: bool
) -> None:
    assert setting(tty, tty, {"TERM": "xterm", **environ}).utf8 is utf8


def test_an_operator_unknown_to_the_appliance_is_told_before_anything_is_painted(tmp_path: object) -> None:
    """NOT_RUNNING alone is waited for on the screen; the rest is an error as every command has it."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom unittest import mock\nfrom admin_tui import launch\n"
        "from appliance.errors import CloisterError\n"
        "class Port:\n"
        "    def __init__(self, home): pass\n"
        "    def operator(self): raise CloisterError('NOT_AN_OPERATOR', 'uid 7')\n"
        "with mock.patch('admin_tui.port.AdminPort', Port):\n"
        "    try: launch._run(Path('/x'), True, True)\n"
        "    except CloisterError as error: sys.exit(0 if error.code == 'NOT_AN_OPERATOR' else 1)\n"
        "sys.exit(2)"
    )
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
