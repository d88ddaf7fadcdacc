"""A table that changes under the operator's eyes: changed rows alone are painted, the cursor stays on its row."""

from collections.abc import Sequence
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.strip import Strip

from admin_tui.cells import Cell, Column, Line, Row, Tone, fit, widths
from admin_tui.widgets.lines import Lines

MOST_ROWS = 500
"""Rows beyond these are not taken: the server pages what is longer."""


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
        self._given: tuple[Row, ...] = ()
        self._rows: tuple[Row, ...] = ()
        self._cursor: str | None = None
        self._place = 0
        self._top = 0
        self._sort: tuple[int, bool] | None = None
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
        return f"{self._top + 1}-{min(len(self._rows), self._top + room)} of {len(self._rows)}{self.more}"

    def set_rows(self, rows: Sequence[Row]) -> None:
        """Take the newest rows; a frozen table shows them when it thaws."""
        self.more = f" ({len(rows) - MOST_ROWS} more)" if len(rows) > MOST_ROWS else ""
        self._given = tuple(rows[:MOST_ROWS])
        if not self.frozen:
            self._arrange()

    def sort_next(self) -> None:
        """The next column, each upwards and then downwards; after the last as given."""
        shown = [i for i, width in enumerate(self._widths) if width and self._columns[i].title]
        if self._sort is None:
            self._sort = (shown[0], False)
        elif not self._sort[1]:
            self._sort = (self._sort[0], True)
        else:
            later = [i for i in shown if i > self._sort[0]]
            self._sort = (later[0], False) if later else None
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
        if not self.size.width:
            return
        shown = [self._line(self._top + i, row) for i, row in enumerate(self._rows[self._top :][: self._room])]
        if not self._rows:
            shown = [((" " + fit(self._empty, max(0, self.size.width - 1), self.symbols), Tone.DIM),)]
        self.show((self._heading(), *shown))

    def _heading(self) -> Line:
        parts: list[tuple[str, Tone]] = [(" ", Tone.PLAIN)]
        for index, (column, width) in enumerate(zip(self._columns, self._widths, strict=True)):
            if width:
                title = self.sorted_by if self._sort and self._sort[0] == index else column.title
                parts += [(fit(title, width, self.symbols, column.right), Tone.HEAD), (" ", Tone.PLAIN)]
        return tuple(parts[:-1])

    def _line(self, place: int, row: Row) -> Line:
        here = place == self._place
        mark = self.symbols.cursor if here and self.has_focus else " "
        parts: list[tuple[str, Tone]] = [(mark, Tone.STRONG)]
        for cell, column, width in zip(row.cells, self._columns, self._widths, strict=True):
            if width:
                parts += [(fit(cell.text, width, self.symbols, column.right), cell.tone), (" ", Tone.PLAIN)]
        return tuple(parts[:-1])

    def _sorted(self) -> tuple[Row, ...]:
        if self._sort is None:
            return self._given
        column, backwards = self._sort
        return tuple(sorted(self._given, key=lambda row: _order(row.cells[column]), reverse=backwards))


def _order(cell: Cell) -> tuple[float, str]:
    return (cell.order if cell.order is not None else 0.0, cell.text)
