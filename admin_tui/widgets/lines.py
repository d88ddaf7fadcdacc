"""Lines of text on the screen: only those that changed are painted again."""

from collections.abc import Sequence

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from admin_tui.cells import ASCII, UTF8, Line, Symbols, Tone
from admin_tui.widgets import colours


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
            if self._at(before, y) != self._at(self._lines, y):
                self.refresh(Region(0, y, self.size.width, 1))

    def text(self) -> str:
        """What is shown, for tests and for those who copy."""
        return "\n".join("".join(text for text, _ in line).rstrip() for line in self._lines)

    def render_line(self, y: int) -> Strip:
        """Line `y` of the widget, as wide as the widget."""
        return self.paint(self._at(self._lines, y))

    def paint(self, line: Line, over: Style | None = None) -> Strip:
        """A line in the colours of the terminal; `over` goes over all of it."""
        styles = colours.ANSI if self.app.native_ansi_color else colours.TRUECOLOUR
        base = self.rich_style
        segments = [Segment(text, base + styles[tone] + (over or Style())) for text, tone in line]
        return Strip(segments).adjust_cell_length(self.size.width, base + (over or Style()))

    def selected(self) -> Style:
        """How the line under the cursor differs."""
        return colours.SELECTED_ANSI if self.app.native_ansi_color else colours.SELECTED_TRUECOLOUR

    @staticmethod
    def _at(lines: tuple[Line, ...], y: int) -> Line:
        return lines[y] if 0 <= y < len(lines) else (("", Tone.PLAIN),)
