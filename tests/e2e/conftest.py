"""One appliance, in determinism mode, for all end-to-end tests that leave it as they found it."""

from collections.abc import Iterator

import pytest

from tests.e2e.appliance import Appliance, running_appliance


@pytest.fixture(scope="session")
def appliance() -> Iterator[Appliance]:
    with running_appliance("--deterministic") as running:
        yield running
