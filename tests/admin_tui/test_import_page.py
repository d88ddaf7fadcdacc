"""An import on the screen: asked for twice, watched, out of sight, refused."""

import re

from textual.pilot import Pilot

from admin_tui.app import ConsoleApp
from admin_tui.state import ImportLost, ImportTold
from appliance.errors import CloisterError
from appliance.protos import admin_pb2
from tests.admin_tui.driving import ImportState, running, settled, until
from tests.admin_tui.fake import GONE, Clock, FakePort, screen

WHAT_TO_DO = "copy the bundle again from the medium, and if it is refused again ask its publisher for another"


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
        assert not any(call.startswith("import_bundle") for call in port.calls)


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


async def test_a_volume_that_is_wanted_is_asked_for_and_named_with_the_same_key() -> None:
    port = FakePort()
    waiting = ImportState(
        import_id="i1", state="streaming", bytes_done=50, bytes_total=200, volume_wanted=2, volumes=3,
        bytes_per_second=5 << 20, volume_refused="VOLUME_ORDER: this is volume 3",
    )  # fmt: skip
    port.progress = [waiting, waiting]
    async with running(port) as (app, pilot):
        await pilot.press("3", "I", *"/m", "enter", "tab", "enter")
        await until(pilot, app, "25%")
        text = screen(app)
        assert "WARN waits for volume 2 of 3: I names it  VOLUME_ORDER: this is volume 3" in text
        assert "5.0 MiB/s" in text, "the rate is the importer's own"
        await pilot.press("I")
        await until(pilot, app, "Volume 2 of 3")
        await pilot.press(*"/n", "enter")
        await pilot.pause()
        assert "offer_volume i1 /n" in port.calls
        port.go.set()


async def test_an_import_that_somebody_else_began_is_seen_with_the_way_to_join_it() -> None:
    port = FakePort()
    progress = ImportState(state="streaming", bytes_done=50, bytes_total=200)
    port.import_list = [admin_pb2.Import(path="/media/q", progress=progress)]
    async with running(port) as (app, pilot):
        await pilot.press("3")
        assert "IMPORT streaming elsewhere: I with /media/q joins it" in await settled(app, pilot)
        port.import_list = []
        await pilot.press("1", "3")
        assert "elsewhere" not in await settled(app, pilot)
