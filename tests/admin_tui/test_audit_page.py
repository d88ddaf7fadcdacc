"""The audit log on the screen: pages, filters, a record, a verdict."""

import re

import pytest

from appliance.protos import admin_pb2
from tests.admin_tui.driving import running, settled
from tests.admin_tui.fake import FakePort, record, screen


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
