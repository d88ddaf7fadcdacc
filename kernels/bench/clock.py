"""Time inside kernels: what is left of a step is the engine's own."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

_OPS = (
    "begin", "scrub", "embed", "rms_norm", "add_rms_norm", "add", "linear", "rope_and_write_kv", "paged_attention",
    "gated", "mixture", "logits", "sample", "logprobs",
)  # fmt: skip

Clock = Callable[[], int]
"""Nanoseconds that have passed inside kernels so far."""


def kernel_clock(backend: Any) -> Clock:
    """The clock of a backend: of the programs that its library runs where it has one, else of its ops."""
    library = getattr(backend, "library", None)
    return CallClock(backend, _OPS) if library is None else CallClock(library, ("run",))


class CallClock:
    """Counts the nanoseconds that some methods take from now on; one that calls another counts once.

    Args:
        owner: whose methods are replaced, for good.
        names: of the methods.
    """

    def __init__(self, owner: Any, names: Sequence[str]) -> None:
        self._total = 0
        self._depth = 0
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def __call__(self) -> int:
        """Nanoseconds so far."""
        return self._total

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **named: Any) -> Any:
            self._depth += 1
            began = time.perf_counter_ns()
            try:
                return call(*args, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self._total += time.perf_counter_ns() - began

        return timed
