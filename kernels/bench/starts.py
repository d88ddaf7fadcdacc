"""What a case starts on a device, as a list that can be started again, over the same memory or other.

A case's answers are made comparable by ops of torch that no deployment runs. So what is measured is not the case
but the kernels and the products of libraries that it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.triton.launch import Launch, noting

_PRODUCTS = ("mm", "addmm", "bmm", "_int_mm", "_scaled_mm")


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types there
    """Adds the products of torch's libraries to a list, where they stand between kernels."""

    def __init__(self, starts: list[Launch]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self._starts = starts

    def __torch_dispatch__(  # type: ignore[no-untyped-def]  # torch's own signature
        self, func, types, args=(), kwargs=None
    ):
        if func.overloadpacket.__name__ in _PRODUCTS:
            self._starts.append(Launch(func, (), tuple(args), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def starts_of(run: Callable[[], object]) -> list[Launch]:
    """Every kernel and every product that `run` starts, in their order."""
    with noting() as found, _Products(found):
        run()
    return found


def start(launches: list[Launch]) -> None:
    """Start all, one after another."""
    for one in launches:
        if one.grid:
            one.kernel[one.grid](*one.args, **one.options)
        else:
            one.kernel(*one.args, **one.options)


def elsewhere(launches: list[Launch]) -> list[Launch]:
    """The same starts over a copy of all their memory; tensors that share memory share it there, too."""
    moved: dict[int, torch.UntypedStorage] = {}
    return [
        one._replace(
            args=tuple(_elsewhere(arg, moved) for arg in one.args),
            options={name: _elsewhere(arg, moved) for name, arg in one.options.items()},
        )
        for one in launches
    ]


def nbytes(launches: list[Launch]) -> int:
    """Of all tensors that the starts name, once; what else lies in their storages is never touched."""
    begun: dict[int, int] = {}
    for part in _tensors(launches):
        begun[part.data_ptr()] = max(begun.get(part.data_ptr(), 0), part.nbytes)
    return sum(begun.values())


def _tensors(launches: list[Launch]) -> Iterator[Tensor]:
    for one in launches:
        yield from (arg for arg in (*one.args, *one.options.values()) if isinstance(arg, Tensor))


def _elsewhere(arg: Any, moved: dict[int, torch.UntypedStorage]) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    storage = arg.untyped_storage()
    if storage.data_ptr() not in moved:
        moved[storage.data_ptr()] = storage.clone()  # type: ignore[no-untyped-call]  # likewise
    empty = torch.empty(0, dtype=arg.dtype, device=arg.device)
    return empty.set_(moved[storage.data_ptr()], arg.storage_offset(), arg.size(), arg.stride())
