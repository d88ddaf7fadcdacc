"""What a stream is said to be able to do, on a pipe and on a real pseudo-terminal."""

import fcntl
import io
import os
import pty
import struct
import termios
from collections.abc import Iterator

import pytest

from admin_tui.terminal import Terminal, probe


@pytest.fixture
def tty() -> Iterator[io.TextIOWrapper]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 132, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        yield stream
    os.close(ours)


def test_a_terminal_repaints_has_colour_and_its_own_width(tty: io.TextIOWrapper) -> None:
    assert probe(tty, {"TERM": "xterm-256color"}) == Terminal(tty=True, columns=132, utf8=True, colour=True)


def test_no_color_takes_the_colour_and_nothing_else(tty: io.TextIOWrapper) -> None:
    assert probe(tty, {"TERM": "xterm", "NO_COLOR": "1"}) == Terminal(True, 132, True, False)


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"TERM": ""}, {}])
def test_a_dumb_terminal_is_written_to_as_a_file_is(tty: io.TextIOWrapper, env: dict[str, str]) -> None:
    found = probe(tty, env)
    assert (found.tty, found.colour) == (False, False)


def test_columns_from_the_environment_win(tty: io.TextIOWrapper) -> None:
    assert probe(tty, {"TERM": "xterm", "COLUMNS": "40"}).columns == 40


@pytest.mark.parametrize("columns", ["", "0", "-3", "many"])
def test_columns_that_are_no_width_do_not_count(tty: io.TextIOWrapper, columns: str) -> None:
    assert probe(tty, {"TERM": "xterm", "COLUMNS": columns}).columns == 132


def test_a_terminal_that_does_not_know_its_width_has_80_columns(tty: io.TextIOWrapper) -> None:
    fcntl.ioctl(tty.fileno(), termios.TIOCSWINSZ, struct.pack("4H", 0, 0, 0, 0))
    assert probe(tty, {"TERM": "xterm"}).columns == 80


def test_a_pipe_is_no_terminal_whatever_term_says() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    assert probe(stream, {"TERM": "xterm"}) == Terminal(tty=False, columns=80, utf8=True, colour=False)


@pytest.mark.parametrize(("encoding", "utf8"), [("utf-8", True), ("ascii", False), ("latin-1", False)])
def test_utf8_is_what_the_stream_encodes_with(encoding: str, utf8: bool) -> None:
    assert probe(io.TextIOWrapper(io.BytesIO(), encoding=encoding), {}).utf8 is utf8
