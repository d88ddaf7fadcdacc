"""What is shown, without a terminal: cells with a tone, rows with an identity, text fitted to a width in cells.

Every text passes `literal` on its way to the screen: controls, bidirectional formatting, invisible and combining
characters are spelled out, so that nobody who chose a name can move the cursor, hide a word or fake a colour.

Source: Unicode Standard Annex 44 (general categories), Annex 9 (bidirectional controls), Annex 11 (widths).
"""

import unicodedata
from dataclasses import dataclass
from enum import StrEnum

from rich.cells import cell_len, chop_cells, set_cell_size

from admin_tui.terminal import spelled

# Control, format, surrogate, private, unassigned; separators but the plain space; marks that no letter absorbed.
_SPELLED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs", "Mn", "Me"}


class Tone(StrEnum):
    """How a piece of text is painted; the words themselves say the same, for eyes and terminals without colour."""

    PLAIN = "plain"
    DIM = "dim"
    STRONG = "strong"
    OK = "ok"
    WARN = "warn"
    CRIT = "crit"
    HEAD = "head"
    BAR = "bar"


@dataclass(frozen=True, slots=True)
class Cell:
    """One field of a row.

    Attributes:
        text: as it came; it is made literal when it is painted.
        tone: how.
        order: what sorting compares; the text when absent.
    """

    text: str
    tone: Tone = Tone.PLAIN
    order: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table; the cursor follows `id`, wherever the row goes."""

    id: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    Attributes:
        title: its heading.
        width: cells it takes at least.
        right: flush right, for numbers.
        grows: share of the room that is left over.
        from_width: cells the table must have for the column to be shown.
        ends: what is too long is cut in its middle: names that begin alike differ at their end.
    """

    title: str
    width: int
    right: bool = False
    grows: int = 0
    from_width: int = 0
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Symbols:
    """The few characters beyond letters; `utf8` says whether others arrive."""

    utf8: bool
    ellipsis: str
    up: str
    down: str
    full: str
    empty: str
    rule: str
    cursor: str


UTF8 = Symbols(True, "…", "▲", "▼", "█", "░", "─", "▌")
ASCII = Symbols(False, "~", "^", "v", "#", ".", "-", ">")

Part = tuple[str, Tone]
Line = tuple[Part, ...]
Fact = tuple[str, str, Tone]
"""A label, a text, and how the text is painted; the lines of a detail."""


def literal(text: str, symbols: Symbols) -> str:
    """`text` on one line, every character of it visible; characters the terminal cannot show are spelled out."""
    if text.isascii() and text.isprintable():
        return text
    whole = unicodedata.normalize("NFC", text)
    return "".join(spelled(c) if _is_spelled(c, symbols.utf8) else c for c in whole)


def fit(text: str, width: int, symbols: Symbols, right: bool = False, ends: bool = False) -> str:
    """`text` made literal and exactly `width` cells wide: padded, or cut with an ellipsis; with `ends` amid it."""
    shown = literal(text, symbols)
    length = cell_len(shown)
    if length > width:
        if ends and width > 4:
            tail = last_cells(shown, (width - 1) // 2)
            return set_cell_size(shown, width - 1 - cell_len(tail)) + symbols.ellipsis + tail
        return set_cell_size(set_cell_size(shown, max(0, width - 1)).rstrip() + symbols.ellipsis, width)
    room = " " * (width - length)
    return room + shown if right else shown + room


def last_cells(text: str, width: int) -> str:
    """The end of `text`, at most `width` cells of it."""
    while cell_len(text) > width:
        text = text[1:]
    return text


def wrap(text: str, width: int, symbols: Symbols) -> list[str]:
    """`text` made literal and broken at spaces into lines of at most `width` cells; at least one line."""
    lines, line = [], ""
    for word in literal(text, symbols).split(" "):
        joined = f"{line} {word}" if line else word
        if cell_len(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        *full, line = chop_cells(word, width) or [""]
        lines += full
    return [*lines, line]


def bar(share: float, width: int, symbols: Symbols) -> str:
    """A bar of `width` cells, `share` of it filled; full only when `share` is 1."""
    filled = min(width, max(0, int(share * width)))
    return symbols.full * filled + symbols.empty * (width - filled)


def widths(columns: tuple[Column, ...], room: int) -> tuple[int, ...]:
    """Cells of each column in `room`, a gap of one between them; 0 for a column that is not shown."""
    shown = [c if room >= c.from_width else None for c in columns]
    taken = sum(c.width for c in shown if c) + sum(1 for c in shown if c) - 1
    left, growing = max(0, room - taken), sum(c.grows for c in shown if c)
    found = []
    for column in shown:
        extra = left * column.grows // growing if column and growing else 0
        found.append(column.width + extra if column else 0)
    return tuple(found)


def _is_spelled(character: str, utf8: bool) -> bool:
    if character == " ":
        return False
    return unicodedata.category(character) in _SPELLED or not (utf8 or character.isascii())
