"""All families of kernels."""

from types import ModuleType

from kernels.triton import norm

FAMILIES: tuple[ModuleType, ...] = (norm,)
"""Each has `cases(draw, scale)`: see `kernels.triton.case`."""
