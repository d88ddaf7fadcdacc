"""Bytes of what the Triton kernels keep in memory, for plans made where there is no torch."""

_CODES = ("int8", "float8")
_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8": 1}
_FLOAT = 4


def kv_page_bytes(kv_dtype: str, block_size: int, kv_heads: int, head_dim: int) -> int:
    """Of one page of one layer: keys, values, and a scale for each token and head where they are codes."""
    scale = _FLOAT if kv_dtype in _CODES else 0
    return 2 * block_size * kv_heads * (head_dim * _ITEM[kv_dtype] + scale)


def decode_split(rows: int, kv_heads: int) -> int:
    """Tokens that one program of decode attention reads: few where few programs would leave a device idle.

    A multiple of every tile of keys, so that a split never starts inside one.
    """
    programs = rows * kv_heads
    return 256 if programs <= 64 else 512 if programs <= 256 else 1024


def decode_splits(rows: int, kv_heads: int, most_tokens: int) -> int:
    """Programs of decode attention for each row and KV head, the longest row having `most_tokens`."""
    return max(1, -(-most_tokens // decode_split(rows, kv_heads)))


def decode_workspace_bytes(rows: int, most_tokens: int, query_heads: int, kv_heads: int, head_dim: int) -> int:
    """Of the answers of splits and the logarithms of their sums; none where there is one split."""
    splits = decode_splits(rows, kv_heads, most_tokens)
    return _FLOAT * rows * splits * query_heads * (head_dim + 1) if splits > 1 else 0
