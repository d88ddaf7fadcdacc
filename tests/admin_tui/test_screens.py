"""What stands on the screen at 80x24 and 120x40, and what keys do; the appliance behind it is a fake."""

import re

import grpc
import pytest

from admin_tui.actions import ACTIONS, Page, offered
from appliance.errors import CloisterError
from appliance.protos import admin_pb2
from tests.admin_tui.driving import ImportState, running, settled, until
from tests.admin_tui.fake import GONE, Clock, FakePort, deployment, screen

SIZES = [(80, 24), (120, 40)]


@pytest.mark.parametrize("size", SIZES)
async def test_the_dashboard_shows_deployments_tenants_and_that_nothing_is_wrong(size: tuple[int, int]) -> None:
    port, clock = FakePort(), Clock()
    async with running(port, size, clock) as (app, pilot):
        clock.seconds += 1
        port.answer.deployments[0].engine.tokens_generated += 840
        await app.poll()
        await pilot.pause()
        text = screen(app)
        lines = text.splitlines()
        assert len(lines) == size[1]
        assert all(len(line) <= size[0] for line in lines)
        assert re.search(r"CLOISTER  GATEWAY OK  IMPORTER OK  ENGINE OK  CHAIN 1,234 .*alice  14:03:08Z", lines[0])
        assert "[1 Dashboard]" in lines[1]
        assert lines[1].endswith(" site ward")
        assert re.search(r"notes +OK ready .*cpu f32 det +3 +0 +20% +840 +25% +2", text)
        assert re.search(r"ward-notes +OK active +3/64 +12,345 +678 notes", text)
        assert re.search(r"ALERTS *\n none", text)
        assert "q quit" in lines[-1]


async def test_a_wide_terminal_shows_more_of_each_row() -> None:
    async with running(FakePort(), (140, 40)) as (app, pilot):
        assert "demo-notes-s@1.0.1" in screen(app)
        await pilot.press("enter")
        assert "cpu float32 deterministic" in await settled(app, pilot)


async def test_counters_that_are_not_told_are_dashes() -> None:
    port = FakePort()
    port.answer.deployments[0].CopyFrom(deployment(state="loading"))
    async with running(port) as (app, _):
        assert re.search(r"notes +WARN loading .*( -){6}", re.sub(" +", " ", screen(app)))


async def test_what_is_missing_says_how_to_make_it() -> None:
    port = FakePort()
    del port.answer.deployments[:]
    port.tenant_list, port.version_list = [], []
    async with running(port) as (app, pilot):
        assert "no deployments yet: cloister model load MODEL --as NAME" in screen(app)
        assert "no tenants yet: cloister tenant add NAME --models ALIAS" in screen(app)
        await pilot.press("3")
        assert "no model versions yet: I imports a bundle" in await settled(app, pilot)


async def test_alerts_say_what_is_wrong_in_words_the_worst_first() -> None:
    port = FakePort()
    port.answer.audit_blocked = "No space left on device"
    port.answer.peers[1].connected = False
    failed, restarting = deployment("big", "failed"), deployment("old", "restarting")
    failed.reason, failed.message = "MEMORY_PLAN_DOES_NOT_FIT", "needs 9 GiB, there are 4"
    port.answer.deployments.extend([failed, restarting])
    port.tenant_list[0].suspended = True
    async with running(port) as (app, _):
        text = screen(app)
        assert "CHAIN BLOCKED" in text
        assert "ENGINE DOWN" in text
        order = [
            text.index(words) for words in ("No space left", "MEMORY_PLAN_DOES_NOT_FIT", "old  ", "suspended: its")
        ]
        assert text.index("ALERTS") < order[0]
        assert re.search(r"CRIT +big +failed: MEMORY_PLAN_DOES_NOT_FIT: needs 9", text)
        assert re.search(r"WARN +ward-notes +suspended", text)
        assert re.search(r"ward-notes +WARN suspended", text)


async def test_what_was_not_heard_is_not_said_to_be_nothing() -> None:
    """An operator who looks while control is down must not read that there are no deployments and no alerts."""
    port = FakePort()
    port.failure = GONE
    async with running(port) as (app, pilot):
        text = screen(app)
        assert text.count("not heard yet") == 2
        assert "no deployments" not in text
        assert re.search(r"CRIT +control +does not answer: nothing was heard yet", text)
        for key, lie in (("2", "no tenants"), ("3", "no model versions"), ("5", "no records match")):
            await pilot.press(key)
            text = await settled(app, pilot)
            assert "not heard yet" in text
            assert lie not in text


async def test_a_page_that_was_not_answered_says_so_until_it_is() -> None:
    port = FakePort()
    late = CloisterError("DEADLINE_EXCEEDED", "Stream removed", grpc.StatusCode.DEADLINE_EXCEEDED)
    async with running(port) as (app, pilot):
        await pilot.press("3")
        await settled(app, pilot)
        port.failures["versions"] = late
        app.ask_soon()
        await app.poll()
        await pilot.pause()
        assert "WARN models: no answer in time; shown is what was heard before" in screen(app)
        assert "demo-notes-s@1.0.1" in screen(app)
        del port.failures["versions"]
        app.ask_soon()
        await app.poll()
        await pilot.pause()
        assert "no answer" not in screen(app)


async def test_names_that_begin_alike_are_told_apart_and_headings_tell_of_rows_that_are_not_seen() -> None:
    port = FakePort()
    names = [f"radiology-reports-of-the-north-{n:02}" for n in range(30)]
    port.tenant_list = [admin_pb2.Tenant(name=name, max_concurrent=8) for name in names]
    async with running(port) as (app, _):
        text = screen(app)
        shown = re.findall(r"radiology\S*", text)
        assert len(shown) > 10
        assert len(set(shown)) == len(shown)
        assert f"TENANT 1-{len(shown)}/30" in text
        assert re.search(r"\n\n ALERTS", text)


async def test_a_tenant_at_its_limit_is_an_alert() -> None:
    port = FakePort()
    port.tenant_list[0].requests_open = 64
    async with running(port) as (app, _):
        assert re.search(r"WARN +ward-notes +at its limit of 64 requests: more are refused", screen(app))


async def test_the_way_back_is_told_where_a_row_is_open() -> None:
    async with running(FakePort()) as (app, pilot):
        assert "esc back" not in screen(app)
        for _ in range(2):
            await pilot.press("enter")
            assert "esc back" in (await settled(app, pilot)).splitlines()[-1]


async def test_control_that_is_gone_is_said_and_its_return_noticed() -> None:
    port = FakePort()
    async with running(port) as (app, pilot):
        port.failure = GONE
        await app.poll()
        await pilot.pause()
        text = screen(app)
        assert "NOT REACHABLE, trying again: no appliance answers" in text
        assert "last heard 14:03:07Z" in text
        assert "ward-notes" in text
        port.failure = None
        await app.poll()
        await pilot.pause()
        assert "NOT REACHABLE" not in screen(app)


async def test_an_operator_who_is_refused_reads_why() -> None:
    port = FakePort()
    async with running(port) as (app, pilot):
        no = grpc.StatusCode.PERMISSION_DENIED
        port.failure = CloisterError("OPERATOR_SUSPENDED", "ask another operator", no)
        await app.poll()
        await pilot.pause()
        assert "REFUSED OPERATOR_SUSPENDED, trying again: ask another operator" in screen(app)


async def test_a_console_begun_before_its_appliance_waits_for_it() -> None:
    port = FakePort()
    port.failure = GONE
    async with running(port) as (app, pilot):
        assert "NOT REACHABLE" in screen(app)
        port.failure = None
        await app.poll()
        await pilot.pause()
        assert "GATEWAY OK" in screen(app)


@pytest.mark.parametrize("size", SIZES)
async def test_tenants_with_their_keys(size: tuple[int, int]) -> None:
    async with running(FakePort(), size) as (app, pilot):
        await pilot.press("2")
        text = await settled(app, pilot)
        assert "[2 Tenants]" in text
        assert "1 tenant, 3 requests open, 12,345 tokens spent + 678 reserved" in text
        assert re.search(r"ward-notes +OK active +3/64 +100 +12,345 +678 +1 notes", text)
        await pilot.press("enter")
        text = await settled(app, pilot)
        assert "64 requests at once (3 now), weight 100" in text
        assert re.search(r"key active +summary +cbb503ba7ff8 +expires 2027-02-19 \(in 90 days\)", text)


async def test_detail_opens_half_then_whole_and_closes_step_by_step() -> None:
    async with running(FakePort()) as (app, pilot):
        await pilot.press("enter")
        assert "KV pages   40 in use, 40 kept for a prefix, 120 free of 200" in await settled(app, pilot)
        assert "DEPLOYMENT" in screen(app)
        await pilot.press("enter")
        await settled(app, pilot)
        assert "DEPLOYMENT" not in screen(app)
        await pilot.press("escape")
        await settled(app, pilot)
        assert "DEPLOYMENT" in screen(app)
        assert "KV pages" in screen(app)
        await pilot.press("escape")
        await settled(app, pilot)
        assert "KV pages" not in screen(app)


async def test_tab_goes_to_the_next_table_and_the_detail_follows() -> None:
    async with running(FakePort()) as (app, pilot):
        await pilot.press("tab", "enter")
        text = await settled(app, pilot)
        assert "▌ward-notes" in text
        assert "64 requests at once" in text


async def test_models_with_signers_deployments_and_aliases() -> None:
    async with running(FakePort()) as (app, pilot):
        await pilot.press("3", "a")
        text = await settled(app, pilot)
        assert re.search(r"demo-notes-s@1.0.1 +1 7cceb7f40160 active +3.6 MiB OK ready notes", text)
        assert "signed by  00945d3d" in text
        assert "OK ready, as notes" in text
        assert "  alias    notes" in text


@pytest.mark.parametrize("page", list(Page))
async def test_help_and_palette_hold_what_the_table_of_actions_says_for_the_page(page: Page) -> None:
    async with running(FakePort(), (120, 40)) as (app, pilot):
        app.show_page(page)
        await settled(app, pilot)
        for key in ("question_mark", "colon"):
            await pilot.press(key)
            await pilot.pause()
            text = screen(app)
            for a in offered(page):
                assert a.title in text
                assert " ".join(a.twin) in text
            await pilot.press("escape")
            await pilot.pause()
        footer = screen(app).splitlines()[-1]
        assert all(a.hint in footer for a in offered(page))


async def test_a_command_is_found_by_its_words_and_done() -> None:
    async with running(FakePort()) as (app, pilot):
        await pilot.press("colon", *"tenant lim", "enter")
        assert "[2 Tenants]" in await settled(app, pilot)


async def test_keys_of_one_page_do_nothing_on_another() -> None:
    port = FakePort()
    async with running(port) as (app, pilot):
        before = list(port.calls)
        await pilot.press("v", "I", "n", "slash")
        await pilot.pause()
        assert port.calls == before
        assert len(app.screen_stack) == 1


async def test_frozen_rows_say_so_and_hold() -> None:
    port = FakePort()
    async with running(port) as (app, pilot):
        await pilot.press("space")
        port.answer.deployments[0].state = "draining"
        assert "FROZEN" in await settled(app, pilot)
        assert "draining" not in screen(app)
        await pilot.press("space")
        await settled(app, pilot)
        assert "draining" in screen(app)


@pytest.mark.parametrize("size", [(79, 24), (80, 23), (20, 5)])
async def test_a_terminal_below_80x24_shows_only_that_and_takes_every_key_but_quit(size: tuple[int, int]) -> None:
    port = FakePort()
    async with running(port, size) as (app, pilot):
        await pilot.pause()
        assert "need 80x24" in screen(app)
        assert "CLOISTER" not in screen(app)
        await pilot.press("3", "question_mark", "colon", "escape", "enter")
        await pilot.pause()
        assert "need 80x24" in screen(app)
        assert app.page is Page.DASHBOARD
        await pilot.resize_terminal(80, 24)
        await settled(app, pilot)
        assert "DEPLOYMENT" in screen(app)
        await pilot.resize_terminal(*size)
        await pilot.pause()
        await pilot.press("q")
        await pilot.pause()
        assert not app.is_running


async def test_without_utf8_everything_on_the_screen_is_ascii() -> None:
    port = FakePort()
    port.tenant_list[0].name = "zürich"
    port.progress = [ImportState(state="streaming", bytes_done=1, bytes_total=3, file="ü")] * 2
    async with running(port, utf8=False) as (app, pilot):
        for keys in (
            "1",
            "enter",
            "2",
            "enter",
            "3",
            "I",
            "escape",
            "question_mark",
            "escape",
            "colon",
            "escape",
            "5",
        ):
            await pilot.press(keys)
            text = await settled(app, pilot)
            assert text.isascii(), (keys, [c for c in text if not c.isascii()])
        await pilot.press("3", "I", *"/m", "enter", "tab", "enter")
        await until(pilot, app, "33%")
        assert screen(app).isascii()
        port.go.set()


@pytest.mark.parametrize("keys", [["q"], ["ctrl+c"], ["question_mark", "ctrl+c"], ["3", "I", "ctrl+q"]])
async def test_quitting_works_from_everywhere(keys: list[str]) -> None:
    async with running(FakePort()) as (app, pilot):
        await pilot.press(*keys)
        await pilot.pause()
        assert not app.is_running


def test_pages_have_digits_and_each_is_an_action() -> None:
    assert {a.shows: a.key for a in ACTIONS if a.shows} == dict(zip(Page, "1235", strict=True))
