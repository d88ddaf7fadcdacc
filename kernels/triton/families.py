"""All families of kernels."""

from types import ModuleType

from kernels.triton import (
    attention_decode,
    attention_prefill,
    drawing,
    embed,
    gated,
    inputs,
    kv_cache,
    linear_bytes,
    linear_codes,
    linear_int4,
    linear_plain,
    lora,
    mixture,
    norm,
    pointwise,
    rope,
    routing,
    sampling,
    sampling_adjust,
    split,
)

FAMILIES: tuple[ModuleType, ...] = (
    attention_decode,
    attention_prefill,
    drawing,
    embed,
    gated,
    kv_cache,
    linear_int4,
    linear_plain,
    linear_codes,
    linear_bytes,
    inputs,
    lora,
    mixture,
    norm,
    pointwise,
    rope,
    routing,
    sampling,
    sampling_adjust,
    split,
)
"""Each has `cases(draw, scale)`: see `kernels.triton.case`."""
