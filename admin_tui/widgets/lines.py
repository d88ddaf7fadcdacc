"""Lines of text on the screen: only those that changed are painted again."""

from collections.abc import Sequence
from itertools import zip_longest

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from admin_tui.cells import ASCII, UTF8, Line, Symbols, Tone, literal
from admin_tui.widgets import colours


def differing(old: Line, new: Line, width: int) -> tuple[int, int]:
    """Where two lines differ, from the first cell to the last: (first, cells).

    All of it where a character is not one cell wide. One stretch, not several: Textual paints the cells left of a
    stretch again for each.
    """
    if any(cell_len(text) != len(text) for text, _ in (*old, *new)):
        return 0, width
    cells = [[(character, tone) for text, tone in line for character in text] for line in (old, new)]
    pairs = enumerate(zip_longest(*cells, fillvalue=(" ", Tone.PLAIN)))
    changed = [x for x, (before, after) in pairs if before != after and x < width]
    return (changed[0], changed[-1] + 1 - changed[0]) if changed else (0, width)


class Lines(Widget, can_focus=False):
    """A block of lines, the first at the top; what is below the widget's height is not shown.

    Paints through Textual's Line API. A change of one line costs the bytes of that line; a list that is the same
    as before costs none.

    Args:
        id: the widget's id.
        classes: CSS classes.
    """

    DEFAULT_CSS = "Lines { height: 1; width: 1fr; }"

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:  # noqa: A002  # Textual's name
        super().__init__(id=id, classes=classes)
        self._lines: tuple[Line, ...] = ()

    @property
    def symbols(self) -> Symbols:
        """What the terminal can show."""
        return UTF8 if getattr(self.app, "utf8", True) else ASCII

    def show(self, lines: Sequence[Line]) -> None:
        """Show these; paint those that differ from what is there."""
        before, self._lines = self._lines, tuple(lines)
        for y in range(max(len(before), len(self._lines))):
            old, new = self._at(before, y), self._at(self._lines, y)
            if old != new:
                x, cells = differing(old, new, self.size.width)
                self.refresh(Region(x, y, cells, 1))

    def text(self) -> str:
        """What is shown, for tests and for those who copy."""
        return "\n".join("".join(text for text, _ in line).rstrip() for line in self._lines)

    def render_line(self, y: int) -> Strip:
        """Line `y` of the widget, as wide as the widget."""
        return self.paint(self._at(self._lines, y))

    def paint(self, line: Line, over: Style | None = None) -> Strip:
        """A line in the colours of the terminal; `over` goes over all of it.

        Whatever came here is made literal, whether its maker thought of it or not: this is the only way to the
        screen for text that is not our own, but for what an operator types.
        """
        styles = colours.ANSI if self.app.native_ansi_color else colours.TRUECOLOUR
        base = self.rich_style
        segments = [
            Segment(literal(text, self.symbols), base + styles[tone] + (over or Style())) for text, tone in line
        ]
        return Strip(segments).simplify().adjust_cell_length(self.size.width, base + (over or Style()))

    def selected(self) -> Style:
        """How the line under the cursor differs."""
        return colours.SELECTED_ANSI if self.app.native_ansi_color else colours.SELECTED_TRUECOLOUR

    @staticmethod
    def _at(lines: tuple[Line, ...], y: int) -> Line:
        return lines[y] if 0 <= y < len(lines) else (("", Tone.PLAIN),)
