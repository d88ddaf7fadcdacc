"""A terminal that swallows slowly is noticed, the one that is stuck while it is stuck."""

import io

import pytest

from admin_tui.drain import Drain
from tests.admin_tui.fake import Clock


class Slow(io.StringIO):
    """Takes seconds of the test's clock for each write."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.takes = clock, 0.0
        self.during: list[float] = []
        self.drain: Drain | None = None

    def write(self, text: str) -> int:
        self.clock.seconds += self.takes
        if self.drain is not None:
            self.during.append(self.drain.slowest())
        return super().write(text)


def test_the_slowest_write_since_the_last_look_is_told_once() -> None:
    clock = Clock()
    file = Slow(clock)
    drain = Drain(file, clock)
    for file.takes in (0.1, 0.7, 0.2):
        drain.write("x")
    assert drain.slowest() == pytest.approx(0.7)
    assert drain.slowest() == 0.0
    assert file.getvalue() == "xxx"


def test_a_write_that_is_stuck_counts_with_its_time_so_far() -> None:
    clock = Clock()
    file = Slow(clock)
    drain = file.drain = Drain(file, clock)
    file.takes = 4.0
    drain.write("x")
    assert file.during == [pytest.approx(4.0)]
