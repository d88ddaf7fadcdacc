"""What loading a tokenizer and a template may take of the processor and of memory.

Both are files from outside that cost what their author wants. Requests have limits of their own, in the service.
"""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from engine.errors import EngineError

LOAD_CPU_S = 30.0
"""Seconds of processor time that loading may take; a vocabulary of 256 k tokens took 2.3 (measured)."""

LOAD_MEMORY_BYTES = 4 << 30
"""Bytes that loading may take; a tokenizer.json of 16 MiB took 0.3 GiB (measured)."""


class _OutOfTime(BaseException):
    """The processor time is used up; not an Exception, which code on the way may catch."""


@contextmanager
def cpu_limit(seconds: float, what: str, code: str) -> Iterator[None]:
    """End the block once this process has used `seconds` of processor time in it; main thread only.

    A call that does not come back to the interpreter is not ended; `what` names the culprit.

    Raises:
        EngineError: `code`.
    """

    def expire(number: int, frame: FrameType | None) -> None:
        raise _OutOfTime

    previous = signal.signal(signal.SIGPROF, expire)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except _OutOfTime:
        raise EngineError(code, f"{what} takes over {seconds:g} s of processor time") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def memory_limit(headroom: int) -> None:
    """No more than `headroom` bytes beyond what the process has now; lower limits stay."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    wanted = pages * resource.getpagesize() + headroom
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
