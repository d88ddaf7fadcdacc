"""The painted bytes: few enough for a serial line, and no text that somebody chose acts on the terminal."""

import re

import pytest

from admin_tui.actions import Page
from appliance.protos import admin_pb2
from tests.admin_tui.fake import Clock, FakePort, console, deployment, grow, record
from tests.admin_tui.painting import PaintingDriver, painted

BUDGET = 2048
"""Bytes per second on a steady dashboard at 80x24."""
HOSTILE = "\x1b[2J\x1b]0;owned\x07[red]\u202ednegel\u200b\x9b31m\r\nbad"


@pytest.mark.parametrize("ansi", [True, False], ids=["ansi", "truecolour"])
async def test_a_steady_dashboard_stays_within_the_wire_budget(ansi: bool) -> None:
    port, clock, seconds = FakePort(), Clock(), 20
    port.answer.deployments.extend(deployment(f"other-{n}") for n in range(2))
    port.tenant_list += [admin_pb2.Tenant(name=f"tenant-{n}", max_concurrent=8, weight=100) for n in range(3)]
    app = console(port, clock, ansi=ansi, driver_class=PaintingDriver)
    async with app.run_test(headless=False) as pilot:
        await app.poll()
        await pilot.pause()
        painted(app)
        costs = []
        for second in range(seconds):
            grow(port, clock, second)
            await app.poll()
            await pilot.pause()
            costs.append(len(painted(app)))
    assert min(costs) > 0
    assert sum(costs) / seconds <= BUDGET, costs


async def test_what_did_not_change_costs_nothing() -> None:
    port = FakePort()
    app = console(port, driver_class=PaintingDriver)
    async with app.run_test(headless=False) as pilot:
        await app.poll()
        await pilot.pause()
        painted(app)
        for _ in range(5):
            await app.poll()
            await pilot.pause()
        assert painted(app) == b""


def hostile_port() -> FakePort:
    port = FakePort()
    found = port.answer.deployments[0]
    found.name = found.model_version = found.runs_as = HOSTILE
    found.state, found.reason, found.message = "failed", HOSTILE, HOSTILE
    port.answer.operator = port.answer.audit_blocked = HOSTILE
    port.tenant_list[0].name = HOSTILE
    port.tenant_list[0].models[:] = [HOSTILE]
    port.key_list[0].tenant = port.key_list[0].application = HOSTILE
    port.version_list[0].name = port.version_list[0].version = port.version_list[0].architecture = HOSTILE
    port.alias_list[0].name = port.alias_list[0].deployment = HOSTILE
    bad = record(251, kind=HOSTILE, actor=HOSTILE, tenant=HOSTILE, decision=HOSTILE)
    bad.body_json = '{"a":"' + HOSTILE + '"}'
    port.log.append(bad)
    port.verdict = admin_pb2.VerifyAuditResponse(intact=False, reason=HOSTILE, message=HOSTILE)
    port.progress = [admin_pb2.ImportBundleResponse(state="rejected", reason=HOSTILE, message=HOSTILE)]
    port.go.set()
    return port


async def test_hostile_text_reaches_the_terminal_as_text() -> None:
    """Every page and detail shows it; the bytes hold no escape sequence but colours and placements."""
    port = hostile_port()
    app = console(port, driver_class=PaintingDriver)
    async with app.run_test(headless=False, size=(200, 60)) as pilot:
        await app.poll()
        painted(app)
        for page in Page:
            app.show_page(page)
            await app.poll()
            await app.workers.wait_for_complete()
            app.action_do("detail")
            await pilot.pause()
            if page is Page.AUDIT:
                app.action_do("audit.verify")
                await app.workers.wait_for_complete()
            await pilot.pause()
            text = painted(app).decode()
            assert r"\x1b[2J\x1b]0;owned\x07[red]\u202ednegel\u200b\x9b31m\x0d\x0abad" in text, page
            _holds_only_what_we_paint(text)


async def test_a_hostile_import_is_told_literally() -> None:
    port = hostile_port()
    app = console(port, driver_class=PaintingDriver)
    async with app.run_test(headless=False, size=(200, 60)) as pilot:
        app.show_page(Page.MODELS)
        await pilot.press("I", *"/x", "enter")
        await pilot.pause()
        await pilot.press("tab", "enter")
        await pilot.pause()
        await app.workers.wait_for_complete()
        await pilot.pause()
        text = painted(app).decode()
        assert r"REJECTED \x1b[2J" in text
        _holds_only_what_we_paint(text)


def _holds_only_what_we_paint(text: str) -> None:
    """Colours (SGR) and cursor placements (CUP) are all the escape sequences; no other control is there."""
    rest = re.sub(r"\x1b\[[0-9;]*[mH]", "", text)
    rest = re.sub(
        r"\x1b\[\?2026[hl]|\x1b\]22;default\x07", "", rest
    )  # synchronized output, pointer: Textual's own
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e]", rest), repr(rest[:2000])
