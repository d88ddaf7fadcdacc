"""All families of kernels."""

from types import ModuleType

from kernels.triton import attention_decode, attention_prefill, gated, kv_cache, linear_int4, lora, mixture, norm, pointwise, rope, routing, sampling, sampling_adjust, split

FAMILIES: tuple[ModuleType, ...] = (attention_decode, attention_prefill, gated, kv_cache, linear_int4, lora, mixture, norm, pointwise, rope, routing, sampling, sampling_adjust, split)
"""Each has `cases(draw, scale)`: see `kernels.triton.case`."""
