"""Attention of the native library on every instruction set: as exact as its pages' numbers, with the same bits."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.native.backend import NativeBackend
from kernels.native.location import find_library
from kernels.ops import Attending, Heads
from tests.kernels.textbook import Layer, Pages, Piece, in_steps, noise

pytestmark = [
    pytest.mark.skipif(find_library() is None, reason="there is no native library to test"),
    pytest.mark.usefixtures("library"),
]
formats = pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
PLAIN = Attending(0.25)


class Expected(NamedTuple):
    """Answers in float64 [tokens, query heads, dim], and how far rounding may take one from them."""

    answers: Tensor
    bound: Tensor


def expect(qkv: Tensor, layer: Layer, kv_dtype: str) -> Expected:
    """Attention without rotation.

    Rounding moves every score of a query by at most `moved`: shares change by factors within exp(2 moved) then,
    and an answer by that part of the sum of |share · value| at most; values and shares are rounded, too.
    """
    heads, how = layer.heads, layer.attending
    x = qkv.double().view(len(qkv), -1, heads.dim)
    q, k, v = x[:, : heads.query], x[:, heads.query : -heads.kv], x[:, -heads.kv :]
    answers, bound = torch.empty_like(q), torch.empty_like(q)
    for t in range(len(q)):
        first = max(0, t + 1 - how.window) if how.window else 0
        for h in range(heads.query):
            g = h // (heads.query // heads.kv)
            keys, values = k[first : t + 1, g], v[first : t + 1, g]
            scores = keys @ q[t, h] * how.scale
            moved = (score_error(q[t, h], keys, kv_dtype) * how.scale).max()
            if how.softcap:
                scores = how.softcap * torch.tanh(scores / how.softcap)
                moved = moved + how.softcap * 4e-7
            own = scores if how.sinks is None else torch.cat([scores, how.sinks[h : h + 1].double()])
            shares = torch.softmax(own, 0)[: len(keys)]
            answers[t, h] = shares @ values
            mass = shares @ values.abs()
            rounding = {"float32": 2.0**-24 * (len(keys) + 20), "bfloat16": 2.0**-7.9, "int8": 2.0**-8.9}[kv_dtype]
            bound[t, h] = mass * (torch.expm1(2 * moved) + rounding) + 1e-7
            if kv_dtype == "int8":
                bound[t, h] += torch.exp(2 * moved) * (shares @ values.abs().amax(1)) / 254 * 1.01
    return Expected(answers, bound)


def score_error(q: Tensor, keys: Tensor, kv_dtype: str) -> Tensor:
    """How far the product with each key may be off."""
    size = keys.abs() @ q.abs()
    if kv_dtype == "float32":
        return size * 2.0**-24 * (len(q) + 4)
    if kv_dtype == "bfloat16":
        return size * (2.0**-8 + 2.0**-17 + 2.0**-20)
    of_q, of_keys = q.abs().max() / 254 * 1.01, keys.abs().amax(1) / 254 * 1.01
    return q.abs().sum() * of_keys + keys.abs().sum(1) * of_q + len(q) * of_q * of_keys + size * 2.0**-20


@cache
def given(shape: int, kv_dtype: str) -> tuple[list[Tensor], list[Expected]]:
    """Sequences, and what is expected of each; the same for all instruction sets."""
    heads, attending, _ = SHAPES[shape]
    layer = Layer(heads, (), attending)
    sequences = [noise(n, layer.width, seed=n) for n in (50, 1, 34)]
    return sequences, [expect(sequence, layer, kv_dtype) for sequence in sequences]


SHAPES = [
    (Heads(6, 2, 16), PLAIN, 16),
    (Heads(7, 1, 33), Attending(0.2, window=19), 24),
    (Heads(3, 3, 8), Attending(0.3, softcap=2.0, sinks=noise(3, seed=7)), 1),
    (Heads(40, 1, 5), Attending(0.4, window=1), 100),
    (Heads(2, 2, 112), Attending(0.1, 40, 30.0, noise(2, seed=7) * 2), 40),
    (Heads(4, 1, 512), Attending(0.04), 7),
]


@formats
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_answers_are_within_what_the_pages_numbers_round(shape: int, kv_dtype: str) -> None:
    (heads, attending, block_size), (sequences, expected) = SHAPES[shape], given(shape, kv_dtype)
    pages = Pages(NativeBackend(kv_dtype=kv_dtype), Layer(heads, (), attending), sequences, block_size)
    steps = [
        [Piece(0, 0, 20), Piece(1, 0, 1)],
        [Piece(2, 0, 33), Piece(0, 20, 1)],
        [Piece(0, 21, 29), Piece(2, 33, 1)],
    ]
    for answer, (exact, bound) in zip(in_steps(pages, steps), expected, strict=True):
        off = (answer.double().view(exact.shape) - exact).abs()
        assert (off <= bound).all(), f"{(off / bound).max():.2f} of the bound"


def whole(ops: NativeBackend, layer: Layer, sequence: Tensor, block_size: int) -> Tensor:
    (answer,) = in_steps(Pages(ops, layer, [sequence], block_size), [[Piece(0, 0, len(sequence))]])
    return answer


@formats
@pytest.mark.parametrize(
    ("attending", "block_size"),
    [(PLAIN, 16), (Attending(0.25, window=300), 24), (Attending(0.25, 1500, 4.0, noise(6, seed=3)), 16)],
    ids=["all", "window", "every kind"],
)
def test_a_long_context_has_the_same_bits_in_any_chunks_beside_any_rows_on_any_number_of_threads(
    attending: Attending, kv_dtype: str, block_size: int
) -> None:
    layer = Layer(Heads(6, 2, 16), (), attending)
    length = 2300  # over several splits, which threads share where there are few rows
    sequences = [noise(length, layer.width), *(noise(n, layer.width, seed=n) for n in (40, 1100))]
    ops = NativeBackend(kv_dtype=kv_dtype)
    expected = [whole(ops, layer, sequence, block_size) for sequence in sequences]
    ends = [700, 2290, 2291, 2292, length]
    steps = [[Piece(0, a, b - a)] for a, b in zip([0, *ends], ends, strict=False)]
    steps[1] += [Piece(1, 0, 39), Piece(2, 0, 1099)]
    steps[3] += [Piece(1, 39, 1), Piece(2, 1099, 1)]
    torch.set_num_threads(2)
    pieces = in_steps(Pages(ops, layer, sequences, block_size), steps)
    for answer, alone in zip(pieces, expected, strict=True):
        assert torch.equal(answer, alone)


def test_query_heads_that_are_too_many_for_one_piece_have_the_same_bits_too() -> None:
    layer = Layer(Heads(70, 1, 16), (), PLAIN)
    sequence = noise(1200, layer.width)
    ops = NativeBackend(kv_dtype="bfloat16")
    expected = whole(ops, layer, sequence, 16)
    torch.set_num_threads(2)
    (answer,) = in_steps(Pages(ops, layer, [sequence], 16), [[Piece(0, 0, 1199)], [Piece(0, 1199, 1)]])
    assert torch.equal(answer, expected)


@formats
@pytest.mark.parametrize(
    ("at", "fault"),
    [(3, float("nan")), (3, float("inf")), (35, float("nan")), (51, float("nan")), (51, float("inf"))],
    ids=["query", "infinite query", "key", "value", "infinite value"],
)
def test_a_fault_comes_out_of_its_row_and_touches_no_other(kv_dtype: str, at: int, fault: float) -> None:
    layer = Layer(Heads(2, 1, 16), (), PLAIN)
    healthy, faulty = noise(60, layer.width), noise(60, layer.width, seed=1)
    ops = NativeBackend(kv_dtype=kv_dtype)
    expected = whole(ops, layer, healthy, 16)
    faulty[41, at] = fault
    steps = [[Piece(0, 0, 30), Piece(1, 0, 50)], [Piece(1, 50, 10), Piece(0, 30, 30)]]
    answer, other = in_steps(Pages(ops, layer, [healthy, faulty], 16), steps)
    assert torch.equal(answer, expected)
    reached = other[41:42] if at == 3 else other[41:]
    assert not torch.isfinite(reached).all(1).any()


def test_what_lies_before_the_window_of_a_row_reaches_nothing_where_numbers_are_codes() -> None:
    layer = Layer(Heads(4, 2, 16), (), Attending(0.25, window=7))
    sequence = noise(60, layer.width)
    ops = NativeBackend(kv_dtype="int8")
    expected = whole(ops, layer, sequence, 16)
    faulty = sequence.clone()
    faulty[:52, 4 * 16 :] = float("nan")
    pages = Pages(ops, layer, [faulty], 16)
    pages.step([Piece(0, 0, 58)])
    answers = [pages.step([Piece(0, at, 1)])[0] for at in (58, 59)]
    assert torch.equal(torch.cat(answers), expected[58:])
