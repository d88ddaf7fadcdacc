"""What the console asks, and when: the status each time, the rest as the page needs it; answers become events."""

from collections.abc import Callable
from datetime import datetime

from admin_tui.actions import Page
from admin_tui.port import Port
from admin_tui.state import Event, ModelsRead, StatusRead, TenantsRead, Unanswered, Unreached
from appliance.errors import CloisterError

# What changes seldom is asked for each time a page is entered, and then once in so many polls.
SELDOM = 5


def poll(
    port: Port, page: Page, turn: int, clock: Callable[[], float], now: Callable[[], datetime]
) -> list[Event]:
    """Ask once; never raises. Blocks: runs on a thread of its own.

    Args:
        port: the appliance.
        page: what is looked at.
        turn: polls since the page was entered.
        clock: monotonic seconds.
        now: the time of day.
    """
    try:
        status = port.status()
    except CloisterError as error:
        return [Unreached(error)]
    events: list[Event] = [StatusRead(status, clock(), now())]
    try:
        if page in (Page.DASHBOARD, Page.TENANTS):
            events.append(TenantsRead(port.tenants(), port.keys() if turn % SELDOM == 0 else None))
        elif page is Page.MODELS and turn % SELDOM == 0:
            events.append(ModelsRead(port.versions(), port.aliases(), port.imports()))
    except CloisterError as error:
        events.append(Unanswered("models" if page is Page.MODELS else "tenants", error))
    return events
