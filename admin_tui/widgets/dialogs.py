"""What lies over a page for a moment: help, commands, a path, a yes or no, and a terminal that is too small."""

from collections.abc import Sequence
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen, Screen
from textual.widgets import Input

from admin_tui.actions import MOVES, Action
from admin_tui.cells import Cell, Column, Line, Row, Tone, fit, wrap
from admin_tui.widgets.lines import Lines
from admin_tui.widgets.live_table import LiveTable

LEAST = (80, 24)
_ASK_WIDTH = 74
_HELP = (Column("KEY", 6), Column("WHAT IT DOES", 40, grows=1), Column("THE SAME BY cloister ...", 25))
_COMMANDS = (Column("KEY", 6), Column("COMMAND", 40, grows=1), Column("THE SAME BY cloister ...", 25))


def action_rows(actions: Sequence[Action]) -> tuple[Row, ...]:
    """Actions as rows of help and palette."""
    return tuple(
        Row(a.id, (Cell(a.key, Tone.STRONG), Cell(a.title), Cell(" ".join(a.twin) or "-", Tone.DIM)))
        for a in actions
    )


class Dialog(ModalScreen[str | None]):
    """A box over the page; Escape closes it without an answer."""

    DEFAULT_CSS = """
    Dialog { align: center middle; background: transparent; }
    Dialog > Vertical { width: 80; max-width: 100%; height: auto; max-height: 100%; padding: 0 1;
        border: round $primary; background: $background; }
    Dialog.ascii > Vertical { border: ascii $primary; }
    Dialog Input { border: none; padding: 0; height: 1; background: $background; }
    Dialog Input:focus { border: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", show=False),
        Binding("ctrl+c,ctrl+q", "app.do('quit')", show=False, priority=True),
    ]

    def on_mount(self) -> None:
        """Borders in characters that arrive."""
        self.set_class(not getattr(self.app, "utf8", True), "ascii")


class Help(Dialog):
    """What can be done here, with the commands that do the same."""

    DEFAULT_CSS = "Help LiveTable { height: 20; } Help Lines.foot { height: 2; }"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("question_mark,q,enter", "dismiss", show=False)]

    def __init__(self, page: str, actions: Sequence[Action]) -> None:
        super().__init__()
        self._page = page
        self._actions = actions

    def compose(self) -> ComposeResult:
        """A table and a line."""
        with Vertical():
            yield LiveTable(_HELP, "", id="help")
            yield Lines(classes="foot")

    def on_mount(self) -> None:
        """Fill it."""
        super().on_mount()
        table = self.query_one(LiveTable)
        table.set_rows(action_rows(self._actions))
        table.focus()
        self.query_one(".foot", Lines).show(
            [((MOVES, Tone.DIM),), (("capital letters change something   esc closes", Tone.DIM),)]
        )


class Commands(Dialog):
    """All that can be done here, found by typing; answers with the action's id."""

    DEFAULT_CSS = "Commands LiveTable { height: 20; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", show=False, priority=True),
        Binding("down", "move(1)", show=False, priority=True),
        Binding("enter", "choose", show=False, priority=True),
    ]

    def __init__(self, actions: Sequence[Action]) -> None:
        super().__init__()
        self._actions = actions

    def compose(self) -> ComposeResult:
        """A line to type in over what matches."""
        with Vertical():
            field = Input(placeholder="type to find a command", id="find")
            field.cursor_blink = False
            yield field
            yield LiveTable(_COMMANDS, "no such command", id="commands")

    def on_mount(self) -> None:
        """Everything matches at first."""
        super().on_mount()
        self.query_one(LiveTable).set_rows(action_rows(self._actions))
        self.query_one(Input).focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """What has every word typed."""
        words = event.value.lower().split()
        text = {a.id: f"{a.id} {a.title} {a.command}".lower() for a in self._actions}
        found = [a for a in self._actions if all(word in text[a.id] for word in words)]
        self.query_one(LiveTable).set_rows(action_rows(found))

    def action_move(self, by: int) -> None:
        """Move in the table while typing."""
        self.query_one(LiveTable).action_move(by)

    def action_choose(self) -> None:
        """Answer."""
        self.dismiss(self.query_one(LiveTable).chosen)


class Ask(Dialog):
    """One line of text; answers with it."""

    DEFAULT_CSS = "Ask Lines { height: auto; } Ask .head { height: 2; } Ask .foot { height: 2; }"

    def __init__(self, title: str, help_text: str, value: str = "") -> None:
        super().__init__()
        self._title, self._help, self._value = title, help_text, value

    def compose(self) -> ComposeResult:
        """Title, line, help."""
        with Vertical():
            yield Lines(classes="head")
            field = Input(self._value, id="answer")
            field.cursor_blink = False
            yield field
            yield Lines(classes="foot")

    def on_mount(self) -> None:
        """Ready to type."""
        super().on_mount()
        self.query_one(".head", Lines).show([((self._title, Tone.STRONG),)])
        foot = self.query_one(".foot", Lines)
        lines = wrap(self._help, _ASK_WIDTH, foot.symbols)
        foot.styles.height = len(lines) + 1
        foot.show([(), *(((line, Tone.DIM),) for line in lines)])
        self.query_one(Input).focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Answer."""
        self.dismiss(event.value)


class Confirm(Dialog):
    """Yes or no, with the focus on Cancel; answers with the yes, or nothing."""

    DEFAULT_CSS = "Confirm Lines { height: 1; } Confirm .what { height: 6; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,right,tab,shift+tab,h,l", "other", show=False, priority=True),
        Binding("enter", "choose", show=False),
    ]

    def __init__(self, title: str, what: str, consequence: str, yes: str) -> None:
        super().__init__()
        self._title, self._what, self._consequence, self._yes = title, what, consequence, yes
        self._chosen = False

    def compose(self) -> ComposeResult:
        """What would be done, and two answers."""
        with Vertical():
            yield Lines(classes="what")
            yield Lines(classes="answers")

    def on_mount(self) -> None:
        """Cancel has the focus."""
        super().on_mount()
        self.call_after_refresh(self._fill)

    def _fill(self) -> None:
        block = self.query_one(".what", Lines)
        room = max(20, block.size.width)
        what: list[Line] = [((line, Tone.PLAIN),) for line in wrap(self._what, room, block.symbols)[:3]]
        block.styles.height = len(what) + 4
        block.show([((self._title, Tone.STRONG),), (), *what, ((self._consequence, Tone.DIM),)])
        self._show_answers()

    def action_other(self) -> None:
        """The other answer."""
        self._chosen = not self._chosen
        self._show_answers()

    def action_choose(self) -> None:
        """Answer."""
        self.dismiss(self._yes if self._chosen else None)

    def _show_answers(self) -> None:
        no, yes = ("  Cancel  ", f"[ {self._yes} ]") if self._chosen else ("[ Cancel ]", f"  {self._yes}  ")
        strong, dim = Tone.STRONG, Tone.DIM
        parts = ((no, dim if self._chosen else strong), ("   ", dim), (yes, strong if self._chosen else dim))
        self.query_one(".answers", Lines).show([(*parts, ("     left right choose, enter answers", dim))])


class TooSmall(Screen[None]):
    """In place of everything while the terminal is smaller than the screens are made for; takes every key."""

    DEFAULT_CSS = "TooSmall Lines { height: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c,ctrl+q", "app.do('quit')", show=False, priority=True)
    ]

    def compose(self) -> ComposeResult:
        """A few words."""
        yield Lines()

    def on_mount(self) -> None:
        """Say it."""
        self.say()

    def on_resize(self, event: events.Resize) -> None:
        """Say it with the new size."""
        self.say()

    def on_key(self, event: events.Key) -> None:
        """Nothing but quitting is possible here."""
        event.stop()

    def say(self) -> None:
        """What is needed and what there is."""
        columns, rows = self.app.size
        block = self.query_one(Lines)
        texts = (f"need {LEAST[0]}x{LEAST[1]}", f"this is {columns}x{rows}", "q quits")
        block.show([((fit(text, max(1, columns), block.symbols), Tone.STRONG),) for text in texts])
