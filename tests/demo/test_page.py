"""The demo's page keeps within 80 columns, says in words what colour says, and shows foreign text as text."""

import os
from pathlib import Path

import pytest

from admin_tui.terminal import Terminal
from demo.carry_in import flip_one_bit
from demo.page import Page

PLAIN = Terminal(tty=False, columns=200, utf8=True, colour=False)
COLOUR = Terminal(tty=True, columns=80, utf8=True, colour=True)


def test_a_long_command_continues_at_its_options_and_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cloister", "bundle", "build", *(f"--option{n} value-{n}" for n in range(12))]
    Page(PLAIN).command([part for word in words for part in word.split()])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.replace("\\\n", "").split() == ["$", *" ".join(words).split()]


def test_a_step_that_prints_nothing_is_one_line_with_its_time_at_the_right(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Page(PLAIN).step("Do it"):
        pass
    line = capsys.readouterr().out
    assert line.startswith("  1. Do it ")
    assert line.endswith(" s\n")
    assert len(line) == 81


def test_an_answer_is_shown_whole_and_within_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    pieces = ["x" * 100, ',"', "name", '":"', "y" * 70, '","' * 30]
    whole = Page(PLAIN).stream(iter(pieces))
    shown = capsys.readouterr().out
    assert whole == "".join(pieces)
    assert "".join(shown.split()) == whole
    assert max(map(len, shown.splitlines())) <= 80


def test_an_answer_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    page = Page(PLAIN)
    page.stream(iter(["\x1b[2J\u202e"]))
    page.paragraph("\x1b]0;x\x07")
    page.compare({"a\x1b": "\x1b[31m"}, {"a\x1b": "\x9b"}, {"a\x1b": False})
    assert not set(capsys.readouterr().out) & {"\x1b", "\x9b", "\u202e", "\x07"}


def test_a_mistake_is_left_visible_and_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"drug": "Aspirin", "dose": None}
    Page(PLAIN).compare(
        answer, {"drug": "Aspirin", "dose": "5 mg", "ward": "B"}, {"drug": True, "dose": False, "ward": False}
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["field", "answer", "gold", "record"],
        ["drug", "Aspirin", "Aspirin", "right"],
        ["dose", "(none)", "5", "mg", "<-", "WRONG"],
        ["ward", "(absent)", "B", "<-", "WRONG"],
    ]


def test_long_values_keep_the_columns(capsys: pytest.CaptureFixture[str]) -> None:
    Page(PLAIN).compare({"payee": "p" * 90}, {"payee": "q" * 90}, {"payee": False})
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_colour_is_used_where_the_terminal_wants_it(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (COLOUR, PLAIN):
        Page(terminal).good("held")
    coloured, plain = capsys.readouterr().out.splitlines()
    assert "\x1b[32m" in coloured
    assert plain == "     ok  held"


def test_the_tampered_copy_differs_in_one_bit(tmp_path: Path) -> None:
    content = os.urandom(1000)
    (tmp_path / "a").write_bytes(content)
    where = flip_one_bit(tmp_path / "a", tmp_path / "b")
    changed = (tmp_path / "b").read_bytes()
    assert [i for i in range(1000) if content[i] != changed[i]] == [where]
    assert content[where] ^ changed[where] == 1
