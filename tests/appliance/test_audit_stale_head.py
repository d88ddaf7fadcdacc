"""An old head in place of the present one passes for what a crash leaves, and for no more."""

from pathlib import Path

import pytest

from appliance.control.audit import AuditTamperedError
from tests.appliance.audit_logs import Home, ManualClock, cut, fill
from tests.appliance.test_audit_verify import found


def aged(home: Home, first: str, then: str, steps: list[float]) -> ManualClock:
    """A log of one record, whose head is put back after one more followed each of these waits."""
    clock = ManualClock()
    clock.boot = first
    log = home.create(clock=clock)
    fill(log, [1])
    log.close()
    old = home.head.read_text()
    log = home.open(clock=clock)
    for wait in steps:
        clock.wait(wait)
        fill(log, [1])
        clock.boot = then
    log.close()
    home.head.write_text(old)
    return clock


# How long after the first record beyond the head each record was written: 0, 0.4, 0.8, 1.2, 1.6 seconds.
@pytest.mark.parametrize("idle", [0, 10_000])
@pytest.mark.parametrize(("left", "accepted"), [(2, True), (3, True), (4, True), (5, False), (6, False)])
def test_old_head_serves_a_log_cut_back_for_less_than_a_second_of_records(
    tmp_path: Path, idle: float, left: int, accepted: bool
) -> None:
    home = Home(tmp_path)
    clock = aged(home, "boot-1", "boot-1", [idle, 0.4, 0.4, 0.4, 0.4])
    home.change(lambda connection: cut(connection, left))
    if accepted:
        assert home.verify().intact
        home.open(clock=clock).close()
        assert home.verify().size == left + 1
        return
    assert found(home) == ("HEAD_STALE", 2)
    with pytest.raises(AuditTamperedError, match="HEAD_STALE") as refused:
        home.open()
    assert refused.value.reason == "HEAD_STALE"


def test_old_head_serves_no_log_that_went_on_in_another_boot(tmp_path: Path) -> None:
    home = Home(tmp_path)
    aged(home, "boot-1", "boot-2", [0.1, 0.1])
    assert found(home) == ("HEAD_STALE", 2)
    assert "more than one boot" in home.verify().message
    with pytest.raises(AuditTamperedError, match="HEAD_STALE"):
        home.open()
