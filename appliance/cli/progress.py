"""A progress bar: bytes, rate, time left, file and state; whole lines where a line cannot be repainted."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from admin_tui.terminal import Terminal, probe
from appliance.cli.output import printable, size

_REPAINT_EVERY = 0.1
_LINE_EVERY = 5.0
_MIN_BAR = 10
_MIN_NAME = 10


class ProgressBar:
    """Shows how far a stream of bytes has come.

    Args:
        stream: where to paint; a terminal gets one line repainted, anything else a line now and then.
        terminal: what the stream can do; looked up when absent.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        terminal: Terminal | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = probe(self._stream) if terminal is None else terminal
        self._clock = clock
        self._began = clock()
        self._painted = float("-inf")
        self._state = ""
        self._width = 0

    def update(self, state: str, done: int = 0, total: int = 0, file: str = "", rate: int | None = None) -> None:
        """Show the present state; a repaint too soon after the last is left out, a new state never.

        Args:
            state: in one word.
            done: bytes so far.
            total: bytes in all; 0 for unknown.
            file: what is worked on.
            rate: bytes per second; None takes the mean since the bar was made.
        """
        now = self._clock()
        interval = _REPAINT_EVERY if self._terminal.tty else _LINE_EVERY
        if state == self._state and now - self._painted < interval and done != total:
            return
        changed, self._state, self._painted = state != self._state, state, now
        elapsed = now - self._began
        speed = rate if rate is not None else done / elapsed if elapsed > 0 else 0.0
        if self._terminal.tty:
            self._paint(self._line(self._facts(done, total, speed), done, total, file))
        elif changed or total:
            print("  ".join(filter(None, (self._facts(done, total, speed), printable(file)))).rstrip(),
                  file=self._stream, flush=True)  # fmt: skip

    def close(self) -> None:
        """Leave the line as it is and go to the next."""
        if self._terminal.tty and self._width:
            print(file=self._stream, flush=True)
            self._width = 0

    def _paint(self, line: str) -> None:
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)

    def _line(self, facts: str, done: int, total: int, file: str) -> str:
        """Bar, facts and file in one line that the terminal holds: the file gives way first, then the bar."""
        room = self._terminal.columns - 1
        name = f"  {printable(file)}" if file else ""
        if len(facts) + len(name) + (_MIN_BAR + 3 if total else 0) > room:
            left = room - len(facts) - _MIN_BAR - 3
            name = f"{name[: left - 1]}…" if left >= _MIN_NAME and self._terminal.utf8 else ""
        bar = min(30, room - len(facts) - len(name) - 3)
        if not total or bar < _MIN_BAR:
            return (facts + name)[:room]
        full, empty = ("█", "░") if self._terminal.utf8 else ("#", ".")
        filled = bar * min(done, total) // total
        return f"[{full * filled}{empty * (bar - filled)}] {facts}{name}"

    def _facts(self, done: int, total: int, rate: float) -> str:
        parts = [f"{self._state:<10}"]
        if total:
            parts += [f"{100 * done // total:3d}%", f"{size(done)} of {size(total)}", f"{size(rate)}/s"]
            if rate and done < total:
                parts.append(f"{_duration((total - done) / rate)} left")
        return "  ".join(parts).rstrip()


def _duration(seconds: float) -> str:
    """Seconds for people: 75 -> 1:15."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
