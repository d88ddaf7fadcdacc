"""Every way to attend is the textbook's, whatever the shapes, the pages, the steps and what free pages hold."""

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu_attention import group_rows
from kernels.ops import Attending, Backend, Heads, KvSpec, Rows
from tests.kernels.textbook import BACKENDS, Layer, Pages, Piece, attend, close, in_steps, noise

backends = pytest.mark.parametrize("ops", BACKENDS.values(), ids=BACKENDS.keys())
FREQUENCIES = (1.0, 0.3, 0.05, 0.004, 0.7, 0.2, 0.01, 0.001)
WINDOWED = Layer(Heads(6, 2, 8), FREQUENCIES[:4], Attending(8**-0.5, window=7))


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    heads = Heads(0, draw(st.integers(1, 3)), draw(st.sampled_from([8, 12, 16])))
    heads = heads._replace(query=heads.kv * draw(st.integers(1, 5)))
    attending = Attending(
        scale=draw(st.sampled_from([heads.dim**-0.5, 0.1, 0.4])),
        window=draw(st.sampled_from([0, 1, 2, 7, 16, 33, 64, 500])),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0, 30.0])),
        sinks=noise(heads.query, seed=7) * 2 if draw(st.booleans()) else None,
    )
    norms = None
    if draw(st.booleans()):
        sizes = (heads.dim, heads.dim) if draw(st.booleans()) else (heads.query * heads.dim, heads.kv * heads.dim)
        norms = (noise(sizes[0], seed=8) * 0.2 + 1, noise(sizes[1], seed=9) * 0.2 + 1)
    rotated = draw(st.sampled_from([heads.dim // 2, heads.dim // 4]))
    return Layer(heads, FREQUENCIES[:rotated], attending, draw(st.sampled_from([1.0, 1.3])), norms)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[int], list[list[Piece]]]:
    """Lengths of some sequences, and steps in which each goes on by some tokens until all are done."""
    lengths = draw(st.lists(st.integers(1, 90), min_size=1, max_size=4))
    done, steps = [0] * len(lengths), []
    while done != lengths:
        pieces = []
        for i, length in enumerate(lengths):
            if left := length - done[i]:
                count = min(left, draw(st.sampled_from([1, 1, 5, 16, 40, 90])))
                pieces.append(Piece(i, done[i], count))
                done[i] += count
        steps.append(pieces)
    return lengths, steps


@backends
@settings(max_examples=25, deadline=None)
@given(layers(), schedules(), st.sampled_from([1, 4, 16, 24, 80]), st.sampled_from([1, 2000, 2**22]))
def test_attention_over_scattered_pages_in_any_steps_is_that_over_the_whole_sequence(
    ops: Backend, layer: Layer, schedule: tuple[list[int], list[list[Piece]]], block_size: int, at_once: int
) -> None:
    lengths, steps = schedule
    sequences = [noise(length, layer.width, seed=i) for i, length in enumerate(lengths)]
    bounds = {name: mock.patch(f"kernels.cpu_attention.{name}", at_once) for name in ("_MAX_SCORES", "_MAX_COPY")}
    with bounds["_MAX_SCORES"], bounds["_MAX_COPY"]:
        answers = in_steps(Pages(ops, layer, sequences, block_size), steps)
    for answer, sequence in zip(answers, sequences, strict=True):
        close(answer, attend(sequence, layer), atol=4e-5)


@backends
@pytest.mark.parametrize("changed", [{}, {"sinks": noise(6, seed=3)}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("count", [1, 6])
def test_what_lies_before_the_window_of_all_tokens_of_a_row_reaches_none(
    ops: Backend, changed: dict[str, Any], count: int
) -> None:
    layer = WINDOWED._replace(attending=WINDOWED.attending._replace(**changed))
    sequences = [noise(60, layer.width), noise(44, layer.width, seed=1)]
    pages = Pages(ops, layer, sequences, block_size=16)
    pages.step([Piece(0, 0, 60 - count), Piece(1, 0, 44 - count)])
    pages.poison(0, 60 - count + 1 - 7)
    pages.poison(1, 44 - count + 1 - 7)
    for sequence, answer in zip(
        sequences, pages.step([Piece(0, 60 - count, count), Piece(1, 44 - count, count)]), strict=True
    ):
        close(answer, attend(sequence, layer)[-count:])


@backends
def test_a_sink_takes_its_share_and_a_huge_one_leaves_nothing(ops: Backend) -> None:
    sinks = torch.tensor([-200.0, 0.0, 80.0, 1.0, 200.0, -80.0])
    layer = WINDOWED._replace(attending=Attending(0.3, sinks=sinks))
    sequence = noise(20, layer.width)
    (answer,) = in_steps(Pages(ops, layer, [sequence], 4), [[Piece(0, 0, 20)]])
    plain = attend(sequence, layer._replace(attending=Attending(0.3))).view(20, 6, 8)
    by_head = answer.view(20, 6, 8)
    close(by_head[:, [0, 5]], plain[:, [0, 5]])
    assert by_head[:, [2, 4]].abs().max() < 1e-20
    assert (by_head[:, 1].norm(dim=-1) < plain[:, 1].norm(dim=-1)).all()


def test_pages_before_the_window_are_not_copied() -> None:
    spec = KvSpec(1, 100, 16, 2, 8)
    table = tuple(range(100))
    rows = Rows([0] * 22, [1000, 500, 900], [1, 1, 20], [table, table, table])
    single, chunk = group_rows(rows, spec, window=64, deterministic=False)
    assert single.table.view(2, -1).tolist() == [list(range(58, 63)), list(range(27, 32))]
    assert chunk.table.tolist() == list(range(52, 58))
    whole, _ = group_rows(rows, spec, window=64, deterministic=True)
    assert whole.table.view(2, -1).tolist() == [[*range(56, 63), 100], [*range(24, 32)]]
    assert [len(group.table) for group in group_rows(rows, spec, window=0, deterministic=False)] == [63, 32, 58]
