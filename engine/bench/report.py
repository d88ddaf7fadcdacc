"""What a benchmark of the engine tells: a table for people, an object for programs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.bench.measures import Decode, Measure, Prefill, Timed
from engine.bench.subject import Subject
from engine.options import CPU


@dataclass(frozen=True, slots=True)
class Found:
    """One measure.

    Attributes:
        name: of it.
        rounds: what each round brought.
        memory: bytes per second that memory gave meanwhile, the median.
        most: tokens per second that memory and arithmetic allow; None where that is not so simple.
    """

    name: str
    rounds: Sequence[Timed]
    memory: float
    most: float | None

    @property
    def middle(self) -> Timed:
        """The round of median speed."""
        return sorted(self.rounds, key=lambda timed: timed.rate)[len(self.rounds) // 2]


def ceiling(subject: Subject, measure: Measure, memory: float, operations: float) -> float | None:
    """Tokens per second of `measure` when every byte is read once and every product computed, and nothing else.

    Args:
        subject: what is measured.
        measure: how; of a workload nothing so simple can be said.
        memory: bytes per second.
        operations: per second, of the products of this number type.
    """
    if isinstance(measure, Prefill):
        computed = 2 * (subject.matrix_numbers * measure.tokens + subject.head_numbers)
        return measure.tokens / max(computed / operations, subject.weight_bytes / memory)
    if isinstance(measure, Decode):
        read = subject.weight_bytes + subject.kv_bytes * measure.kv_tokens
        computed = 2 * (subject.matrix_numbers + subject.head_numbers) * measure.batch
        return measure.batch / max(computed / operations, read / memory)
    return None


def page(subject: Subject, weights: str, found: Sequence[Found]) -> str:
    """The table."""
    options = subject.options
    head = (
        "",
        "tokens/s",
        "slowest",
        "fastest",
        "ms a step",
        "at most",
        "share",
        "memory GB/s",
        "outside kernels",
    )
    lines = [
        f"{subject.name}, weights {weights}: {subject.weight_bytes / 1e9:.3f} GB a step",
        f"backend {subject.backend_name}, {options.dtype}, {options.threads} threads",
        " ".join(f"{name:{_WIDTHS[i]}}" for i, name in enumerate(head)),
    ]
    return "\n".join([*lines, *(_line(each) for each in found)])


_WIDTHS = ("<10", ">10", ">10", ">10", ">10", ">10", ">6", ">12", ">16")


def _line(found: Found) -> str:
    row = _row(found)
    most = "-" if row["at_most"] is None else f"{row['at_most']:,.1f}"
    share = "-" if row["share"] is None else f"{row['share']:.0%}"
    cells = [
        found.name,
        *(f"{row[name]:,.1f}" for name in ("tokens_per_second", "slowest", "fastest")),
        f"{row['step_ms']:,.2f}",
        most,
        share,
        f"{found.memory / 1e9:.1f}",
        "-" if row["outside_kernels"] is None else f"{row['outside_kernels']:.1%}",
    ]
    return " ".join(f"{cell:{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def as_dict(subject: Subject, weights: str, found: Sequence[Found]) -> dict[str, Any]:
    """All of it; rates in bytes or tokens a second."""
    options = subject.options
    return {
        "model": subject.name,
        "device": options.device or CPU,
        "kv_dtype": options.kv_dtype,
        "weights": weights,
        "weight_bytes": subject.weight_bytes,
        "backend": subject.backend_name,
        "dtype": options.dtype,
        "threads": options.threads,
        "measures": {each.name: _row(each) for each in found},
    }


def _row(found: Found) -> dict[str, Any]:
    timed = found.middle
    return {
        "tokens_per_second": timed.rate,
        "slowest": min(each.rate for each in found.rounds),
        "fastest": max(each.rate for each in found.rounds),
        "steps": timed.steps,
        "step_ms": timed.seconds / timed.steps * 1e3,
        "at_most": found.most,
        "share": None if found.most is None else timed.rate / found.most,
        "memory": found.memory,
        "outside_kernels": None if math.isnan(timed.outside) else timed.outside,
    }
