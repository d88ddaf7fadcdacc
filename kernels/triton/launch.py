"""The one door through which kernels start, so that a list of starts can be had in place of running them.

A launcher checks its tensors, chooses a configuration and calls `launch`. On a device, and in the interpreter,
that runs the kernel. Inside `recording()` it only notes what would be run, with which arguments: so everything
that a deployment will ever start can be compiled beforehand, on a machine without a device, from tensors without
memory (`device="meta"`), by the very code that starts it later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple


class Unsupported(RuntimeError):  # noqa: N818  # a state of the machine, not a mistake
    """The selected device cannot do this: raised by a launcher before it starts anything."""


class Launch(NamedTuple):
    """One start of a kernel.

    Attributes:
        kernel: what `triton.jit` made.
        grid: programs, in one to three dimensions.
        args: tensors and numbers, as its parameters stand.
        options: its constants by name, and num_warps, num_stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: Mapping[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)
_noted: ContextVar[list[Launch] | None] = ContextVar("noted", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` over `grid`, unless one of its dimensions is 0."""
    if 0 in grid:
        return
    noted, recorded = _noted.get(), _recorded.get()
    if noted is not None:
        noted.append(Launch(kernel, grid, args, options))
    if recorded is None:
        kernel[grid](*args, **options)
    else:
        recorded.append(Launch(kernel, grid, args, options))


def is_recording() -> bool:
    """Nothing is computed now, so that no number may be read from a device."""
    return _recorded.get() is not None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """The starts inside, none of which runs."""
    found: list[Launch] = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


@contextmanager
def noting() -> Iterator[list[Launch]]:
    """The starts inside, which run as ever."""
    found: list[Launch] = []
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)
