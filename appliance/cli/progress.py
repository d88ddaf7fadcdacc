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

    def update(self, state: str, done: int = 0, total: int = 0, file: str = "") -> None:
        """Show the present state; a repaint too soon after the last is left out, a new state never."""
        now = self._clock()
        interval = _REPAINT_EVERY if self._terminal.tty else _LINE_EVERY
        if state == self._state and now - self._painted < interval and done != total:
            return
        changed, self._state, self._painted = state != self._state, state, now
        if self._terminal.tty:
            self._paint(self._line(now - self._began, done, total, file))
        elif changed or total:
            print(self._facts(now - self._began, done, total, file), file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the line as it is and go to the next."""
        if self._terminal.tty and self._width:
            print(file=self._stream, flush=True)
            self._width = 0

    def _paint(self, line: str) -> None:
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)

    def _line(self, elapsed: float, done: int, total: int, file: str) -> str:
        """Bar and facts in one line, never wider than the terminal; the facts come first when it is narrow."""
        room = self._terminal.columns - 1
        facts = self._facts(elapsed, done, total, file)
        bar = min(30, room - len(facts) - 3)
        if not total or bar < _MIN_BAR:
            return facts[:room]
        full, empty = ("█", "░") if self._terminal.utf8 else ("#", ".")
        filled = bar * done // total
        return f"[{full * filled}{empty * (bar - filled)}] {facts}"

    def _facts(self, elapsed: float, done: int, total: int, file: str) -> str:
        parts = [f"{self._state:<10}"]
        if total:
            rate = done / elapsed if elapsed > 0 else 0.0
            parts += [f"{100 * done // total:3d}%", f"{size(done)} of {size(total)}", f"{size(rate)}/s"]
            if rate and done < total:
                parts.append(f"{_duration((total - done) / rate)} left")
        if file:
            parts.append(printable(file))
        return "  ".join(parts).rstrip()


def _duration(seconds: float) -> str:
    """Seconds for people: 75 -> 1:15."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
