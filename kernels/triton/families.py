"""All families of kernels."""

from types import ModuleType

from kernels.triton import gated, norm, pointwise

FAMILIES: tuple[ModuleType, ...] = (gated, norm, pointwise)
"""Each has `cases(draw, scale)`: see `kernels.triton.case`."""
