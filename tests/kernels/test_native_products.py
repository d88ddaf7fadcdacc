"""Products of the native library: every way to keep a matrix, on every instruction set, against float64."""

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.native.library import (
    CL_BF16,
    CL_BFLOAT16,
    CL_DECODED,
    CL_F32,
    CL_FLOAT16,
    CL_FLOAT32,
    CL_GROUP,
    CL_OP_LINEAR,
    CL_SCALED,
    CL_STRIDE,
    CL_TILE,
    CL_W4A8,
    CL_W8A8,
    ClLimits,
    ClLinear,
    ClLinearOp,
    ClMatrix,
    ClOp,
    ClRows,
    ClStep,
    Library,
)

Array = NDArray[Any]
ROW = 0  # a weight group of all inputs


@dataclass(frozen=True)
class Kind:
    """A way to keep a matrix."""

    kind: int
    group: int = 0
    bits: int = 8
    offset: int = 0
    scale_type: int = CL_FLOAT32
    zeros: bool = False
    table: bool = False
    decoded: int = CL_FLOAT32
    order: bool = False
    factor: float = 1.0

    @property
    def plain(self) -> bool:
        return self.kind in (CL_F32, CL_BF16)

    @property
    def rounds_inputs(self) -> bool:
        return self.kind == CL_BF16 or (self.kind == CL_DECODED and self.decoded == CL_BFLOAT16)


KINDS = {
    "float32": Kind(CL_F32),
    "bfloat16": Kind(CL_BF16),
    "int4 by 32, as Q4_0": Kind(CL_W4A8, 32, 4, 8, CL_FLOAT16, factor=2.0**-12),
    "int4 by 64 with zeros, as AWQ": Kind(CL_W4A8, 64, 4, 0, CL_FLOAT16, zeros=True),
    "int4 by 128 in an order of its own, as GPTQ": Kind(CL_W4A8, 128, 4, 0, CL_FLOAT16, zeros=True, order=True),
    "int4 by row": Kind(CL_W4A8, ROW, 4, 8),
    "int8 by 32, as Q8_0": Kind(CL_W8A8, 32, 8, 128, CL_FLOAT16),
    "int8 by 96 with zeros": Kind(CL_W8A8, 96, 8, 0, zeros=True),
    "int8 by row": Kind(CL_W8A8, ROW, 8, 128),
    "int8 by row with zeros": Kind(CL_W8A8, ROW, 8, 0, zeros=True),
    "int8 by row in an order of its own": Kind(CL_W8A8, ROW, 8, 128, order=True),
    "float8 by 128, decoded": Kind(CL_DECODED, 128, 8, table=True),
    "MXFP4, decoded to bfloat16": Kind(CL_DECODED, 32, 4, table=True, decoded=CL_BFLOAT16),
    "int4 by 24 with zeros, decoded": Kind(CL_DECODED, 24, 4, zeros=True),
    "int8 by row, decoded to bfloat16": Kind(CL_DECODED, ROW, 8, 128, CL_FLOAT16, decoded=CL_BFLOAT16, order=True),
}


@dataclass(frozen=True)
class Made:
    """A matrix as the library has it, and what it stands for."""

    kind: Kind
    matrix: ClMatrix
    sizes: Array  # [out, in], of codes and zeros apart, with their scales
    weights: Array  # [out, in], as they are multiplied
    order: Array
    owned: tuple[Array, ...]


@dataclass(frozen=True)
class Given:
    """Inputs [rows, in] in all forms, with the numbers that they stand for."""

    rows: ClRows
    x: Array
    owned: tuple[Array | None, ...]


def address(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data


def aligned(size: int) -> Array:
    space = np.zeros(size + 64, np.uint8)
    return space[-space.ctypes.data % 64 :][:size]


def up(number: int, to: int) -> int:
    return -(-number // to) * to


def bf16(x: Array) -> Array:
    """Bits of bfloat16."""
    return (
        torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    )


def wide(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def tiles(numbers: Array, kind: Kind) -> Array:
    """[out, groups] as the library wants it: [tiles, groups, 16]."""
    out, groups = numbers.shape
    padded = np.zeros((up(out, CL_TILE), groups), np.float16 if kind.scale_type == CL_FLOAT16 else np.float32)
    padded[:out] = numbers
    return np.ascontiguousarray(padded.reshape(-1, CL_TILE, groups).transpose(0, 2, 1))


@dataclass(frozen=True)
class Drawn:
    """What a matrix is packed from, the numbers that it stands for, their parts' sizes, and what it owns."""

    source: Array
    weights: Array
    sizes: Array
    owned: tuple[Array, ...]


def plain_numbers(random: np.random.Generator, kind: Kind, out: int, inner: int) -> Drawn:
    numbers = random.standard_normal((out, inner)).astype(np.float32) / 8
    source = numbers if kind.kind == CL_F32 else bf16(numbers)
    value = numbers.astype(np.float64) if kind.kind == CL_F32 else wide(source)
    return Drawn(source, value, np.abs(value), ())


def coded_numbers(random: np.random.Generator, kind: Kind, out: int, inner: int, matrix: ClMatrix) -> Drawn:
    """Random codes, scales and zeros, which `matrix` points to."""
    source = random.integers(0, 2**kind.bits, (out, inner), dtype=np.uint8)
    table = random.standard_normal(2**kind.bits).astype(np.float32)
    groups = -(-inner // kind.group) if kind.group else 1
    width = kind.group or inner
    scales = tiles((random.random((out, groups)) + 0.1) / 256 / kind.factor, kind)
    centre = 2 ** (kind.bits - 1)
    zeros = tiles(random.integers(centre - 3, centre + 3, (out, groups)) + 0.25 * (kind.bits == 4), kind)
    spread = [
        n.transpose(0, 2, 1).reshape(-1, groups)[:out].repeat(width, 1)[:, :inner].astype(np.float64)
        for n in (scales, zeros)
    ]
    value = table[source].astype(np.float64) if kind.table else source.astype(np.float64) - kind.offset
    matrix.table = address(table) if kind.table else None
    matrix.zeros = address(zeros) if kind.zeros else None
    matrix.scales = address(scales)
    zero, scale = spread[1] * kind.zeros, spread[0] * kind.factor
    return Drawn(source, (value - zero) * scale, (np.abs(value) + np.abs(zero)) * scale, (scales, zeros, table))


@cache
def make(library: Library, isa: str, kind: Kind, out: int, inner: int) -> Made:
    """A random matrix."""
    random = np.random.default_rng(out * 7919 + inner)
    order = random.permutation(inner) if kind.order else np.arange(inner)
    matrix = ClMatrix(kind.kind, kind.group, kind.decoded, kind.bits, kind.offset, kind.scale_type, kind.factor)
    matrix.out = out
    setattr(matrix, "in", inner)
    order32 = order.astype(np.int32)
    matrix.order = address(order32) if kind.order else None
    drawn = (
        plain_numbers(random, kind, out, inner) if kind.plain else coded_numbers(random, kind, out, inner, matrix)
    )
    packed = aligned(library.packed_bytes(matrix))
    half = out // 2 // CL_TILE * CL_TILE
    for first, end in ((0, half), (half, out)):
        some = np.ascontiguousarray(drawn.source[first:end])
        library.pack(matrix, address(some), first, end - first, address(packed))
    matrix.weights = address(packed)
    weights = drawn.weights
    if kind.kind == CL_DECODED and kind.decoded == CL_BFLOAT16:
        weights = wide(bf16(weights / kind.factor)) * kind.factor
    return Made(kind, matrix, drawn.sizes, weights, order, (packed, order32, *drawn.owned))


def quantise(x: Array, group: int) -> tuple[Array, Array]:
    """Codes and scales [rows, groups] of int8 inputs, rounded as the library does it."""
    rows, width = x.shape
    group = group or width
    groups = -(-width // group)
    padded = np.zeros((rows, groups * group), np.float32)
    padded[:, :width] = x
    parts = padded.reshape(rows, groups, group)
    most = np.abs(parts).max(-1)
    inverse = np.float32(127) / np.where(most > 0, most, 1).astype(np.float32)
    codes = np.rint(parts * inverse[..., None]).astype(np.int8)
    return codes.reshape(rows, -1), most / np.float32(127)


def give(x: Array, group: int, forms: str = "f32 bf16 int8") -> Given:
    """Inputs in these forms; int8 with a scale for each group, or with 0 for a row."""
    rows, width = x.shape
    stride = up(width, CL_STRIDE)
    codes, scales = quantise(x, group)
    whole = np.zeros((rows, stride), np.int8)
    whole[:, :width] = codes[:, :width]
    summed = CL_GROUP if group else width
    sums = np.add.reduceat(codes, np.arange(0, width, summed), 1, dtype=np.int32)
    half = np.zeros((rows, stride), np.uint16)
    half[:, :width] = bf16(x)
    given = ClRows(None, None, None, None, None, width, group)
    if "f32" in forms:
        given.f32 = address(x)
    if "bf16" in forms:
        given.bf16 = address(half)
    if "int8" in forms:
        given.int8, given.scales, given.sums = address(whole), address(scales), address(sums)
    return Given(given, x, (x, whole, scales, sums, half))


def run(library: Library, parts: list[Made], given: Given, bias: Array | None = None, threads: int = 1) -> Array:
    """x [rows, in] times the parts."""
    matrices = (ClMatrix * len(parts))(*[part.matrix for part in parts])
    linear = ClLinear(ctypes.addressof(matrices), len(parts), address(bias))
    rows = len(given.x)
    out = np.full((rows, sum(part.matrix.out for part in parts)), np.nan, np.float32)
    op = ClLinearOp(ctypes.addressof(given.rows), ctypes.addressof(linear), address(out), 0)
    ops = (ClOp * 1)(ClOp(CL_OP_LINEAR, ctypes.addressof(op)))
    limits = ClLimits(rows, rows, rows, rows, threads)
    scratch = aligned(library.scratch_bytes(ctypes.addressof(ops), 1, limits))
    step = ClStep()
    step.tokens, step.scratch, step.threads = rows, address(scratch), threads
    library.run(ctypes.addressof(ops), 1, ctypes.addressof(step))
    return out


def inputs(rows: int, width: int) -> Array:
    x = np.random.default_rng(rows + width).standard_normal((rows, width)).astype(np.float32)
    x[rows // 2] *= 100
    x[:, width // 3] *= 8
    if width > CL_GROUP:
        x[-1, :CL_GROUP] = 0
    return x


def group_of(part: Made) -> int:
    """Of the int8 inputs that a part needs."""
    by_row = part.kind.kind == CL_W8A8 and part.kind.group == ROW
    return ROW if by_row else CL_SCALED


def expected(part: Made, x: Array) -> tuple[Array, Array]:
    """The product in float64 of the numbers that are multiplied, and how far float32 sums may be from it."""
    ordered = np.ascontiguousarray(x[:, part.order])
    terms = ordered.shape[1]
    if part.kind.rounds_inputs:
        numbers = wide(bf16(ordered))
    elif part.kind.kind in (CL_W4A8, CL_W8A8):
        group = group_of(part)
        codes, scales = quantise(ordered, group)
        numbers = (codes * scales.astype(np.float64).repeat(group or terms, 1))[:, :terms]
        terms = len(scales[0]) + 2 * CL_SCALED // CL_GROUP  # sums of codes are exact
    else:
        numbers = ordered.astype(np.float64)
    return numbers @ part.weights.T, (terms + 6) * 2.0**-24 * (np.abs(numbers) @ part.sizes.T)


SHAPES = ((1, 1), (16, 64), (40, 33), (21, 200), (35, 2120))


@pytest.mark.parametrize("name", KINDS)
def test_a_product_is_that_of_float64_within_what_float32_sums_may_lose(name: str, library: Library) -> None:
    for out, inner in SHAPES:
        part = make(library, library.isa, KINDS[name], out, inner)
        for rows in (1, 5, 26):
            x = inputs(rows, inner)
            answer = run(library, [part], give(x, group_of(part)))
            right, bound = expected(part, x)
            assert (np.abs(answer - right) <= bound).all(), (out, inner, rows)


@pytest.mark.parametrize("name", KINDS)
def test_a_row_is_the_same_bits_in_whatever_batch_it_comes(name: str, library: Library) -> None:
    part = make(library, library.isa, KINDS[name], 35, 2120)
    x = inputs(70, 2120)
    whole = run(library, [part], give(x, group_of(part)), threads=2)
    alone = np.concatenate([run(library, [part], give(row[None].copy(), group_of(part))) for row in x])
    assert (whole == alone).all()
    for rows in (*range(2, 14), 25, 49):
        some = run(library, [part], give(x[-rows:].copy(), group_of(part)))
        assert (some == alone[-rows:]).all(), rows


@pytest.mark.parametrize(
    "name", [name for name, kind in KINDS.items() if kind.kind == CL_DECODED and kind.bits == 4]
)
def test_few_rows_of_long_decoded_inputs_keep_the_sums_of_many_tiles_apart(name: str, library: Library) -> None:
    part = make(library, library.isa, KINDS[name], 656, 2120)  # six tiles in a piece
    for rows in (3, 12):
        x = inputs(rows, 2120)
        right, bound = expected(part, x)
        assert (np.abs(run(library, [part], give(x, group_of(part))) - right) <= bound).all(), rows


def test_sums_of_whole_numbers_are_kept_whatever_float_numbers_they_look_like(library: Library) -> None:
    part = make(library, library.isa, KINDS["int8 by row"], 35, 2120)
    held = np.arange(2120) < np.linspace(50, 1000, 35)[:, None]  # row r's sum for output r is -0.4 to -8 million
    x = (-np.sign(part.weights) * held).astype(np.float32)
    answer = run(library, [part], give(x, group_of(part)))
    right, bound = expected(part, x)
    assert (np.abs(answer - right) <= bound).all()


def test_parts_of_different_kinds_answer_side_by_side_with_their_biases(library: Library) -> None:
    parts = [
        make(library, library.isa, kind, out, 200)
        for kind, out in zip(KINDS.values(), range(10, 100, 6), strict=True)
    ]
    bias = np.random.default_rng(1).standard_normal(sum(range(10, 100, 6))).astype(np.float32)
    for rows in (1, 3, 40):
        x = inputs(rows, 200)
        answer = run(library, parts, give(x, CL_SCALED), bias, threads=2)
        alone = np.concatenate([run(library, [part], give(x, group_of(part))) for part in parts], 1)
        assert (answer == alone + bias).all()


@pytest.mark.parametrize("name", KINDS)
def test_inputs_are_made_from_float32_where_the_form_is_not_given(name: str, library: Library) -> None:
    part = make(library, library.isa, KINDS[name], 21, 200)
    for rows in (1, 5):
        x = inputs(rows, 200)
        given = run(library, [part], give(x, group_of(part)))
        assert (given == run(library, [part], give(x, group_of(part), "f32"))).all()
