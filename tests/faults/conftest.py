"""One appliance for all fault tests, without a limit that a thousand streams would meet."""

from collections.abc import Iterator

import pytest

from tests.faults.house import House, open_house

SETTINGS = """
[gateway]
max_streams = 1024
max_calls_per_certificate = 1024
"""


@pytest.fixture(scope="session")
def house() -> Iterator[House]:
    """An appliance that these tests may hurt."""
    with open_house(SETTINGS) as opened:
        yield opened
