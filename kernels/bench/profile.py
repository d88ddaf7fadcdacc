"""Where the time of whole steps goes, op by op, as the native library's own clock has it."""

import ctypes
from array import array
from collections import Counter
from collections.abc import Mapping

from kernels.native.program import NativeStep, names

_NANOSECONDS = "q"


class StepProfile:
    """Adds up what each op of a program takes from now on; the clock is looked at twice an op.

    Args:
        step: whose program for logits alone is timed, for good.
    """

    def __init__(self, step: NativeStep) -> None:
        self._codes = names(op.code for op in step.picked.ops)
        self._spent = array(_NANOSECONDS, bytes(8 * max(len(self._codes), len(step.whole.ops))))
        step.clock(self._spent.buffer_info()[0])

    def take(self) -> Mapping[str, float]:
        """Seconds of each kind of op since the last time, most first; of the head apart from other products."""
        heads = [at for at, code in enumerate(self._codes) if code == "linear"][-1:]
        total: Counter[str] = Counter()
        for at, (code, spent) in enumerate(zip(self._codes, self._spent, strict=False)):
            total["head" if at in heads else code] += spent
        ctypes.memset(self._spent.buffer_info()[0], 0, 8 * len(self._spent))
        return {code: spent / 1e9 for code, spent in total.most_common()}
