"""Tables that change under the cursor."""

from collections.abc import Sequence

import pytest
from textual.app import App, ComposeResult

from admin_tui.cells import Cell, Column, Row
from admin_tui.widgets.live_table import MOST_ROWS, LiveTable
from tests.admin_tui.painting import PaintingDriver, painted

COLUMNS = (Column("NAME", 10), Column("COUNT", 8, right=True))


def rows(*names: str, count: int = 1) -> list[Row]:
    return [Row(name, (Cell(name), Cell(str(count), order=float(count)))) for name in names]


class Host(App[None]):
    def __init__(self) -> None:
        super().__init__(driver_class=PaintingDriver)

    def compose(self) -> ComposeResult:
        yield LiveTable(COLUMNS, "nothing yet", id="table")

    @property
    def table(self) -> LiveTable:
        return self.query_one(LiveTable)


def shown(table: LiveTable) -> list[str]:
    return [line.strip(" ▌").split()[0] for line in table.text().splitlines()[1:]]


async def test_only_the_row_that_changed_is_painted() -> None:
    app = Host()
    async with app.run_test(headless=False, size=(80, 24)) as pilot:
        names = [f"row-{n:02d}" for n in range(20)]
        app.table.set_rows(rows(*names))
        await pilot.pause()
        painted(app)
        changed = rows(*names)
        changed[7] = rows("row-07", count=99)[0]
        app.table.set_rows(changed)
        await pilot.pause()
        text = painted(app).decode()
        assert "row-07" in text
        assert not any(name in text for name in names if name != "row-07")


async def test_the_cursor_stays_on_its_row_wherever_the_row_goes() -> None:
    app = Host()
    async with app.run_test() as pilot:
        app.table.set_rows(rows("a", "b", "c"))
        await pilot.press("down")
        assert app.table.chosen == "b"
        app.table.set_rows(rows("new", "c", "a", "b"))
        await pilot.pause()
        assert app.table.chosen == "b"
        assert app.table.text().splitlines()[4].startswith("▌b")


async def test_when_the_chosen_row_is_gone_the_one_in_its_place_is_chosen() -> None:
    app = Host()
    async with app.run_test() as pilot:
        app.table.set_rows(rows("a", "b", "c"))
        await pilot.press("down", "down")
        app.table.set_rows(rows("a"))
        assert app.table.chosen == "a"
        app.table.set_rows([])
        assert app.table.chosen is None
        assert "nothing yet" in app.table.text()


async def test_a_frozen_table_holds_its_rows_and_shows_the_newest_when_it_thaws() -> None:
    app = Host()
    async with app.run_test():
        app.table.set_rows(rows("a", "b"))
        app.table.toggle_freeze()
        app.table.set_rows(rows("x"))
        assert shown(app.table) == ["a", "b"]
        app.table.toggle_freeze()
        assert shown(app.table) == ["x"]


async def test_sorting_goes_through_the_columns_both_ways_and_back_to_the_order_given() -> None:
    """Numbers begin with the largest: that is what one looks for."""
    app = Host()
    async with app.run_test() as pilot:
        given = [*rows("b", count=10), *rows("a", count=9), *rows("c", count=100)]
        app.table.set_rows(given)
        orders = [shown(app.table)]
        for _ in range(5):
            app.table.sort_next()
            await pilot.pause()
            orders.append(shown(app.table))
        assert orders == [
            ["b", "a", "c"], ["a", "b", "c"], ["c", "b", "a"], ["c", "b", "a"], ["a", "b", "c"], ["b", "a", "c"],
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "chosen"),
    [(["G"], "n499"), (["G", "g"], "n0"), (["pagedown"], "n22"), (["j", "j", "k"], "n1"), (["end", "up"], "n498")],
)
async def test_the_cursor_is_always_in_view(keys: Sequence[str], chosen: str) -> None:
    app = Host()
    async with app.run_test(size=(80, 24)) as pilot:
        app.table.set_rows(rows(*[f"n{n}" for n in range(MOST_ROWS + 100)]))
        await pilot.press(*keys)
        await pilot.pause()
        assert app.table.chosen == chosen
        assert chosen in shown(app.table)
        assert app.table.span.endswith("/500+")
