"""A table that changes under the operator's eyes: changed rows alone are painted, the cursor stays on its row."""

from collections.abc import Sequence
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.strip import Strip

from admin_tui.cells import Cell, Column, Line, Row, Tone, fit, widths
from admin_tui.widgets.lines import Lines

MOST_ROWS = 500
"""Rows beyond these are not taken: the server pages what is longer."""
NOT_HEARD = "not heard yet"


class LiveTable(Lines, can_focus=True):
    """Rows under fixed headings.

    The cursor belongs to a row's id: rows may come, go and be sorted, and Enter still opens what was chosen. When
    the chosen row is gone, the one in its place is chosen. Sorting and freezing are the table's own.

    Args:
        columns: what is shown.
        empty: said in place of rows.
        id: the widget's id.
    """

    DEFAULT_CSS = "LiveTable { height: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup,ctrl+u", "page(-1)", show=False),
        Binding("pagedown,ctrl+d", "page(1)", show=False),
        Binding("home,g", "move(-1000)", show=False),
        Binding("end,G", "move(1000)", show=False),
    ]

    class Chosen(Message):
        """The cursor is on another row, or what is known of its row changed."""

    def __init__(self, columns: tuple[Column, ...], empty: str, *, id: str) -> None:  # noqa: A002  # Textual's name
        super().__init__(id=id)
        self._columns = columns
        self._empty = empty
        self._heard = True
        self._given: tuple[Row, ...] = ()
        self._rows: tuple[Row, ...] = ()
        self._cursor: str | None = None
        self._place = 0
        self._top = 0
        self._sort: tuple[int, bool] | None = None
        self._laid_out = Size(0, 0)
        self.frozen = False
        self.more = ""

    @property
    def chosen(self) -> str | None:
        """The id of the row under the cursor."""
        return self._cursor

    @property
    def sorted_by(self) -> str:
        """The column the rows are sorted by, and the way."""
        if self._sort is None:
            return ""
        column, backwards = self._sort
        return f"{self._columns[column].title} {self.symbols.down if backwards else self.symbols.up}"

    @property
    def span(self) -> str:
        """Which rows are seen, of how many; nothing when all are."""
        room = self._room
        if not room or len(self._rows) <= room:
            return ""
        return f"{self._top + 1}-{min(len(self._rows), self._top + room)}/{len(self._rows)}{self.more}"

    def set_rows(self, rows: Sequence[Row], heard: bool = True) -> None:
        """Take the newest rows; a frozen table shows them when it thaws. Unheard rows are not the same as none."""
        self._heard = heard
        self.more = "+" if len(rows) > MOST_ROWS else ""
        self._given = tuple(rows[:MOST_ROWS])
        if not self.frozen:
            self._arrange()

    def sort_next(self) -> None:
        """The next column, each both ways, numbers from the largest first; after the last as given."""
        shown = [i for i, width in enumerate(self._widths) if width and self._columns[i].title]
        ways = [(i, way) for i in shown for way in (self._columns[i].right, not self._columns[i].right)]
        following = ways.index(self._sort) + 1 if self._sort in ways else 0
        self._sort = ways[following] if following < len(ways) else None
        self._arrange()

    def toggle_freeze(self) -> None:
        """Hold the rows as they are, or show what came meanwhile."""
        self.frozen = not self.frozen
        if not self.frozen:
            self._arrange()

    def action_move(self, by: int) -> None:
        """Move the cursor by rows."""
        if self._rows:
            self._go(min(len(self._rows) - 1, max(0, self._place + by)))

    def action_page(self, by: int) -> None:
        """Move the cursor by what is seen."""
        self.action_move(by * max(1, self._room - 1))

    def on_focus(self) -> None:
        """The cursor appears."""
        self._repaint()

    def on_blur(self) -> None:
        """The cursor steps back."""
        self._repaint()

    def on_resize(self, event: events.Resize) -> None:
        """All of it is painted in the new width."""
        self._arrange()

    def render_line(self, y: int) -> Strip:
        """The headings, or a row."""
        if self._laid_out != self.size:  # painted before it is told of its size: right at once, not blank at first
            self._follow()
            self._lines, self._laid_out = self._compose_lines(), self.size
        line = self._at(self._lines, y)
        at = y - 1 + self._top
        on_cursor = self.has_focus and y > 0 and at == self._place and bool(self._rows)
        return self.paint(line, self.selected() if on_cursor else None)

    @property
    def _room(self) -> int:
        return max(0, self.size.height - 1)

    @property
    def _widths(self) -> tuple[int, ...]:
        return widths(self._columns, max(0, self.size.width - 1))

    def _arrange(self) -> None:
        """Sort, put the cursor back on its row, and paint what differs."""
        self._rows = self._sorted()
        ids = [row.id for row in self._rows]
        if self._cursor in ids:
            self._place = ids.index(self._cursor)
        else:
            self._place = min(self._place, max(0, len(ids) - 1))
            self._cursor = ids[self._place] if ids else None
        self._follow()
        self._repaint()
        self.post_message(self.Chosen())

    def _go(self, place: int) -> None:
        self._place, self._cursor = place, self._rows[place].id
        self._follow()
        self._repaint()
        self.post_message(self.Chosen())

    def _follow(self) -> None:
        """Scroll so far that the cursor is seen."""
        room = max(1, self._room)
        self._top = min(self._top, self._place, max(0, len(self._rows) - room))
        self._top = max(self._top, self._place - room + 1)

    def _repaint(self) -> None:
        """Show the rows in view. The cursor is part of a line, so that its leaving and coming are changes, too."""
        if self.size.width:
            self._laid_out = self.size
            self.show(self._compose_lines())

    def _compose_lines(self) -> tuple[Line, ...]:
        shown = [self._line(self._top + i, row) for i, row in enumerate(self._rows[self._top :][: self._room])]
        if not self._rows:
            text = self._empty if self._heard else NOT_HEARD
            shown = [((" " + fit(text, max(0, self.size.width - 1), self.symbols), Tone.DIM),)]
        return (self._heading(), *shown)

    def _heading(self) -> Line:
        parts: list[tuple[str, Tone]] = [(" ", Tone.PLAIN)]
        for title, column, width in zip(self._titles(), self._columns, self._widths, strict=True):
            if width:
                parts += [(fit(title, width, self.symbols, column.right), Tone.HEAD), (" ", Tone.PLAIN)]
        return tuple(parts[:-1])

    def _titles(self) -> list[str]:
        """Headings; the first with room for it tells which rows are seen."""
        titles = [column.title for column in self._columns]
        if self._sort:
            titles[self._sort[0]] = self.sorted_by
        span = self.span
        for place, title in enumerate(titles if span else ()):
            joined = f"{title} {span}".strip()
            if len(joined) <= self._widths[place]:
                titles[place] = joined
                break
        return titles

    def _line(self, place: int, row: Row) -> Line:
        here = place == self._place
        mark = self.symbols.cursor if here and self.has_focus else " "
        parts: list[tuple[str, Tone]] = [(mark, Tone.STRONG)]
        for cell, column, width in zip(row.cells, self._columns, self._widths, strict=True):
            if width:
                text = fit(cell.text, width, self.symbols, column.right, column.ends)
                parts += [(text, cell.tone), (" ", Tone.PLAIN)]
        return tuple(parts[:-1])

    def _sorted(self) -> tuple[Row, ...]:
        if self._sort is None:
            return self._given
        column, backwards = self._sort
        return tuple(sorted(self._given, key=lambda row: _order(row.cells[column]), reverse=backwards))


def _order(cell: Cell) -> tuple[float, str]:
    return (cell.order if cell.order is not None else 0.0, cell.text)
