"""How the native kernels keep a matrix and a KV page, and the bytes that takes; needs neither torch nor library.

tests/kernels/test_native_layout.py holds the byte counts to those of the library itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kernels.packed import Layout

FLOAT32, BFLOAT16, INT8, FLOAT16 = range(4)
"""ClType."""
F32, BF16, W8A8, W4A8, DECODED = range(5)
"""ClKind."""
GROUP, SCALED, TILE, STRIDE = 32, 128, 16, 64
MOST_HEAD_DIM = 512
"""Numbers of a head that the attention kernels have room for."""
_MOST_SUMMED = 2**16
"""Products of a code of 255 with one of 127 that are less than 2^31 together."""
_BYTES = {FLOAT32: 4, BFLOAT16: 2, INT8: 1, FLOAT16: 2}
KV_TYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8}


class RowForm(NamedTuple):
    """One form of a row of activations: ClRows has a pointer for each.

    Attributes:
        item: ClType of a number.
        group: of int8: numbers that share a scale; 0: all of a row.
    """

    item: int
    group: int = 0


class Form(NamedTuple):
    """How a matrix is kept: what `choose` can tell before it is read.

    Attributes:
        kind: ClKind.
        group: inputs that share a scale; 0: all of a row.
        bits: of a code or a number.
        decoded: ClType of the panels of DECODED.
        scale_type: ClType of scales and zeros.
        has_scales: there are scales.
        has_zeros: there are zeros.
        has_table: codes stand for what a table of 2 ** bits numbers has for them.
        has_order: its columns are in an order of their own.
    """

    kind: int
    group: int
    bits: int
    decoded: int = FLOAT32
    scale_type: int = FLOAT32
    has_scales: bool = False
    has_zeros: bool = False
    has_table: bool = False
    has_order: bool = False


def choose(layout: Layout | None, inner: int, item: int) -> Form:
    """How a matrix with `inner` inputs is kept.

    Integer kernels take integers in groups of whole multiples of GROUP, or rows; they round inputs to int8, which
    float32 must not, and add up in 32 bits what shares a scale. All other codes are decoded for each product, a
    panel at a time.

    Args:
        layout: of a quantised matrix; None: it is plain.
        inner: its inputs.
        item: bytes of the backend's number type.
    """
    wide = item == _BYTES[FLOAT32]
    if layout is None:
        return Form(F32, 0, 32) if wide else Form(BF16, 0, 16)
    group = 0 if layout.columns >= inner else layout.columns
    kind = DECODED
    summed = inner if layout.bits == 8 and not group else GROUP
    if not wide and layout.kind == "int" and group % GROUP == 0 and summed <= _MOST_SUMMED:
        kind = W4A8 if layout.bits == 4 else W8A8
    return Form(
        kind=kind,
        group=group,
        bits=layout.bits,
        decoded=FLOAT32 if wide else BFLOAT16,
        scale_type=FLOAT32 if wide or not group else FLOAT16,
        has_scales=True,
        has_zeros=layout.zeros,
        has_table=layout.kind != "int",
        has_order=layout.order,
    )


def needed(form: Form) -> RowForm:
    """The form of inputs that products with a matrix read."""
    if form.has_order or form.kind == F32:
        return RowForm(FLOAT32)
    if form.kind == DECODED:
        return RowForm(form.decoded)
    if form.kind == BF16:
        return RowForm(BFLOAT16)
    return RowForm(INT8, 0 if form.kind == W8A8 and not form.group else SCALED)


def scales_and_sums(form: RowForm, width: int) -> tuple[int, int]:
    """Of a row in int8."""
    return (-(-width // form.group), -(-width // GROUP)) if form.group else (1, 1)


def row_bytes(forms: Iterable[RowForm], width: int) -> dict[RowForm, int]:
    """Of a row in each of these forms, with scales and sums."""
    padded, sizes = _up(width, STRIDE), {}
    for form in forms:
        more = 4 * sum(scales_and_sums(form, width))
        sizes[form] = {FLOAT32: 4 * width, BFLOAT16: 2 * padded, INT8: padded + more}[form.item]
    return sizes


def matrix_bytes(form: Form, out: int, inner: int) -> int:
    """All tensors of a matrix."""
    tiles, groups = -(-out // TILE), -(-inner // form.group) if form.group else 1
    scales = tiles * groups * TILE * _BYTES[form.scale_type]
    table = 4 * 2**form.bits if form.has_table else 0
    order = 4 * inner if form.has_order else 0
    return packed_bytes(form, out, inner) + scales * (form.has_scales + form.has_zeros) + table + order


def packed_bytes(form: Form, out: int, inner: int) -> int:
    """What cl_packed_bytes says."""
    if form.kind == DECODED:
        row = -(-inner // 2) if form.bits == 4 else inner
    elif form.kind == F32:
        row = 4 * inner
    elif form.kind == BF16:
        row = 2 * _up(inner, 2)
    elif form.kind == W4A8:
        row = _up(inner, GROUP) // 2
    else:
        row = _up(inner, GROUP if form.group else 4)
    return _up(out, TILE) * row


def kv_page_bytes(kv_type: int, block_size: int, heads: int, dim: int) -> int:
    """What cl_kv_page_bytes says."""
    tokens = _up(block_size, TILE)
    scales = 2 * _BYTES[FLOAT32] if kv_type == INT8 else 0
    return heads * tokens * (2 * _up(dim, TILE) * _BYTES[kv_type] + scales)


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
