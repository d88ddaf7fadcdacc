"""Time inside a backend's ops: what is left of a step is the engine's own."""

import functools
import time
from typing import Any

_OPS = (
    "begin", "scrub", "embed", "rms_norm", "add_rms_norm", "add", "linear", "rope_and_write_kv", "paged_attention",
    "gated", "mixture", "logits", "sample", "logprobs",
)  # fmt: skip


class OpClock:
    """Counts the nanoseconds that ops of `backend` take from now on; an op that calls another counts once.

    Args:
        backend: whose methods are replaced, for good.
    """

    def __init__(self, backend: Any) -> None:
        self._total = 0
        self._depth = 0
        for name in _OPS:
            setattr(backend, name, self._timed(getattr(backend, name)))

    def __call__(self) -> int:
        """Nanoseconds so far."""
        return self._total

    def _timed(self, op: Any) -> Any:
        @functools.wraps(op)
        def timed(*args: Any, **named: Any) -> Any:
            self._depth += 1
            began = time.perf_counter_ns()
            try:
                return op(*args, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self._total += time.perf_counter_ns() - began

        return timed
