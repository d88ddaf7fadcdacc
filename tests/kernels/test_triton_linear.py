"""Products with matrices of every form, through the one function that chooses among kernels."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.packed import Layout, Packed, dequantise
from kernels.triton import configs
from kernels.triton.case import Draw
from kernels.triton.inputs import Rounded
from kernels.triton.launch import Unsupported, recording
from kernels.triton.layout import form_of, linear_scratch_bytes, matrix_bytes
from kernels.triton.linear import linear, rounds_to, scratch_bytes
from kernels.triton.linear_bytes import draw_matrix as bytes_matrix
from kernels.triton.linear_codes import multiply
from kernels.triton.linear_int4 import draw_matrix as int4_matrix
from kernels.triton.quantise import quantise
from kernels.triton.weights import Fp8, Int4, Linear, layout_of, prepare_linear, prepare_matrix, prepare_table, tie
from tests.kernels.proofs import DEVICE, SLACK

N, K = 48, 256
DRAW = Draw(DEVICE)
MADE_PLAIN = 300  # rows, more than quantised matrices are multiplied with as they are
ROUNDING = 0.02  # of a row's sums, relative to their size, where inputs are rounded to eight bits


def _ordered(matrix: Packed) -> Packed:
    order = torch.randperm(matrix.shape[1], generator=torch.Generator().manual_seed(7))
    return matrix._replace(order=order.to(matrix.codes.device))


def _mxfp4() -> Packed:
    return int4_matrix(DRAW, N, K, 32, "table")


class _Kind(NamedTuple):
    matrix: Packed
    form: str


KINDS = {
    "int4 signed": _Kind(int4_matrix(DRAW, N, K, 128, "signed"), "int4"),
    "int4 zeros in order": _Kind(_ordered(int4_matrix(DRAW, N, K, 64, "zeros")), "int4"),
    "int4 odd size": _Kind(int4_matrix(DRAW, N, 200, 200, "fractions"), "int4"),
    "int4 odd groups": _Kind(int4_matrix(DRAW, N, 240, 24, "fractions"), "plain"),
    "table": _Kind(_mxfp4(), "int4"),
    "table of 256": _Kind(
        Packed(DRAW.integers(0, 256, N, K, dtype=torch.uint8), torch.ones(N, 1, device=DEVICE), 1, K, 8, None,
               DRAW.normal(256, dtype=torch.float32)), "plain"),
    "int8 row": _Kind(bytes_matrix(DRAW, N, K, 1, K, "signed"), "int8"),
    "int8 groups in order": _Kind(_ordered(bytes_matrix(DRAW, N, K, 1, 64, "signed")), "int8"),
    "int8 zeros": _Kind(bytes_matrix(DRAW, N, K, 1, 32, "zeros"), "int8"),
    "fp8 tensor": _Kind(bytes_matrix(DRAW, N, K, N, K, "float"), "fp8"),
    "fp8 blocks": _Kind(bytes_matrix(DRAW, 128, K, 128, 128, "float"), "fp8"),
    "fp8 part blocks": _Kind(bytes_matrix(DRAW, 150, K, 128, 128, "float"), "fp8"),
}  # fmt: skip


def _multiply(x: Tensor | Rounded, weight: Linear, n: int, **how: bool) -> Tensor:
    """Into columns of a wider tensor, with just the scratch memory that is asked for."""
    rows = len(x.codes if isinstance(x, Rounded) else x)
    wide = torch.full((rows, n + 16), 7.0, dtype=torch.bfloat16, device=DEVICE)
    scratch = torch.empty(scratch_bytes(weight, rows, 2), dtype=torch.uint8, device=DEVICE)
    linear(x, weight, wide[:, 16:], scratch, **how)
    assert (wide[:, :16] == 7).all()
    return wide[:, 16:]


def _off(y: Tensor, exact: Tensor) -> float:
    """How far an answer is off, where rounding it alone is 1."""
    floor = torch.linalg.vector_norm(exact.bfloat16().double() - exact)
    return float(torch.linalg.vector_norm(y.double() - exact) / floor)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rows", [2, 20, MADE_PLAIN])
def test_every_kind_of_matrix_multiplies_as_the_plain_one_it_stands_for(name: str, rows: int) -> None:
    matrix, form = KINDS[name]
    bias = DRAW.normal(matrix.shape[0], dtype=torch.float32)
    weight = prepare_linear([matrix], [bias], torch.bfloat16, DEVICE)
    x = DRAW.normal(rows, matrix.shape[1])
    exact = x.double() @ dequantise(matrix).double().T + bias.double()
    allowed = SLACK if form != "plain" and rows < MADE_PLAIN else 2 * SLACK  # numbers are rounded as well, once
    assert _off(_multiply(x, weight, matrix.shape[0]), exact) <= allowed


@pytest.mark.parametrize("name", KINDS)
def test_a_prepared_matrix_takes_the_bytes_that_were_planned(name: str) -> None:
    matrix, form = KINDS[name]
    layout = layout_of(matrix)
    assert form_of(layout, matrix.shape) == form
    for prepared in (prepare_matrix(matrix, torch.bfloat16, DEVICE), _on_meta(matrix)):
        held = sum(part.nbytes for part in prepared if isinstance(part, Tensor))
        assert held == matrix_bytes(layout, matrix.shape, 2)
        planned = linear_scratch_bytes(layout, matrix.shape, 512, 2)
        assert scratch_bytes(Linear((prepared,), None), 512, 2) == planned


def _on_meta(matrix: Packed) -> tuple[object, ...]:
    parts = {name: part.to("meta") for name, part in matrix._asdict().items() if isinstance(part, Tensor)}
    return prepare_matrix(matrix._replace(**parts), torch.bfloat16, "meta")


@pytest.mark.parametrize(
    ("name", "round_inputs", "rows"),
    [
        ("int4 signed", False, 18),
        ("int8 groups in order", False, 18),
        ("int8 row", True, 18),
        ("fp8 blocks", True, 66),
    ],
)
def test_a_deterministic_row_has_the_same_bits_whatever_the_other_rows_are(
    name: str, round_inputs: bool, rows: int
) -> None:
    matrix = KINDS[name].matrix
    weight = prepare_linear([matrix], [], torch.bfloat16, DEVICE)
    x = DRAW.normal(rows, matrix.shape[1])
    many = _multiply(x, weight, matrix.shape[0], deterministic=True, round_inputs=round_inputs)
    for some in (slice(3, 4), slice(rows - 7, rows)):
        few = _multiply(x[some], weight, matrix.shape[0], deterministic=True, round_inputs=round_inputs)
        assert torch.equal(few, many[some])


def test_a_deterministic_plain_row_has_the_same_bits_whatever_the_other_rows_are() -> None:
    weight = prepare_linear([DRAW.normal(N, 70)], [], torch.bfloat16, DEVICE)
    x = DRAW.normal(130, 70)
    many = _multiply(x, weight, N, deterministic=True)
    assert torch.equal(_multiply(x[65:66], weight, N, deterministic=True), many[65:66])


@pytest.mark.parametrize(
    "name", ["int8 row", "int8 groups in order", "fp8 tensor", "fp8 blocks", "fp8 part blocks"]
)
def test_rounded_inputs_come_near_the_exact_product(name: str) -> None:
    matrix = KINDS[name].matrix
    weight = prepare_linear([matrix], [], torch.bfloat16, DEVICE)
    x = DRAW.normal(32, matrix.shape[1])
    exact = x.double() @ dequantise(matrix).double().T
    y = _multiply(x, weight, matrix.shape[0], round_inputs=True)
    off = float(torch.linalg.vector_norm(y.double() - exact) / torch.linalg.vector_norm(exact))
    most = ROUNDING if matrix.codes.dtype is torch.int8 else 2 * ROUNDING  # e4m3 has four bits of mantissa
    assert _off(y, exact) > SLACK, "inputs were not rounded"
    assert off < most


def test_inputs_that_are_codes_already_are_multiplied_as_they_are() -> None:
    for name in ("int8 row", "fp8 tensor"):
        matrix = KINDS[name].matrix
        weight = prepare_linear([matrix, matrix], [], torch.bfloat16, DEVICE)
        dtype = rounds_to(weight)
        assert dtype is not None
        assert len(weight.parts) == 1
        codes, scales = quantise(DRAW.normal(5, K).double(), dtype)
        y = _multiply(Rounded(codes, scales[:, 0].float()), weight, 2 * N)
        exact = (codes.double() * scales) @ dequantise(matrix).double().T
        assert _off(y, exact.repeat(1, 2)) <= SLACK


def test_cublas_multiplies_rows_of_e4m3_with_a_scale_each() -> None:
    matrix = KINDS["fp8 tensor"].matrix
    weight = prepare_matrix(matrix, torch.bfloat16, DEVICE)
    assert isinstance(weight, Fp8)
    codes, scales = quantise(DRAW.normal(32, K).double(), torch.float8_e4m3fn)
    x, out = Rounded(codes, scales[:, 0].float()), torch.empty(32, N, dtype=torch.bfloat16, device=DEVICE)
    with recording() as started:
        multiply(x, weight, None, out)
    assert started == [], "a kernel of ours would run"
    multiply(x, weight, None, out)
    assert _off(out, (codes.double() * scales) @ dequantise(matrix).double().T) <= SLACK


def test_devices_without_e4m3_multiply_its_numbers_as_bfloat16_and_refuse_its_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = KINDS["fp8 tensor"].matrix
    weight = prepare_linear([matrix], [], torch.bfloat16, DEVICE)
    monkeypatch.setattr(configs, "_capability", 86)
    assert rounds_to(weight) is None
    x = DRAW.normal(20, K)
    exact = x.double() @ dequantise(matrix).double().T
    assert _off(_multiply(x, weight, N, round_inputs=True), exact) <= SLACK
    codes, scales = quantise(x.double(), torch.float8_e4m3fn)
    part = weight.parts[0]
    assert isinstance(part, Fp8)
    with pytest.raises(Unsupported, match=r"8\.9, not 8\.6"):
        multiply(Rounded(codes, scales[:, 0].float()), part, None, torch.empty(20, N))


def test_matrices_of_one_form_are_stacked_into_one_and_others_stay_side_by_side() -> None:
    one, other = KINDS["int4 signed"].matrix, int4_matrix(DRAW, 32, K, 128, "signed")
    plain, bias = DRAW.normal(20, K, scale=0.05), DRAW.normal(N + 52, dtype=torch.float32)
    weight = prepare_linear([one, other, plain], list(bias.split([N, 32, 20])), torch.bfloat16, DEVICE)
    assert [type(part).__name__ for part in weight.parts] == ["Int4", "Plain"]
    x = DRAW.normal(3, K)
    together = torch.cat([dequantise(one), dequantise(other), plain.float()]).double()
    assert _off(_multiply(x, weight, N + 52), x.double() @ together.T + bias.double()) <= SLACK


def test_a_table_and_the_matrix_of_logits_are_one_copy() -> None:
    table = prepare_table(KINDS["int4 signed"].matrix, torch.bfloat16, DEVICE)
    assert isinstance(table, Int4)
    head = tie(table).parts[0]
    assert isinstance(head, Int4)
    assert head.codes is table.codes


def test_a_plain_matrix_takes_no_scratch_and_its_own_bytes() -> None:
    assert form_of(None, (N, K)) == "plain"
    assert matrix_bytes(None, (N, K), 2) == 2 * N * K
    assert linear_scratch_bytes(None, (N, K), 512, 2) == 0
    assert form_of(Layout(1, 24, 4), (N, 240)) == "plain"
