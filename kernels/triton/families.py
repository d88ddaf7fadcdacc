"""All families of kernels."""

from types import ModuleType

from kernels.triton import gated, kv_cache, norm, pointwise, rope, routing

FAMILIES: tuple[ModuleType, ...] = (gated, kv_cache, norm, pointwise, rope, routing)
"""Each has `cases(draw, scale)`: see `kernels.triton.case`."""
