"""One appliance for all fault tests, with a watchdog that does not take long, and no limit that a thousand streams
would meet.
"""

from collections.abc import Iterator

import pytest

from tests.faults.house import House, open_house

HEARD_WITHIN_S = 3
SETTINGS = f"""
[watchdog]
heard_seconds = {HEARD_WITHIN_S}
[gateway]
max_streams = 1024
max_calls_per_certificate = 1024
"""


@pytest.fixture(scope="session")
def house() -> Iterator[House]:
    """An appliance that these tests may hurt."""
    with open_house(SETTINGS) as opened:
        yield opened
