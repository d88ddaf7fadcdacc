"""A gateway in a test's own process tells control every fifth of a second that it lives, not every second."""

import pytest


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test waits for is the next heartbeat or count of refusals; how often they come is no claim."""
    monkeypatch.setattr("appliance.gateway.server.HEARTBEAT_S", 0.2)
    monkeypatch.setattr("appliance.gateway.refusals.INTERVAL_S", 0.2)
