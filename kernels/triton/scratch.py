"""Memory for what lives within one op: tensors one behind the other in a buffer that its caller gives."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from kernels.triton.layout import ALIGNMENT


class Scratch:
    """Hands out parts of a buffer, each once.

    Args:
        buffer: uint8 [bytes], of 16 bytes' alignment at least.
    """

    def __init__(self, buffer: Tensor) -> None:
        self._left = buffer

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor; what it holds is left over from before.

        Raises:
            ValueError: no such room is left.
        """
        size = prod(shape) * dtype.itemsize
        if size > len(self._left):
            raise ValueError(f"scratch of {len(self._left)} bytes is left where {size} are needed")
        taken, self._left = self._left[:size], self._left[-(-size // ALIGNMENT) * ALIGNMENT :]
        return taken.view(dtype).view(shape)
