"""Quantised matrices: what they stand for, and the CPU's products with them, in torch kernels or by blocks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import packed
from kernels.packed import Packed, cpu_bytes, cpu_kernel, cpu_table_bytes, dequantise
from kernels.packed_cpu import (
    _Int8Vnni,
    has_vnni,
    layout_of,
    linear,
    prepare,
    prepare_table,
    read_rows,
    tie,
)

TILE = 16
KINDS = ("int4", "int4 zeros", "int8", "int8 zeros", "float8", "table")


def matrix(
    kind: str, out: int, inner: int, rows: int, columns: int, ordered: bool = False, seed: int = 0
) -> Packed:
    """A random quantised matrix."""
    generator = torch.Generator().manual_seed(seed)
    groups = (-(-out // rows), -(-inner // columns))
    scales = torch.rand(groups, generator=generator) * 0.1 + 0.01
    bits = 4 if kind.startswith(("int4", "table")) else 8
    low = 0 if kind.endswith("zeros") or kind == "table" else -(2 ** (bits - 1))
    codes = torch.randint(low, low + 2**bits, (out, inner), generator=generator)
    zeros = torch.randint(0, 2**bits, groups, generator=generator).float() if kind.endswith("zeros") else None
    table = torch.randn(16, generator=generator) if kind == "table" else None
    order = torch.randperm(inner, generator=generator) if ordered else None
    if kind == "float8":
        held = torch.randn(out, inner, generator=generator).to(torch.float8_e4m3fn)
    else:
        held = codes.to(torch.int8 if low < 0 else torch.uint8)
    return Packed(held, scales, rows, columns, bits, zeros, table, order)


def by_definition(given: Packed) -> torch.Tensor:
    """Each number by itself, in float64."""
    out, inner = given.shape
    plain = torch.zeros(out, inner, dtype=torch.float64)
    codes, scales = given.codes.double().tolist(), given.scales.tolist()
    for n in range(out):
        for k in range(inner):
            group = (n // given.rows, k // given.columns)
            value = codes[n][k] if given.table is None else float(given.table[int(codes[n][k])])
            zero = 0.0 if given.zeros is None else float(given.zeros[group])
            column = k if given.order is None else int(given.order[k])
            plain[n, column] = (value - zero) * scales[group[0]][group[1]]
    return plain


def tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor inside nested tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, tuple) else []


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


shapes = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "out": st.integers(1, 40),
        "inner": st.integers(1, 80),
        "rows": st.sampled_from((1, 1, 3, 16, 64)),
        "columns": st.sampled_from((1, 5, 16, 32, 64, 128)),
        "ordered": st.booleans(),
    }
)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, at_once=st.sampled_from((1, 100, 2**20)))
def test_a_matrix_stands_for_what_its_definition_says(shape: dict[str, Any], at_once: int) -> None:
    given_matrix = matrix(**shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_AT_ONCE", at_once)
        found = dequantise(given_matrix)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), by_definition(given_matrix), rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, at_once=st.sampled_from((1, 2**20)), tile=st.sampled_from((0, TILE)))
def test_products_are_those_of_the_plain_matrix(shape: dict[str, Any], at_once: int, tile: int) -> None:
    given_matrix, x = matrix(**shape), torch.randn(TILE, shape["inner"])
    plain = dequantise(given_matrix)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 0.008)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packed, "_AT_ONCE", at_once)
            weight = prepare([given_matrix], [], dtype)
            found = linear(x.to(dtype), weight, tile)
        assert found.dtype == dtype
        assert error(found, x.to(dtype).double() @ plain.double().T) < bound
        size = sum(tensor.nbytes for tensor in tensors(weight))
        assert size == cpu_bytes(layout_of(given_matrix), given_matrix.shape, dtype.itemsize)


FITTING = [  # kind, out, inner, rows, columns, kernel in bfloat16
    ("int4", 48, 64, 1, 32, "int4"),
    ("int4 zeros", 16, 256, 1, 128, "int4"),
    ("int4", 80, 512, 1, 256, "int4"),
    ("int4 zeros", 16, 96, 1, 32, "int4"),
    ("int8", 7, 64, 1, 64, "int8"),
    ("int8", 48, 192, 1, 192, "int8"),
    ("int8", 128, 192, 1, 192, "int8"),
    ("int4", 24, 64, 1, 32, "codes"),
    ("int4", 48, 80, 1, 32, "codes"),
    ("int4", 48, 64, 1, 16, "codes"),
    ("int8", 48, 40, 1, 40, "codes"),
    ("int8 zeros", 48, 64, 1, 64, "codes"),
    ("int8", 48, 64, 1, 32, "codes"),
    ("int8", 48, 64, 48, 64, "codes"),
    ("float8", 48, 64, 1, 64, "codes"),
    ("table", 48, 64, 1, 32, "codes"),
]


@pytest.mark.parametrize(("kind", "out", "inner", "rows", "columns", "kernel"), FITTING)
@pytest.mark.parametrize("ordered", [False, True])
def test_torchs_kernels_are_taken_where_they_fit_and_are_as_exact_as_a_plain_bfloat16_matrix(
    kind: str, out: int, inner: int, rows: int, columns: int, kernel: str, ordered: bool
) -> None:
    given_matrix = matrix(kind, out, inner, rows, columns, ordered)
    assert cpu_kernel(layout_of(given_matrix), given_matrix.shape, 2) == kernel
    assert cpu_kernel(layout_of(given_matrix), given_matrix.shape, 4) == "codes"
    x = torch.randn(TILE, inner).bfloat16()
    plain = dequantise(given_matrix)
    exact = x.double() @ plain.double().T
    own = error(F.linear(x, plain.bfloat16()), exact)
    prepared = prepare([given_matrix], [], torch.bfloat16)
    found = linear(x, prepared)
    if not isinstance(prepared.parts[0], _Int8Vnni):
        assert error(found, exact) < 1.5 * own
        return
    # an input is off by half a step at most, a scale and an answer by half a bfloat16's last place each
    inputs = x.abs().amax(1, keepdim=True).double() / 254 * plain.abs().double().sum(1)
    assert bool(((found - exact).abs() <= inputs + (exact.abs() + inputs) * 2**-7).all())


@pytest.mark.skipif(not has_vnni(), reason="this processor has no VNNI")
def test_inputs_as_bytes_keep_zeros_and_rows_that_are_not_finite() -> None:
    weight = prepare([matrix("int8", 64, 64, 1, 64)], [], torch.bfloat16)
    assert isinstance(weight.parts[0], _Int8Vnni)
    x = torch.randn(4, 64).bfloat16()
    x[1], x[2, 3], x[3, 5] = 0, float("nan"), float("inf")
    found = linear(x, weight)
    assert bool(found[0].isfinite().all())
    assert not bool(found[1].any())
    assert not bool(found[2:].isfinite().any())


@settings(max_examples=60, deadline=None)
@given(shape=shapes, at_once=st.sampled_from((1, 200, 2**20)), seed=st.integers(0, 99))
def test_rows_of_a_table_are_its_exact_numbers_and_tied_it_multiplies_as_the_same_matrix(
    shape: dict[str, Any], at_once: int, seed: int
) -> None:
    given_matrix = matrix(**(shape | {"ordered": False}))
    _check_table(given_matrix, at_once, seed)


@pytest.mark.parametrize("case", FITTING)
def test_tables_in_torchs_kernels_take_what_is_planned(case: tuple[str, int, int, int, int, str]) -> None:
    _check_table(matrix(*case[:5]), 2**20, 0)


def _check_table(given_matrix: Packed, at_once: int, seed: int) -> None:
    out, inner = given_matrix.shape
    generator = torch.Generator().manual_seed(seed)
    ids, x = torch.randint(0, out, (21,), generator=generator), torch.randn(5, inner, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_AT_ONCE", at_once)
        table = prepare_table(given_matrix)
        assert torch.equal(read_rows(table, ids), dequantise(given_matrix)[ids])
        for dtype in (torch.float32, torch.bfloat16):
            tied, alone = tie(table, dtype), prepare([given_matrix], [], dtype)
            found, wanted = linear(x.to(dtype), tied), linear(x.to(dtype), alone)
            by_bytes = isinstance(alone.parts[0], _Int8Vnni)  # which rounds its inputs; a table does not
            assert error(found, wanted.double()) < 0.02 if by_bytes else torch.equal(found, wanted)
            held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors((table, tied))}
            layout = layout_of(given_matrix)
            assert sum(held.values()) == cpu_table_bytes(layout, (out, inner), dtype.itemsize, is_tied=True)
            own = sum(tensor.nbytes for tensor in tensors(table))
            assert own == cpu_table_bytes(layout, (out, inner), dtype.itemsize, is_tied=False)


def test_matrices_of_several_kinds_stack_with_their_biases() -> None:
    several = [matrix("int4", 32, 64, 1, 32), torch.randn(5, 64), matrix("table", 7, 64, 1, 32, seed=3)]
    plain = torch.cat([dequantise(m) if isinstance(m, Packed) else m for m in several])
    biases = [torch.randn(len(m.codes) if isinstance(m, Packed) else len(m)) for m in several]
    x = torch.randn(3, 64)
    found = linear(x, prepare(several, biases, torch.float32))
    assert torch.allclose(found, F.linear(x, plain, torch.cat(biases)), atol=1e-5)


def test_what_is_prepared_shares_no_memory_with_what_it_was_made_of() -> None:
    for kind in KINDS:
        given_matrix = matrix(kind, 16, 64, 1, 64, ordered=True)
        for dtype in (torch.float32, torch.bfloat16):
            own = {t.untyped_storage().data_ptr() for t in tensors(given_matrix)}
            made = tensors(prepare([given_matrix], [], dtype))
            assert not own & {t.untyped_storage().data_ptr() for t in made}
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "out", "inner", "rows", "columns"),
    [
        ("int4", 48, 64, 1, 32),
        ("int4 zeros", 2048, 5632, 1, 128),
        ("int4", 5632, 2048, 1, 32),
        ("int8", 2048, 5632, 1, 5632),
        ("int8", 5632, 2048, 1, 2048),
        ("int8", 33, 64, 1, 64),
        ("int8 zeros", 96, 352, 1, 32),
        ("float8", 1000, 2880, 128, 128),
        ("table", 720, 2880, 1, 32),
    ],
)
def test_a_rows_bits_depend_neither_on_its_tile_mates_nor_on_its_place(
    kind: str, out: int, inner: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    given_matrix = matrix(kind, out, inner, rows, columns)
    weight = prepare([given_matrix], [], dtype)
    x = torch.randn(2 * TILE, inner).to(dtype)
    whole = linear(x, weight, TILE)
    for row, place in ((0, 3), (5, 31), (16, 0), (31, 17)):
        others = torch.randn(2 * TILE, inner).to(dtype)
        others[place] = x[row]
        assert torch.equal(linear(others, weight, TILE)[place], whole[row])
