"""How long the terminal takes to swallow what is painted; on a slow line the console asks less often."""

import sys
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from textual.drivers.linux_driver import LinuxDriver

if TYPE_CHECKING:
    from textual.app import App


class Drain:
    """A file that notes how long each write and flush held its writer.

    Args:
        file: the terminal.
        clock: monotonic seconds.
    """

    def __init__(self, file: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._since: float | None = None
        self._slowest = 0.0

    def slowest(self) -> float:
        """Seconds of the slowest write since this was last asked; a stuck one counts so far."""
        since = self._since
        held = self._clock() - since if since is not None else 0.0
        found, self._slowest = max(self._slowest, held), 0.0
        return found

    def write(self, text: str) -> int:
        """Write, timed."""
        return int(self._timed(lambda: self._file.write(text)))

    def flush(self) -> None:
        """Flush, timed."""
        self._timed(self._file.flush)

    def __getattr__(self, name: str) -> Any:
        """The rest is the terminal's."""
        return getattr(self._file, name)

    def _timed(self, work: Callable[[], Any]) -> Any:
        self._since = self._clock()
        try:
            return work()
        finally:
            self._slowest = max(self._slowest, self._clock() - self._since)
            self._since = None


class TerminalDriver(LinuxDriver):
    """Textual's driver of a Unix terminal, its output timed."""

    def __init__(self, app: "App[Any]", **options: Any) -> None:
        super().__init__(app, **options)
        self.drain = Drain(sys.__stderr__ or sys.stderr)
        self._file = self.drain  # type: ignore[assignment]  # writes, flushes, and is the terminal for the rest
