"""Bytes of what the Triton kernels keep in memory, for plans made where there is no torch."""

from __future__ import annotations

from kernels.packed import Layout

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


ALIGNMENT = 256
"""Bytes between the starts of tensors in scratch memory, or a multiple."""

PROGRAMS = 132
"""Programs below which the columns of a product are split among more: the multiprocessors of an H200."""

PLAIN_BYTES = 2**26
"""Of the rows of a quantised matrix that are made plain at once, about."""

_TILE = 128 * 128  # answers of one program at most
_BLOCK_ROWS = 128
_PLANES = 8


def form_of(layout: Layout | None, shape: tuple[int, int]) -> str:
    """How the Triton backend keeps a matrix: "plain", "int4", "int8" or "fp8"; see `kernels/triton/weights.py`.

    Args:
        layout: None: it is plain.
        shape: [out, in].
    """
    if layout is None:
        return "plain"
    if layout.bits == 4 and layout.kind != "float8":
        return "int4" if int4_width(shape[1], layout.columns) else "plain"
    fits = layout.kind != "table" and byte_columns(shape[1], layout.columns) > 0
    return {"int": "int8", "float8": "fp8"}[layout.kind] if fits else "plain"


def int4_width(inner: int, group: int) -> int:
    """Words of a span of columns; 0: columns that share a scale are no whole number of planes."""
    if group < inner and group % 16:
        return 0
    return 32 if inner % (32 * _PLANES) == 0 and (group >= inner or group % 32 == 0) else 16


def byte_columns(inner: int, group: int) -> int:
    """Columns of codes of a byte that are multiplied at once, which share a scale; 0: too few do."""
    return next((size for size in (128, 64, 32) if group >= inner or group % size == 0), 0)


def fp8_rows(layout: Layout, shape: tuple[int, int]) -> int:
    """Rows that share a scale in the form "fp8"."""
    return _BLOCK_ROWS if layout.rows == _BLOCK_ROWS and shape[0] % _BLOCK_ROWS == 0 else 1


def matrix_bytes(layout: Layout | None, shape: tuple[int, int], item: int) -> int:
    """Bytes of a matrix, or of a table of embeddings, as the Triton backend keeps it; a tied matrix adds none.

    Args:
        layout: None: it is plain.
        shape: [out, in].
        item: bytes of the number type that the backend computes in.
    """
    form, (out, inner) = form_of(layout, shape), shape
    if layout is None or form == "plain":
        return out * inner * item
    groups = -(-inner // layout.columns)
    scales = _FLOAT * groups * (out // fp8_rows(layout, shape) if form == "fp8" else out * (1 + layout.zeros))
    rest = scales + (8 * inner if layout.order else 0)
    if form != "int4":
        return out * inner + rest
    width = int4_width(inner, layout.columns)
    words = -(-inner // (width * _PLANES)) * width
    return 4 * out * words + rest + (_FLOAT * 16 if layout.kind == "table" else 0)


def linear_scratch_bytes(layout: Layout | None, shape: tuple[int, int], most_rows: int, item: int) -> int:
    """Scratch memory for products of at most so many rows: at least what any way of computing them takes.

    Args:
        layout: None: it is plain.
        shape: [out, in].
        most_rows: of inputs.
        item: bytes of the number type that the backend computes in.
    """
    has_order = layout is not None and layout.order
    return form_scratch_bytes(form_of(layout, shape), has_order, shape, most_rows, item)


def form_scratch_bytes(form: str, has_order: bool, shape: tuple[int, int], most_rows: int, item: int) -> int:
    """The same of a form: inputs in the matrix's order, or as codes with scales; rows that are made plain; and the
    sums of splits, which at most PROGRAMS programs write.
    """
    if form == "plain":
        return 0
    out, inner = shape
    inputs = most_rows * inner * item * has_order
    codes = most_rows * (inner + _FLOAT * -(-inner // _BLOCK_ROWS)) if form != "int4" else 0
    plain = plain_rows(out, inner * item) * inner * item
    return inputs + codes + plain + _FLOAT * PROGRAMS * _TILE + 8 * ALIGNMENT


def plain_rows(out: int, row_bytes: int) -> int:
    """Rows of a quantised matrix that are made plain at once."""
    return min(out, max(1, PLAIN_BYTES // row_bytes // _BLOCK_ROWS) * _BLOCK_ROWS)


def split_size(blocks: int, steps: int, least: int) -> int:
    """Steps along the columns that each program takes, where `blocks` programs share the answers.

    Args:
        blocks: of answers.
        steps: to take along all columns.
        least: that are worth a program.
    """
    splits = max(1, min(PROGRAMS // max(1, blocks), steps // least))
    return -(-steps // splits)
