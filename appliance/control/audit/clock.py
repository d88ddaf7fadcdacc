"""What time it is, and how far that can be trusted: wall clock, monotonic clock, boot id, synchronisation.

Source: adjtimex(2); proc(5), random/boot_id; NIST SP 800-53 AU-8.
"""

import ctypes
import time
from pathlib import Path
from typing import Protocol

from appliance.control.audit.record import Stamp

_TIME_ERROR = 5
_SIZEOF_TIMEX = 256  # struct timex has 208 bytes on 64-bit Linux
_STATE_LASTS_NS = 1_000_000_000


class Clock(Protocol):
    """Whoever tells the time to the audit log."""

    def read(self) -> Stamp:
        """The time now."""
        ...


class SystemClock:
    """The machine's own clocks; `clock` is synchronised, unsynchronised or unknown, as the kernel has it."""

    def __init__(self) -> None:
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        self._adjtimex = ctypes.CDLL(None).adjtimex
        self._state = "unknown"
        self._state_until = 0

    def read(self) -> Stamp:
        """The time now; the synchronisation state is at most a second old."""
        mono_ns = time.monotonic_ns()
        if mono_ns >= self._state_until:
            self._state, self._state_until = self._synchronisation(), mono_ns + _STATE_LASTS_NS
        return Stamp(time.time_ns(), mono_ns, self._boot, self._state)

    def _synchronisation(self) -> str:
        answer = self._adjtimex(ctypes.create_string_buffer(_SIZEOF_TIMEX))
        if answer < 0:
            return "unknown"
        return "unsynchronised" if answer == _TIME_ERROR else "synchronised"
