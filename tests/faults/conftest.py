"""One appliance for all fault tests: it lets a thousand streams in, and waits for no client that does not read."""

from collections.abc import Iterator

import pytest

from tests.faults.house import House, open_house

SETTINGS = """
[gateway]
max_streams = 1024
max_calls_per_certificate = 1024
stall_seconds = 2
"""


@pytest.fixture(scope="session")
def house() -> Iterator[House]:
    """An appliance that these tests may hurt."""
    with open_house(SETTINGS) as opened:
        yield opened
