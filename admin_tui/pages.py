"""The pages: which widgets each has, how the state fills them, and what a chosen row is in full."""

from collections.abc import Iterator
from typing import Protocol

from textual.dom import DOMNode
from textual.widget import Widget

from admin_tui.actions import Page
from admin_tui.cells import Fact, Symbols, Tone, fit
from admin_tui.state import State
from admin_tui.views import audit, dashboard, models, tenants
from admin_tui.widgets.lines import Lines
from admin_tui.widgets.live_table import LiveTable


class PageView(Protocol):
    """One page."""

    def compose(self) -> Iterator[Widget]:
        """Its widgets, from top to bottom."""

    def show(self, root: DOMNode, state: State, symbols: Symbols, width: int) -> None:
        """Fill them."""

    def detail(self, state: State, table: str, row: str) -> tuple[Fact, ...]:
        """A row of one of its tables in full."""


class DashboardPage:
    """Deployments, tenants, alerts, one under the other; a table takes the lines it needs."""

    def compose(self) -> Iterator[Widget]:
        """Three tables."""
        yield LiveTable(dashboard.DEPLOYMENTS, dashboard.NO_DEPLOYMENTS, id="deployments")
        yield LiveTable(dashboard.TENANTS, dashboard.NO_TENANTS, id="tenants-now")
        yield LiveTable(dashboard.ALERTS, dashboard.NO_ALERTS, id="alerts")

    def show(self, root: DOMNode, state: State, symbols: Symbols, width: int) -> None:
        """Rows, and heights by their number."""
        given = {
            "deployments": dashboard.deployments(state),
            "tenants-now": dashboard.tenants(state),
            "alerts": dashboard.alerts(state),
        }
        heard = {"deployments": state.status is not None, "tenants-now": state.tenants is not None}
        room = root.query_one("#dashboard", Widget).size.height - 2  # a blank line between two tables
        heights = shares([1 + max(1, len(rows)) for rows in given.values()], room)
        for (name, rows), height in zip(given.items(), heights, strict=True):
            table = root.query_one(f"#{name}", LiveTable)
            if height > 1 and (table.styles.height is None or table.styles.height.value != height):
                table.styles.height = height
            table.set_rows(rows, heard.get(name, bool(rows) or state.status is not None))

    def detail(self, state: State, table: str, row: str) -> tuple[Fact, ...]:
        """A deployment, a tenant or an alert."""
        if table == "deployments":
            return dashboard.deployment_detail(state, row)
        return tenants.detail(state, row) if table == "tenants-now" else dashboard.alert_detail(state, row)


class TenantsPage:
    """The tenants under one line about all of them."""

    def compose(self) -> Iterator[Widget]:
        """A line and a table."""
        yield Lines(id="tenants-head", classes="head")
        yield LiveTable(tenants.COLUMNS, tenants.EMPTY, id="tenant-list")

    def show(self, root: DOMNode, state: State, symbols: Symbols, width: int) -> None:
        """Rows."""
        root.query_one("#tenants-head", Lines).show([((f" {tenants.summary(state)}", Tone.DIM),)])
        root.query_one("#tenant-list", LiveTable).set_rows(tenants.rows(state), state.tenants is not None)

    def detail(self, state: State, table: str, row: str) -> tuple[Fact, ...]:
        """A tenant and its keys."""
        return tenants.detail(state, row)


class ModelsPage:
    """The versions, and under them the import that was begun here."""

    def compose(self) -> Iterator[Widget]:
        """A table and a few lines."""
        yield LiveTable(models.COLUMNS, models.EMPTY, id="versions")
        yield Lines(id="import")

    def show(self, root: DOMNode, state: State, symbols: Symbols, width: int) -> None:
        """Rows and progress."""
        root.query_one("#versions", LiveTable).set_rows(models.rows(state), state.versions is not None)
        lines = models.import_lines(state.importing, max(20, width - 2), symbols)
        block = root.query_one("#import", Lines)
        block.display = bool(lines)
        if block.display and (block.styles.height is None or block.styles.height.value != len(lines) + 1):
            block.styles.height = len(lines) + 1
        block.show([((" ", Tone.PLAIN), *line) for line in lines])

    def detail(self, state: State, table: str, row: str) -> tuple[Fact, ...]:
        """A version, its deployments and aliases."""
        return models.detail(state, row)


class AuditPageView:
    """One page of the log under the verdict and the place in it."""

    def compose(self) -> Iterator[Widget]:
        """Two lines and a table."""
        yield Lines(id="audit-head", classes="head two")
        yield LiveTable(audit.COLUMNS, audit.EMPTY, id="records")

    def show(self, root: DOMNode, state: State, symbols: Symbols, width: int) -> None:
        """Records as the server gave them."""
        text, tone = audit.summary(state)
        room = max(0, width - 2)
        head = (
            ((" " + fit(text, room, symbols), tone),),
            ((" " + fit(audit.position(state), room, symbols), Tone.DIM),),
        )
        root.query_one("#audit-head", Lines).show(head)
        root.query_one("#records", LiveTable).set_rows(audit.rows(state), state.audit is not None)

    def detail(self, state: State, table: str, row: str) -> tuple[Fact, ...]:
        """A record with its canonical body."""
        return audit.detail(state, row)


PAGES: dict[Page, PageView] = {
    Page.DASHBOARD: DashboardPage(),
    Page.TENANTS: TenantsPage(),
    Page.MODELS: ModelsPage(),
    Page.AUDIT: AuditPageView(),
}


def shares(wanted: list[int], room: int) -> list[int]:
    """Lines for each of several blocks: what it wants where that fits, else a fair share; the rest to the last."""
    given = [0] * len(wanted)
    open_blocks = list(range(len(wanted)))
    left = room
    while open_blocks:
        fair = left // len(open_blocks)
        content = [i for i in open_blocks if wanted[i] <= fair]
        for i in content or open_blocks:
            given[i] = wanted[i] if content else fair
        left -= sum(given[i] for i in content or open_blocks)
        open_blocks = [i for i in open_blocks if i not in content] if content else []
    given[-1] += left
    return given
