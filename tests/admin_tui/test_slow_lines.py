"""A serial line of 115,200 baud, and a terminal that nobody reads: the console can be used, and ends when told."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator

import pytest

BYTES_PER_S = 11_500
HALF_A_SECOND = BYTES_PER_S // 2
"""What may lie before a keystroke's answer on the line, in bytes: they are what takes the time there."""
LIMIT_S = 120.0


class Line:
    """A console on a pseudo terminal, read as slowly as the test likes."""

    def __init__(self, pid: int, master: int) -> None:
        self.pid, self.master = pid, master
        self.seen = ""

    def type(self, keys: str) -> None:
        """Send keys."""
        os.write(self.master, keys.encode())

    def read_until(self, pattern: str, rate: float = BYTES_PER_S) -> int:
        """Read at `rate` bytes per second until what came since matches; the bytes that were read."""
        since, end, count = len(self.seen), time.monotonic() + LIMIT_S, 0
        while not re.search(pattern, self.seen[since:]):
            assert time.monotonic() < end, f"{pattern!r} never came: {self.seen[since:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                data = os.read(self.master, 115)
                count += len(data)
                self.seen += data.decode(errors="replace")
                time.sleep(len(data) / rate)
        return count

    def is_stuck(self) -> bool:
        """A thread of the console waits in a write to the terminal."""
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{self.pid}/task"):
                with open(f"/proc/{self.pid}/task/{task}/syscall") as file:
                    if file.read().split()[:2] in (["1", "0x2"], ["64", "0x2"]):  # write(2, …): x86-64, aarch64
                        return True
        return False

    def wait_stuck(self) -> None:
        """Until nothing more goes into the terminal's buffer: stuck each of several times."""
        end, times = time.monotonic() + LIMIT_S, 0
        while times < 5:
            assert time.monotonic() < end, "the terminal's buffer never filled"
            times = times + 1 if self.is_stuck() else 0
            time.sleep(0.1)

    def wait_ended(self) -> int:
        """Until the process is gone; its wait status."""
        end = time.monotonic() + LIMIT_S
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return status
            assert time.monotonic() < end, "the console did not end"
            time.sleep(0.05)


@pytest.fixture
def line() -> Iterator[Line]:
    pid, master = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        environ = {**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", "SSH_TTY": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "tests.admin_tui.console", "busy"], environ)
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    made = Line(pid, master)
    try:
        yield made
    finally:
        if made.pid:
            os.kill(made.pid, signal.SIGKILL)
            os.waitpid(made.pid, 0)
        with contextlib.suppress(OSError):
            os.close(master)


@pytest.mark.slow
def test_on_a_serial_line_half_a_second_of_bytes_is_the_most_before_a_keys_answer(line: Line) -> None:
    line.read_until("ward-notes")
    costs = []
    for keys, words in 4 * [("2", "WEIGHT"), ("1", "PREEMPT"), ("3", "DEPLOYED AS"), ("1", "PREEMPT")]:
        line.read_until("(?s)alice.*alice.*alice")  # the first line, thrice: what came before is swallowed
        line.type(keys)
        costs.append(line.read_until(words))
    assert max(costs) <= HALF_A_SECOND, costs


@pytest.mark.parametrize("end", ["SIGTERM", "hang up"])
def test_a_console_that_nobody_reads_ends_when_it_is_told_to(line: Line, end: str) -> None:
    line.read_until("ward-notes")
    line.type("2" + "jk" * 5 + "1")
    line.wait_stuck()
    if end == "SIGTERM":
        os.kill(line.pid, signal.SIGTERM)
    else:
        os.close(line.master)
    line.wait_ended()


@pytest.mark.slow
def test_a_console_that_was_not_read_for_long_shows_the_present_again(line: Line) -> None:
    line.read_until("ward-notes")
    line.wait_stuck()
    time.sleep(20)
    assert line.is_stuck()
    line.type("2")
    line.read_until("WEIGHT", rate=10**7)
    line.type("q")
    line.read_until(r"\x1b\[\?1049l", rate=10**7)
    assert os.waitstatus_to_exitcode(line.wait_ended()) == 0
