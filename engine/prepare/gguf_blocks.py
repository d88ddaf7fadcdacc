"""The numbers that GGUF's blocks stand for, exactly as ggml computes them in float32.

Source: ggml, ggml-quants.c (dequantize_row_q8_0, _q4_0, _q4_K, _q6_K); float arithmetic in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Bytes: TypeAlias = "NDArray[np.uint8]"
Floats: TypeAlias = "NDArray[np.float32]"


def dequantise(kind: str, content: bytes) -> Floats:
    """The float32 numbers of whole blocks.

    Args:
        kind: a type of `gguf.BLOCKS`.
        content: blocks, one after another.
    """
    raw = np.frombuffer(content, np.uint8)
    match kind:
        case "F32":
            return raw.view("<f4").astype(np.float32)
        case "F16":
            return raw.view("<f2").astype(np.float32)
        case "BF16":
            return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        case "Q8_0":
            return _q8_0(raw.reshape(-1, 34))
        case "Q4_0":
            return _q4_0(raw.reshape(-1, 18))
        case "Q4_K":
            return _q4_k(raw.reshape(-1, 144))
        case "Q6_K":
            return _q6_k(raw.reshape(-1, 210))
    raise ValueError(kind)


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of each block, as a column."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _q8_0(blocks: Bytes) -> Floats:
    """A scale, then 32 signed bytes."""
    codes = np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
    return (codes.astype(np.float32) * _half(blocks, 0)).reshape(-1)


def _q4_0(blocks: Bytes) -> Floats:
    """A scale, then 16 bytes: low halves are the first 16 numbers, high halves the last; 8 is zero."""
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return ((codes.astype(np.float32) - 8) * _half(blocks, 0)).reshape(-1)


def _q4_k(blocks: Bytes) -> Floats:
    """Two scales, eight pairs of 6 bits (scale and minimum), and 8 × 32 numbers of 4 bits."""
    packed, codes = blocks[:, 4:16], blocks[:, 16:]
    low, high, mixed = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (mixed & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([high & 63, (mixed >> 4) | (high >> 6 << 4)], axis=1)
    pairs = codes.reshape(-1, 4, 1, 32)
    numbers = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32).astype(np.float32)
    factor = (_half(blocks, 0) * scales.astype(np.float32))[:, :, None]
    offset = (_half(blocks, 2) * minima.astype(np.float32))[:, :, None]
    return (factor * numbers - offset).reshape(-1)


def _q6_k(blocks: Bytes) -> Floats:
    """256 numbers of 6 bits, their low 4 in one table and their high 2 in another; 16 scales; one more scale."""
    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
    lows = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    highs = np.stack([high & 3, high >> 2 & 3, high >> 4 & 3, high >> 6], axis=2)
    codes = (lows | highs << 4).astype(np.float32) - 32
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    factor = (_half(blocks, 208) * scales).reshape(-1, 16, 1)
    numbers: Floats = (factor * codes.reshape(-1, 16, 16)).reshape(-1)
    return numbers
