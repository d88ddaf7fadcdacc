"""What stands on the screen at 80x24 and 120x40, and what keys do; the appliance behind it is a fake."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from textual.pilot import Pilot

from admin_tui.actions import ACTIONS, Page, offered
from admin_tui.app import ConsoleApp
from admin_tui.state import ImportLost, ImportTold
from appliance.errors import CloisterError
from appliance.protos import admin_pb2
from tests.admin_tui.fake import GONE, Clock, FakePort, console, deployment, record, screen

SIZES = [(80, 24), (120, 40)]
ImportState = admin_pb2.ImportBundleResponse
WHAT_TO_DO = "copy the bundle again from the medium, and if it is refused again ask its publisher for another"


@asynccontextmanager
async def running(
    port: FakePort, size: tuple[int, int] = (80, 24), clock: Clock | None = None, **options: object
) -> AsyncIterator[tuple[ConsoleApp, Pilot[None]]]:
    app = console(port, clock, **options)
    async with app.run_test(size=size) as pilot:
        await app.poll()
        await pilot.pause()
        yield app, pilot


async def settled(app: ConsoleApp, pilot: Pilot[None]) -> str:
    """The screen once everything asked for has been answered."""
    await pilot.pause()
    await app.workers.wait_for_complete()
    await app.poll()
    await pilot.pause()
    return screen(app)


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
        assert re.search(r"demo-notes-s@1.0.1 +1 7cceb7f40160 +2 +3.6 MiB OK ready notes", text)
        assert "signed by  00945d3d" in text
        assert "OK ready, as notes" in text
        assert "  alias    notes" in text


async def test_an_import_asks_twice_with_the_focus_on_cancel() -> None:
    port = FakePort()
    async with running(port) as (app, pilot):
        await pilot.press("3", "I", *"/m/q", "enter")
        await pilot.pause()
        text = screen(app)
        assert "Import this bundle?" in text
        assert " /m/q " in text
        assert "[ Cancel ]" in text
        await pilot.press("enter")
        await settled(app, pilot)
        assert not any(call.startswith("import") for call in port.calls)


async def test_an_import_shows_bytes_rate_time_left_state_and_file_and_then_its_end() -> None:
    port, clock = FakePort(), Clock()

    def streaming(done: int) -> ImportState:
        return ImportState(
            state="streaming",
            bytes_done=done,
            bytes_total=200 << 20,
            file="model.safetensors",
            model_version="qwen@2.1",
        )

    port.progress = [
        ImportState(state="quarantine"),
        streaming(0),
        ImportState(state="committed", bytes_done=200 << 20, bytes_total=200 << 20, model_version="qwen@2.1"),
    ]
    async with running(port, clock=clock) as (app, pilot):
        await pilot.press("3", "I", *"/m", "enter", "tab", "enter")
        await until(pilot, app, "streaming")
        clock.seconds += 10
        app.take(ImportTold(streaming(100 << 20), clock()))
        await pilot.pause()
        text = screen(app)
        assert "IMPORT qwen@2.1  /m" in text
        assert "streaming  model.safetensors" in text
        assert "████████████░░░░░░░░░░░░  50%  100.0 MiB of 200.0 MiB  10.0 MiB/s  0:10 left" in text
        await pilot.press("I")
        await pilot.pause()
        assert "an import is running: /m" in screen(app)
        port.go.set()
        await until(pilot, app, "OK committed qwen@2.1, 200.0 MiB verified")
        await pilot.press("escape")
        assert "IMPORT qwen" not in await settled(app, pilot)


async def test_an_import_that_stands_still_is_told_and_its_share_is_seen_from_other_pages() -> None:
    port, clock = FakePort(), Clock()
    moving = ImportState(state="streaming", bytes_done=50, bytes_total=200, model_version="qwen@2.1")
    port.progress = [moving, moving]
    async with running(port, clock=clock) as (app, pilot):
        await pilot.press("3", "I", *"/m", "enter", "tab", "enter")
        await until(pilot, app, "25%")
        clock.seconds += 9
        assert "WARN" not in await settled_but_import(app, pilot)
        clock.seconds += 36
        text = await settled_but_import(app, pilot)
        assert "streaming  WARN nothing moved for 0:45: is the medium still there?" in text
        await pilot.press("2")
        assert "3 Models 25%" in (await settled_but_import(app, pilot)).splitlines()[1]
        port.go.set()


async def settled_but_import(app: ConsoleApp, pilot: Pilot[None]) -> str:
    await app.poll()
    await pilot.pause()
    return screen(app)


async def test_an_import_out_of_sight_says_how_to_find_it_again() -> None:
    port = FakePort()
    port.progress = [ImportState(state="streaming", bytes_done=50, bytes_total=200)] * 2
    async with running(port) as (app, pilot):
        await pilot.press("3", "I", *"/m", "enter", "tab", "enter")
        await until(pilot, app, "25%")
        app.take(ImportLost(GONE))
        await pilot.pause()
        text = re.sub(r"\s+", " ", screen(app))
        assert "WARN NOT_RUNNING: no appliance answers" in text
        assert "I with the same path joins it" in text
        port.go.set()


async def until(pilot: Pilot[None], app: ConsoleApp, words: str) -> None:
    for _ in range(200):
        await pilot.pause(0.02)
        if words in screen(app):
            return
    raise AssertionError(f"{words!r} never came:\n{screen(app)}")


async def test_a_rejected_bundle_shows_code_and_message() -> None:
    port = FakePort()
    port.progress = [
        ImportState(
            state="rejected", reason="CHUNK_DIGEST", message="chunk 7 is not what was signed; " + WHAT_TO_DO
        )
    ]
    port.go.set()
    async with running(port) as (app, pilot):
        await pilot.press("3", "I", *"/m", "enter", "tab", "enter")
        text = re.sub(r"\s+", " ", await settled(app, pilot))
        assert "CRIT REJECTED CHUNK_DIGEST: chunk 7 is not what was signed; " + WHAT_TO_DO in text


async def test_an_import_refused_at_the_door_says_why() -> None:
    port = FakePort()
    async with running(port) as (app, pilot):
        await pilot.press("3", "I", *"/m", "enter")
        port.failure = CloisterError("ROLE_REQUIRED", "this needs the role operator")
        await pilot.press("tab", "enter")
        assert "CRIT REFUSED ROLE_REQUIRED: this needs the role operator" in await settled(app, pilot)


async def test_the_audit_log_is_read_newest_first_page_by_page() -> None:
    port = FakePort()
    async with running(port) as (app, pilot):
        await pilot.press("5")
        text = await settled(app, pilot)
        assert "151..250 of 250" in text
        assert re.search(r"▌ +250 11-21 14:07:17 operator.read +allow +alice +QueryAudit", text)
        await pilot.press("n")
        assert "51..150 of 250" in await settled(app, pilot)
        await pilot.press("n")
        assert "1..50 of 250" in await settled(app, pilot)
        await pilot.press("n")
        assert "these are the oldest" in await settled(app, pilot)
        await pilot.press("p")
        assert "51..150 of 250" in await settled(app, pilot)
        assert [q.before_sequence for q in port.queries] == [0, 151, 51, 151]


async def test_looking_at_the_log_does_not_read_it_again_by_itself() -> None:
    """Each reading is a record in the log; a console left open would fill it."""
    port = FakePort()
    async with running(port) as (app, pilot):
        await pilot.press("5")
        await settled(app, pilot)
        for _ in range(5):
            port.answer.audit_size += 1
            await app.poll()
        await pilot.pause()
        assert len(port.queries) == 1
        assert "989 newer: r" in screen(app)
        await pilot.press("r")
        await settled(app, pilot)
        assert len(port.queries) == 2


async def test_the_server_is_asked_for_what_matches() -> None:
    port = FakePort()
    port.log.append(record(251, kind="inference.refused", decision="deny"))
    async with running(port) as (app, pilot):
        await pilot.press("5")
        await settled(app, pilot)
        await pilot.press("slash", *"inference. decision:deny tenant:ward", "enter")
        text = await settled(app, pilot)
        asked = port.queries[-1]
        assert (asked.kind_prefix, asked.decision, asked.tenant) == ("inference.", "deny", "ward")
        assert "kind:inference. tenant:ward decision:deny" in text
        assert "inference.refused" in text
        assert "operator.read" not in text
        await pilot.press("slash", "ctrl+u", *"colour:red", "enter")
        assert "BAD_FILTER: no field colour" in await settled(app, pilot)


async def test_a_record_is_shown_with_its_canonical_body() -> None:
    async with running(FakePort()) as (app, pilot):
        await pilot.press("5")
        await settled(app, pilot)
        await pilot.press("enter", "enter")
        text = await settled(app, pilot)
        assert "record     250  operator.read  event  allow" in text
        assert '"method": "QueryAudit"' in text
        assert "leaf hash  " + "00" * 32 in text


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (
            admin_pb2.VerifyAuditResponse(intact=True, size=1234, root=bytes(range(32))),
            "OK INTACT 1..1,234  head 00010203",
        ),
        (
            admin_pb2.VerifyAuditResponse(
                first_bad_sequence=17, reason="LEAF_CHANGED", message="record 17 was changed"
            ),
            "CRIT NOT INTACT at record 17: LEAF_CHANGED: record 17 was changed",
        ),
    ],
)
async def test_a_verdict_is_shown_in_words(verdict: admin_pb2.VerifyAuditResponse, words: str) -> None:
    port = FakePort()
    port.verdict = verdict
    async with running(port) as (app, pilot):
        await pilot.press("5")
        await settled(app, pilot)
        await pilot.press("v")
        assert words in await settled(app, pilot)


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
