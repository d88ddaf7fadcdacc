"""One row whole: labelled facts, wrapped, scrolled where they are longer than the pane."""

from collections.abc import Sequence
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType

from admin_tui.cells import Fact, Line, Tone, fit, wrap
from admin_tui.widgets.lines import Lines

_LABEL = 11


class Detail(Lines, can_focus=True):
    """Facts of the chosen row under a rule."""

    DEFAULT_CSS = "Detail { height: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup,ctrl+u", "move(-15)", show=False),
        Binding("pagedown,ctrl+d", "move(15)", show=False),
        Binding("home,g", "move(-100000)", show=False),
        Binding("end,G", "move(100000)", show=False),
    ]

    def __init__(self, *, id: str) -> None:  # noqa: A002  # Textual's name
        super().__init__(id=id)
        self._facts: tuple[Fact, ...] = ()
        self._top = 0

    def set_facts(self, facts: Sequence[Fact]) -> None:
        """Take the newest facts; the place in them stays, unless they are of something else."""
        if tuple(facts[:1]) != self._facts[:1]:
            self._top = 0
        self._facts = tuple(facts)
        self._lay_out()

    def action_move(self, by: int) -> None:
        """Scroll."""
        self._top = max(0, self._top + by)
        self._lay_out()

    def on_resize(self, event: events.Resize) -> None:
        """Wrap again."""
        self._lay_out()

    def _lay_out(self) -> None:
        width, room = self.size.width, max(1, self.size.height - 1)
        if not width:
            return
        lines = [line for fact in self._facts for line in self._fact(fact, width)]
        self._top = max(0, min(self._top, len(lines) - room))
        seen = f" {self._top + 1}-{min(len(lines), self._top + room)} of {len(lines)} lines " if lines else ""
        seen = seen if len(lines) > room else ""
        rule = self.symbols.rule * max(0, width - len(seen) - 2) + seen + self.symbols.rule * 2
        self.show((((rule[:width], Tone.DIM),), *lines[self._top :][:room]))

    def _fact(self, fact: Fact, width: int) -> list[Line]:
        label, text, tone = fact
        indent = len(text) - len(text.lstrip(" "))
        first, *rest = wrap(text.lstrip(" "), max(8, width - _LABEL - indent - 2), self.symbols)
        lines: list[Line] = [
            ((fit(f" {label}", _LABEL + 1, self.symbols), Tone.DIM), (" " * indent + first, tone))
        ]
        return lines + [((" " * (_LABEL + 1 + indent), Tone.DIM), (line, tone)) for line in rest]
