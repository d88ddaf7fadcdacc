"""Hashes every file of the store again, slowly and in the background, and says what is not what its name says.

A scrub that was interrupted goes on behind the last file it finished, after a restart, too. It asks for the lowest
priority that the system has for its thread, and reads no faster than it is told. Between scrubs the same thread
throws away staging that nobody came back for.

Source: ioprio_set(2); setpriority(2), whose Linux form takes a thread.
"""

import ctypes
import logging
import os
import platform
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from bundles.importer.records import Damage, Scrub
from bundles.importer.workplace import Workplace

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_WHO_PROCESS, _CLASS_IDLE = 1, 3 << 13
_DAY_S = 24 * 3600
_LOOK_S, _TOLD_S = 3600.0, 0.5
_SAVED_BYTES, _SAVED_FILES = 256 * 1024 * 1024, 1000  # how much of a scrub a restart may repeat

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """How gently and how often.

    Attributes:
        bytes_per_second: most that is read; 0 for no limit.
        days: from the end of one scrub to the next; 0 for none but those asked for.
    """

    bytes_per_second: int = 100_000_000
    days: int = 30


@dataclass(frozen=True)
class Sweep:
    """How far a scrub is.

    Attributes:
        bytes_done: bytes hashed.
        bytes_total: bytes in all.
        damaged: found and not mended.
        ended: nothing runs.
        failed: it ended early; what it did not reach nobody knows.
    """

    bytes_done: int
    bytes_total: int
    damaged: tuple[Damage, ...]
    ended: bool
    failed: bool = False


class StoppedError(Exception):
    """The process ends; the scrub goes on at its next start."""


class Scrubber:
    """Scrubs a store on a thread of its own.

    Args:
        place: whose store.
        pace: how gently and how often.
        clock: seconds, never going back.
        pause: waits so many seconds instead of its own wait, which `stop` cuts short.

    Attributes:
        changed: called now and then while it runs, and when it has ended, from its thread.
    """

    def __init__(
        self,
        place: Workplace,
        pace: Pace,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] | None = None,
    ) -> None:
        self._place, self._pace, self._clock = place, pace, clock
        self.changed: Callable[[], None] = lambda: None
        self._pause = pause or self._wait
        self._wake = threading.Condition()
        self._rounds = 0
        self._asked = self._stopping = False
        self._sweep = self._last = Sweep(0, 0, (), ended=True)
        self._told = clock()
        self._thread = threading.Thread(target=self._run, name="scrub", daemon=True)

    def start(self) -> None:
        """Begin: a scrub that was interrupted goes on, and those that are due come."""
        self._thread.start()

    def ask(self) -> int:
        """Scrub now, unless one runs; names the round, for `sweep`."""
        with self._wake:
            if self._sweep.ended:
                self._asked, self._sweep = True, Sweep(0, 0, (), ended=False)
                self._wake.notify_all()
            return self._rounds

    def sweep(self, asked: int) -> Sweep:
        """How far the round is that `ask` named."""
        with self._wake:
            return self._sweep if self._rounds == asked else replace(self._last, ended=True)

    def stop(self) -> None:
        """End at the next block."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def scrub(self) -> None:
        """One scrub, from where the last one was interrupted; on the caller's thread.

        Raises:
            StoppedError: by `stop`.
        """
        ledger, now = self._place.ledger, int(self._place.now().timestamp())
        at = ledger.scrub()
        if not at.started:
            at = Scrub("", now, at.ended, 0)
        listed = sorted(ledger.listed())
        sizes = {digest: self._size(digest) for digest in listed}
        left = sum(size for digest, size in sizes.items() if digest > at.position)
        budget = _Budget(self._pace.bytes_per_second, self._clock, self._pause)
        saved = at.bytes_done
        for number, digest in enumerate(listed):
            if digest <= at.position:
                continue
            before = Sweep(at.bytes_done, at.bytes_done + left, (), ended=False)
            finding, seen = self._look(digest, before, budget)
            ledger.found(digest, finding)
            if finding:
                log.error("a file of the store is damaged", extra={"sha256": digest, "finding": finding})
            left -= sizes[digest]
            at = Scrub(digest, at.started, at.ended, at.bytes_done + seen)
            if at.bytes_done - saved >= _SAVED_BYTES or number % _SAVED_FILES == 0:
                ledger.scrubbed(at)
                saved = at.bytes_done
        ledger.scrubbed(Scrub("", 0, max(1, int(self._place.now().timestamp())), at.bytes_done))

    def _look(self, digest: str, before: Sweep, budget: "_Budget") -> tuple[str, int]:
        """What is wrong with a file, twice found before it is believed: it may have been mended meanwhile."""
        seen = 0

        def read(count: int) -> None:
            nonlocal seen
            seen += count
            budget.spend(count)
            self._tell(replace(before, bytes_done=min(before.bytes_done + seen, before.bytes_total)))

        if not self._place.store.finding(digest, read):
            return "", seen
        seen = 0
        return self._place.store.finding(digest, read), seen

    def is_due(self) -> bool:
        """Whether one was interrupted, or the last is long enough ago; a store that is empty needs none."""
        at = self._place.ledger.scrub()
        if at.started:
            return True
        if not self._pace.days or not self._place.ledger.listed():
            return False
        oldest = min(version.imported_at for version in self._place.ledger.versions())
        since = max(at.ended, oldest)
        return self._place.now().timestamp() - since >= self._pace.days * _DAY_S

    def _run(self) -> None:
        _be_idle()
        with suppress(StoppedError):
            while True:
                try:
                    self._place.discard_expired()
                    if self._asked or self.is_due():
                        self._round()
                except (OSError, sqlite3.Error):
                    log.exception("the store is not looked after; that is tried again")
                with self._wake:
                    if not self._asked and not self._stopping:
                        self._wake.wait(_LOOK_S)
                self._wait(0)

    def _round(self) -> None:
        with self._wake:
            self._asked, self._sweep = False, Sweep(0, 0, (), ended=False)
        ended = Sweep(0, 0, (), ended=True, failed=True)
        try:
            self.scrub()
            ended = replace(self._sweep, damaged=self._place.ledger.damaged(), ended=True)
        finally:
            with self._wake:
                self._sweep = self._last = ended
                self._rounds += 1
            self.changed()

    def _wait(self, seconds: float) -> None:
        with self._wake:
            if seconds > 0 and not self._stopping:
                self._wake.wait(seconds)
            if self._stopping:
                raise StoppedError

    def _tell(self, sweep: Sweep) -> None:
        due = self._clock() - self._told >= _TOLD_S
        damaged = self._place.ledger.damaged() if due else self._sweep.damaged
        with self._wake:
            self._sweep = replace(sweep, damaged=damaged)
        if due:
            self._told = self._clock()
            self.changed()

    def _size(self, digest: str) -> int:
        with suppress(OSError):
            return self._place.store.path_of(digest).lstat().st_size
        return 0


class _Budget:
    """Bytes per second, kept by pausing; what was not used in a second is not saved up."""

    def __init__(self, rate: int, clock: Callable[[], float], pause: Callable[[float], None]) -> None:
        self._rate, self._clock, self._pause = rate, clock, pause
        self._free_at = clock()

    def spend(self, count: int) -> None:
        now = self._clock()
        if self._rate:
            self._free_at = max(self._free_at, now - 1.0) + count / self._rate
        self._pause(self._free_at - now if self._rate else 0.0)


def _be_idle() -> None:
    """Lowest priority for this thread's reading and hashing, where the system has one."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, _WHO_PROCESS, 0, _CLASS_IDLE)
