"""The console: lays the pages out, asks the appliance every second, and does what keys ask for."""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, ClassVar

from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.driver import Driver
from textual.screen import Screen
from textual.theme import Theme
from textual.widgets import ContentSwitcher

from admin_tui import feed
from admin_tui.actions import ACTIONS, Page, action, offered
from admin_tui.cells import ASCII, UTF8, Line, Symbols, Tone
from admin_tui.drain import TerminalDriver
from admin_tui.errand import ask
from admin_tui.pages import PAGES
from admin_tui.port import Port
from admin_tui.state import Event, ImportSeen, Noted, State, Turned, next_interval, reduce
from admin_tui.views import chrome
from admin_tui.widgets import colours
from admin_tui.widgets.detail import Detail
from admin_tui.widgets.dialogs import LEAST, Commands, Help, TooSmall
from admin_tui.widgets.lines import Lines
from admin_tui.widgets.live_table import LiveTable
from admin_tui.work import Work

_THEME = Theme(
    name="cloister", primary=colours.MUTED, foreground=colours.INK, background=colours.PAPER,
    surface=colours.PAPER, panel=colours.PAPER, dark=True,
)  # fmt: skip
# Layout alone; colours are the tones' (widgets/colours.py). No scrollbars: they cost characters and bytes.
_LAYOUT = """
* { scrollbar-size: 0 0; }
#status, #tabs, #note, #keys { height: 1; }
#pages { height: 1fr; margin-top: 1; }
#pages > Vertical { height: 1fr; }
.head { height: 2; }
.two { height: 3; }
#deployments, #tenants-now { margin-bottom: 1; }
#detail { height: 1fr; }
.dashboard #pages { height: 3fr; }
.dashboard #detail { height: 2fr; }
"""


class ConsoleApp(App[None]):
    """The operator's console.

    Args:
        port: the appliance.
        home: its home directory, as it is shown.
        ansi: paint in the terminal's own sixteen colours.
        utf8: characters beyond ASCII arrive.
        live: ask by itself; without it somebody calls `poll`.
        clock: monotonic seconds.
        now: the time of day.
        driver_class: what paints; Textual's choice when absent.
    """

    CSS = _LAYOUT
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(",".join(a.keys), f"do('{a.id}')", show=False) for a in ACTIONS
    ]

    def __init__(
        self,
        port: Port,
        home: str,
        *,
        ansi: bool = True,
        utf8: bool = True,
        live: bool = True,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        driver_class: type[Driver] | None = None,
    ) -> None:
        super().__init__(driver_class=driver_class)
        self.port, self.home, self.utf8, self.clock, self.now = port, home, utf8, clock, now
        self.state = State()
        self.page = Page.DASHBOARD
        self._ansi, self._live = ansi, live
        self._wake = asyncio.Event()
        self._turn = 0
        self._focused: dict[Page, LiveTable] = {}
        self._work = Work(self)

    def compose(self) -> ComposeResult:
        """Two lines above, the page and its detail, two lines below."""
        yield Lines(id="status")
        yield Lines(id="tabs")
        with ContentSwitcher(initial=self.page.value, id="pages"):
            for name, page in PAGES.items():
                with Vertical(id=name.value):
                    yield from page.compose()
        yield Detail(id="detail")
        yield Lines(id="note")
        yield Lines(id="keys")

    def on_mount(self) -> None:
        """Colours, the first table's focus, the first question."""
        if not self._ansi:
            self.register_theme(_THEME)
            self.theme = _THEME.name
        self._main.query_one("#detail").display = False
        self._main.add_class(self.page.value)
        self.tables[0].focus()
        if self._live:
            self.run_worker(self._run(), exit_on_error=False, group="live")

    def on_resize(self, event: events.Resize) -> None:
        """Below 80x24 nothing is shown but that."""
        small = event.size.width < LEAST[0] or event.size.height < LEAST[1]
        if small and not isinstance(self.screen, TooSmall):
            self.push_screen(TooSmall())
        elif not small and isinstance(self.screen, TooSmall):
            self.pop_screen()
        self.call_after_refresh(self.repaint)

    # What is shown

    @property
    def symbols(self) -> Symbols:
        """What the terminal can show beyond letters."""
        return UTF8 if self.utf8 else ASCII

    @property
    def _main(self) -> Screen[Any]:
        """The screen under any dialog."""
        return self.screen_stack[0]

    @property
    def tables(self) -> list[LiveTable]:
        """The tables of the page."""
        return list(self._main.query_one(f"#{self.page.value}").query(LiveTable))

    @property
    def table(self) -> LiveTable:
        """The one that keys go to."""
        return next((t for t in self.tables if t is self._main.focused or t.has_focus), self._last_table())

    def take(self, event: Event) -> None:
        """Take what was said into the state, and show it."""
        self.state = reduce(self.state, event)
        self.repaint()

    def say(self, text: str, bad: bool = False) -> None:
        """Put a note on the line above the keys."""
        self.take(Noted(text, bad))

    def repaint(self) -> None:
        """Show the state; what is as before is not painted."""
        if not self.is_running or not self.size.width:
            return
        symbols, width = self.symbols, self.size.width
        self._line("status", chrome.status_line(self.state, width, symbols))
        self._show_tabs()
        self._line("note", chrome.note_line(self.state, width, symbols))
        detailed = self._main.query_one("#detail").display
        self._line("keys", chrome.keys_line(self.page, width, detailed))
        PAGES[self.page].show(self._main, self.state, symbols, width)
        self._show_detail()

    def on_live_table_chosen(self) -> None:
        """The detail follows the cursor."""
        if self.is_running:
            self._show_tabs()
            self._show_detail()

    def _show_tabs(self) -> None:
        line = chrome.tabs_line(self.state, self.page, self._standing(), self.home, self.size.width, self.symbols)
        self._line("tabs", line)

    def _line(self, name: str, line: Line) -> None:
        self._main.query_one(f"#{name}", Lines).show([line])

    def _standing(self) -> Line:
        """Frozen, sorted: how the table stands."""
        table = self.table
        frozen = [("FROZEN ", Tone.WARN)] if table.frozen else []
        return (*frozen, (f"by {table.sorted_by}" if table.sorted_by else "", Tone.DIM))

    def _last_table(self) -> LiveTable:
        return self._focused.get(self.page) or self.tables[0]

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """Which table of a page keys went to last."""
        if isinstance(event.widget, LiveTable) and event.widget in self.tables:
            self._focused[self.page] = event.widget

    def _show_detail(self) -> None:
        pane = self._main.query_one("#detail", Detail)
        if pane.display:
            table = self.table
            facts = PAGES[self.page].detail(self.state, table.id or "", table.chosen or "")
            pane.set_facts(facts or (("", "nothing is chosen", Tone.DIM),))

    # What is asked

    async def _run(self) -> None:
        """Ask every second; on a slow terminal less often."""
        interval = 1.0
        while True:
            try:
                await self.poll()
            except Exception as error:  # a defect of ours; the operator keeps a screen that says so and asks on
                self.notify_defect(error)
            driver = self._driver
            drain = driver.drain.slowest() if isinstance(driver, TerminalDriver) else 0.0
            interval = next_interval(interval, drain)
            try:
                await asyncio.wait_for(self._wake.wait(), interval)
            except TimeoutError:
                continue
            self._wake.clear()

    def notify_defect(self, error: Exception) -> None:
        """Say that something went wrong here, on the note line."""
        self.state = reduce(self.state, Noted(f"CONSOLE_DEFECT: {type(error).__name__}: {error}", bad=True))
        self._line("note", chrome.note_line(self.state, self.size.width, self.symbols))

    async def poll(self) -> None:
        """Ask once, and show the answers."""
        page, turn = self.page, self._turn
        self._turn += 1
        for event in await ask(lambda: feed.poll(self.port, page, turn, self.clock, self.now)):
            self.state = reduce(self.state, event)
        self.repaint()

    def ask_soon(self) -> None:
        """Ask now, all of what the page shows."""
        self._turn = 0
        self._wake.set()

    # What keys do

    def action_do(self, name: str) -> None:
        """Do one of the actions of the table, where it is offered."""
        chosen = action(name)
        if name == "quit":
            self.exit()
        elif len(self.screen_stack) > 1 or not chosen.offered(self.page):
            return
        elif chosen.shows is not None:
            self.show_page(chosen.shows)
        else:
            getattr(self, f"_do_{name.replace('.', '_')}", lambda: self._work.do(name))()

    def show_page(self, page: Page) -> None:
        """Switch to another page."""
        self._close_detail()
        self._main.remove_class(self.page.value)
        self._main.add_class(page.value)
        self.page = page
        self.repaint()  # before it is shown, so that it is painted once
        self._main.query_one("#pages", ContentSwitcher).current = page.value
        self._last_table().focus()
        self.ask_soon()
        if page is Page.AUDIT and self.state.audit is None:
            self._work.do("refresh")
        self.state = reduce(self.state, Turned())
        self.call_after_refresh(self.repaint)

    def _do_detail(self) -> None:
        """Closed, half, all."""
        pane, pages = self._main.query_one("#detail", Detail), self._main.query_one("#pages")
        if not pane.display:
            pane.display = True
        elif pages.display:
            pages.display = False
            pane.focus()
        self.call_after_refresh(self.repaint)

    _do_tenant_keys = _do_detail
    _do_model_aliases = _do_detail

    def _do_back(self) -> None:
        pane, pages = self._main.query_one("#detail", Detail), self._main.query_one("#pages")
        if not pages.display:
            pages.display = True
            self._last_table().focus()
        elif pane.display:
            self._close_detail()
        elif self.page is Page.MODELS and self.state.importing and not self.state.importing.running:
            self.take(ImportSeen())
        else:
            self.show_page(Page.DASHBOARD)
        self.call_after_refresh(self.repaint)

    def _close_detail(self) -> None:
        self._main.query_one("#detail").display = False
        self._main.query_one("#pages").display = True

    def _do_focus(self) -> None:
        """The next table of the page."""
        if self._main.query_one("#pages").display:
            tables = self.tables
            tables[(tables.index(self.table) + 1) % len(tables)].focus()
            self.call_after_refresh(self.repaint)

    def _do_sort(self) -> None:
        self.table.sort_next()
        self.repaint()

    def _do_freeze(self) -> None:
        self.table.toggle_freeze()
        self.repaint()

    def _do_help(self) -> None:
        self.push_screen(Help(self.page.title(), offered(self.page)))

    def _do_palette(self) -> None:
        def chosen(name: str | None) -> None:
            if name:
                self.action_do(name)

        self.push_screen(Commands(offered(self.page)), chosen)
