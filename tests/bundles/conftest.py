"""Fixtures: one trust root, one signed bundle to copy from."""

import shutil
from pathlib import Path

import pytest

from tests.bundles.making import Trust, make_bundle, make_trust


@pytest.fixture(scope="session")
def trust() -> Trust:
    return make_trust()


@pytest.fixture(scope="session")
def signed_once(tmp_path_factory: pytest.TempPathFactory, trust: Trust) -> Path:
    return make_bundle(tmp_path_factory.mktemp("signed") / "tiny.bundle", trust)


@pytest.fixture
def bundle(tmp_path: Path, signed_once: Path) -> Path:
    """A signed bundle of this test's own."""
    return Path(shutil.copy(signed_once, tmp_path / "tiny.bundle"))
