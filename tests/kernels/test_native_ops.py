"""Norms, gates, rotations and rows of the native library on every instruction set, against float64."""

import ctypes
import math
from collections.abc import Callable
from ctypes import Structure

import pytest
import torch
from torch import Tensor

from kernels.native import library as native
from kernels.native.backend import NativeBackend
from kernels.native.library import ClGated, ClNorm, ClOp, ClPick, ClRows, ClStep, Library
from kernels.native.location import find_library
from kernels.ops import ACTIVATIONS, Attending, Heads, KvSpec, Rows
from tests.kernels.textbook import EPS, Layer, Pages, Piece, attend, noise

pytestmark = [
    pytest.mark.skipif(find_library() is None, reason="there is no native library to test"),
    pytest.mark.usefixtures("library"),
]
WIDTHS = [1, 15, 16, 33, 200, 3002]
HALF = 2.0**-24  # of the last bit of float32


def within(actual: Tensor, exact: Tensor, bound: Tensor) -> None:
    off = (actual.double() - exact).abs()
    assert (off <= bound).all(), f"{(off / bound).max():.2f} of the bound"


def run(library: Library, code: int, args: Structure, step: ClStep) -> None:
    op = ClOp(code, ctypes.addressof(args))
    library.run(ctypes.addressof(op), 1, ctypes.addressof(step))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm_is_that_of_the_sum_it_returns(width: int) -> None:
    x, residual, weight = noise(5, width), noise(5, width, seed=1) * 3, noise(width, seed=2)
    normed, total = NativeBackend().add_rms_norm(x, residual, weight, EPS, scale=0.22)
    exact = x.double() * 0.22 + residual.double()
    within(total, exact, (x.abs() * 0.22 + residual.abs()).double() * 4 * HALF)
    wide = total.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    within(normed, exact, exact.abs() * (width / 64 + 12) * HALF + 1e-37)


def exact_gate(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """In float64, and the sizes of what is multiplied and added, of which rounding takes its share."""
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up, gate * torch.sigmoid(gate) * up
    if activation == "gelu":
        return gate * torch.special.ndtr(gate) * up, gate * up
    if activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return gate * 0.5 * (1 + torch.tanh(inner)) * up, gate * up
    low, factor = gate.clamp(max=7), up.clamp(-7, 7)
    own = low * torch.sigmoid(1.702 * low)
    return own * (factor + 1), own * (factor.abs() + 1) * (1 + low.abs())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_are_exact_over_all_that_they_can_be_given(activation: str) -> None:
    gate = torch.cat(
        [torch.linspace(-100, 100, 2001), torch.linspace(-8, 8, 3001), torch.tensor([0.0, -0.0, 1e-30])]
    )
    up = noise(len(gate))
    out = NativeBackend().gated(torch.cat([gate, up])[None], activation)[0]
    exact, size = exact_gate(gate.double(), up.double(), activation)
    within(out, exact, size.abs() * 20 * HALF + 1e-33)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_of_what_is_no_number_are_none(activation: str) -> None:
    gate = torch.tensor([math.nan, 1.0, math.inf, 1.0])
    up = torch.tensor([1.0, math.nan, 1.0, 2.0])
    finite = NativeBackend().gated(torch.cat([gate, up])[None], activation)[0].isfinite().tolist()
    assert finite == [False, False, activation == "clamped_swiglu", True]


def test_logits_are_scaled_and_capped_with_their_own_sign(library: Library) -> None:
    x = torch.cat([torch.linspace(-300, 300, 1501), torch.tensor([0.0, 1e-6, -1e-6])])[None]
    for scale, softcap in ((0.3, 0.0), (1.0, 30.0), (0.5, 0.7)):
        logits = x.clone()
        step = ClStep(picks=1, threads=1)
        run(library, native.CL_OP_CAP, native.ClCap(logits.data_ptr(), x.shape[1], scale, softcap), step)
        exact = x.double() * scale
        exact = softcap * torch.tanh(exact / softcap) if softcap else exact
        within(logits, exact, exact.abs() * 20 * HALF + 1e-37)


def test_scores_are_rotated_after_their_norms() -> None:
    for rotated, whole in ((8, False), (3, True)):
        heads = Heads(4, 2, 16)
        sizes = (heads.query * heads.dim, heads.kv * heads.dim) if whole else (heads.dim, heads.dim)
        norms = (noise(sizes[0], seed=8) * 0.2 + 1, noise(sizes[1], seed=9) * 0.2 + 1)
        frequencies = (1.0, 0.3, 0.05, 0.004, 0.7, 0.2, 0.01, 0.001)[:rotated]
        layer = Layer(heads, frequencies, Attending(0.25), 1.3, norms)
        sequence = noise(40, layer.width)
        (answer,) = Pages(NativeBackend(), layer, [sequence], 16).step([Piece(0, 0, 40)])
        torch.testing.assert_close(answer.double(), attend(sequence, layer), rtol=0, atol=2e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_has_the_same_bits_wherever_it_lies(width: int) -> None:
    ops, row, weight = NativeBackend(), noise(1, 2 * width), noise(width, seed=1)
    x = noise(37, 2 * width, seed=2)
    x[[0, 21, 36]] = row
    made: list[Callable[[Tensor], Tensor]] = [lambda rows: ops.rms_norm(rows[:, :width].contiguous(), weight, EPS)]
    made += [lambda rows, name=name: ops.gated(rows, name) for name in ACTIVATIONS]  # type: ignore[misc]  # its default
    made.append(lambda rows: ops.add(rows, rows, 0.3))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for make in made:
            assert all(torch.equal(make(x)[at], make(row)[0]) for at in (0, 21, 36))


@pytest.mark.parametrize("group", [128, 0], ids=["groups", "rows"])
def test_ops_write_rows_in_every_form_that_is_asked_for(library: Library, group: int) -> None:
    tokens, width = 3, 203
    padded, each, summed = 256, group or 256, 32 if group else 256
    count = -(-width // each)
    plain, half = torch.zeros(tokens, width), torch.full((tokens, padded), 7, dtype=torch.bfloat16)
    codes = torch.full((tokens, padded), 7, dtype=torch.int8)
    scales, sums = torch.zeros(tokens, count), torch.zeros(tokens, -(-width // summed), dtype=torch.int32)
    parts = (plain, half, codes, scales, sums)
    out = ClRows(*(part.data_ptr() for part in parts), width, group)
    x, weight, picked = noise(tokens, 2 * width), noise(width, seed=1), torch.tensor([2, 0, 1], dtype=torch.int32)
    at = ctypes.addressof(out)
    for code, args in (
        (native.CL_OP_NORM, ClNorm(x.data_ptr(), None, weight.data_ptr(), None, at, 1.0, EPS)),
        (native.CL_OP_GATED, ClGated(x.data_ptr(), at, 0)),
        (native.CL_OP_PICK, ClPick(x.data_ptr(), at)),
    ):
        for part in parts:
            part.fill_(7)
        step = ClStep(tokens=tokens, picks=tokens, threads=1, picked=picked.data_ptr())
        run(library, code, args, step)
        assert torch.equal(half[:, :width], plain.bfloat16())
        assert not half[:, width:].any()
        assert not codes[:, width:].any()
        assert torch.equal(sums, codes.unflatten(1, (-1, summed)).sum(2, dtype=torch.int32)[:, : sums.shape[1]])
        for g in range(count):
            some, own = plain[:, g * each : (g + 1) * each], codes[:, g * each : (g + 1) * each]
            exact, scale = some.double(), scales[:, g : g + 1].double()
            within(own[:, : some.shape[1]].double() * scale, exact, scale * 0.5001)
            torch.testing.assert_close(scale * 127, exact.abs().amax(1, keepdim=True), rtol=1e-6, atol=0)
    assert torch.equal(plain, x.flatten()[: 3 * width].view(3, width)[[2, 0, 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings_are_the_tables_numbers_times_the_scale(dtype: torch.dtype) -> None:
    weight = noise(50, 33).to(dtype)
    ops = NativeBackend(dtype)
    table, kv = ops.prepare_table(weight), ops.allocate_kv(KvSpec(1, 1, 4, 1, 8))
    batch = ops.begin(Rows([3, 49, 0, 3], [0], [4], [(0,)]), kv)
    picked = weight[[3, 49, 0, 3]].float()
    assert torch.equal(ops.embed(batch, table), picked)
    assert torch.equal(ops.embed(batch, table, 5.7), picked * torch.tensor(5.7, dtype=dtype).float())
