"""Text on its way to the screen: literal, and exactly as wide as its column."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from admin_tui.cells import ASCII, UTF8, Column, bar, fit, literal, widths, wrap


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b[31mred", r"\x1b[2J\x1b[31mred"),
        ("[red]bold[/]", "[red]bold[/]"),
        ("a\u202eb", r"a\u202eb"),
        ("a\u2066b\u200bc", r"a\u2066b\u200bc"),
        ("a\r\nb\tc", r"a\x0d\x0ab\x09c"),
        ("\x9b31m", r"\x9b31m"),
        ("e\u0301", "é"),
        ("z\u0335\u0336", r"z\u0335\u0336"),
        ("\ud800", r"\ud800"),
        ("Zürich 東京", "Zürich 東京"),
    ],
)
def test_what_would_act_on_the_terminal_is_spelled_out(text: str, shown: str) -> None:
    assert literal(text, UTF8) == shown


def test_a_terminal_without_utf8_gets_ascii_alone() -> None:
    assert literal("Zürich 東", ASCII) == r"Z\xfcrich \u6771"


@given(st.text(), st.integers(1, 40), st.sampled_from([UTF8, ASCII]), st.booleans())
def test_a_field_is_exactly_as_wide_as_its_column(text: str, width: int, symbols: object, right: bool) -> None:
    shown = fit(text, width, symbols, right)  # type: ignore[arg-type]  # one of the two
    assert cell_len(shown) == width
    assert shown.isprintable()


def test_what_is_cut_ends_in_an_ellipsis_and_wide_characters_count_double() -> None:
    assert fit("abcdef", 4, UTF8) == "abc…"
    assert fit("東京都庁", 5, UTF8) == "東京…"
    assert fit("abcdef", 4, ASCII) == "abc~"
    assert fit("42", 4, UTF8, right=True) == "  42"


@given(st.text(), st.integers(12, 60))
def test_wrapping_loses_nothing_but_spaces_and_fits(text: str, width: int) -> None:
    lines = wrap(text, width, UTF8)
    assert all(cell_len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == literal(text, UTF8).replace(" ", "")


def test_a_bar_is_full_only_at_the_end() -> None:
    assert bar(0.999, 10, ASCII) == "#########."
    assert bar(1.0, 10, ASCII) == "##########"


def test_columns_share_what_is_left_and_some_come_only_where_there_is_room() -> None:
    columns = (Column("A", 4, grows=1), Column("B", 4), Column("C", 4, grows=3, from_width=40))
    assert widths(columns, 20) == (15, 4, 0)
    assert widths(columns, 42) == (11, 4, 25)
