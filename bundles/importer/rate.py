"""How fast an import is: bytes per second over the last seconds."""

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 10.0


class Rate:
    """Told how many bytes were looked at in all, it says how many that is per second.

    Args:
        clock: seconds, never going back.
        window: seconds that count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, window: float = WINDOW_S) -> None:
        self._clock, self._window = clock, window
        self._told: deque[tuple[float, int]] = deque()

    def __call__(self, total: int) -> int:
        """Bytes per second over the window, or since the first call in it; 0 where nothing can be said."""
        now = self._clock()
        if not self._told or total != self._told[-1][1]:
            self._told.append((now, total))
        while len(self._told) > 2 and self._told[1][0] <= now - self._window:
            self._told.popleft()
        begin, before = self._told[0]
        return int((total - before) / (now - begin)) if now > begin else 0

    def pause(self) -> None:
        """A wait that must not count begins or ends."""
        self._told.clear()
