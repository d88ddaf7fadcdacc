"""A demo lives in the checkout, or says there where else it lives, so that the next one can stop and remove it."""

from pathlib import Path

import pytest

from demo import machine


@pytest.fixture
def long_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose path is too long for Unix sockets."""
    root = tmp_path / ("x" * 90)
    root.mkdir()
    monkeypatch.setattr(machine, "ROOT", root)
    return root


def test_a_demo_that_had_to_live_elsewhere_is_removed_by_the_next(long_checkout: Path) -> None:
    first = machine.Machine()
    assert first.elsewhere
    assert first.folder.parent == Path("/tmp")
    second = machine.Machine()
    assert not first.folder.exists()
    assert second.folder.exists()
    assert second.folder != first.folder
    second.tidy()
    assert not second.folder.exists()


def test_a_record_that_no_demo_can_have_made_removes_nothing(long_checkout: Path, tmp_path: Path) -> None:
    precious = tmp_path / "cl-demo-precious"
    precious.mkdir()
    (long_checkout / ".demo").mkdir()
    (long_checkout / ".demo" / "where").write_text(str(precious))
    machine.Machine().tidy()
    assert precious.exists()
