"""The console on a terminal of its own inside a test, polled by hand."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from textual.pilot import Pilot

from admin_tui.app import ConsoleApp
from appliance.protos import admin_pb2
from tests.admin_tui.fake import Clock, FakePort, console, screen

ImportState = admin_pb2.ImportBundleResponse


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


async def until(pilot: Pilot[None], app: ConsoleApp, words: str) -> None:
    for _ in range(200):
        await pilot.pause(0.02)
        if words in screen(app):
            return
    raise AssertionError(f"{words!r} never came:\n{screen(app)}")
