"""Step tensors: what kernels read of rows, in memory of their own or filled up to a bucket where they stay."""

import random

import pytest
import torch

from kernels.ops import Rows
from kernels.triton.graphs import buckets, context_tiers, sizes
from kernels.triton.step import StepBuffers, StepShape, StepTensors, one_step, step_bytes

CPU = torch.device("cpu")
PAGE = 4


def rows_of(lengths: list[tuple[int, int]], seed: int = 0) -> Rows:
    """Rows of (tokens before the step, tokens in it), over pages in disorder."""
    draw = random.Random(seed)
    tables = [draw.sample(range(99), -(-(start + count) // PAGE) + 1) for start, count in lengths]
    tokens = [draw.randrange(50) for _, count in lengths for _ in range(count)]
    return Rows(tokens, [start for start, _ in lengths], [count for _, count in lengths], tables)


def check(at: StepTensors, rows: Rows, fill: int = 0) -> None:
    """The tensors say what the rows say, one token after another; rows behind them nothing."""
    spans = list(zip(rows.starts, rows.counts, rows.block_tables, strict=True))
    positions = [p for start, count, _ in spans for p in range(start, start + count)]
    slots = [table[p // PAGE] * PAGE + p % PAGE for start, n, table in spans for p in range(start, start + n)]
    ends = [sum(rows.counts[: i + 1]) for i in range(len(spans))]
    more = max(0, fill - len(spans))
    assert at.token_ids.tolist() == [*rows.token_ids, *[0] * more]
    assert at.positions.tolist() == [*positions, *[0] * more]
    assert at.slots.tolist() == [*slots, *[-1] * more]
    assert at.starts.tolist() == [*rows.starts, *[0] * more]
    assert at.lengths.tolist() == [*(start + count for start, count, _ in spans), *[0] * more]
    assert at.query_starts.tolist() == [0, *ends, *[ends[-1] if ends else 0] * more]
    for i, (start, count, table) in enumerate(spans):
        used = -(-(start + count) // PAGE)
        assert at.block_tables[i, :used].tolist() == list(table[:used])
    assert (at.block_tables[len(spans) :] == 0).all()
    assert all(part.data_ptr() % 16 == 0 for part in at)
    assert (at.slots.dtype, at.token_ids.dtype, at.block_tables.dtype) == (torch.int64, torch.int32, torch.int32)


def test_a_step_of_prompts_and_answers_is_laid_out_token_by_token() -> None:
    rows = rows_of([(0, 5), (7, 1), (3, 9), (4, 4)])
    step = one_step(rows, PAGE, CPU)
    check(step.at, rows)
    assert (step.tokens, step.rows, step.is_decode, step.most_tokens, step.context) == (19, 4, False, 9, 12)
    assert one_step(rows_of([(3, 1), (0, 1)]), PAGE, CPU).is_decode


@pytest.mark.parametrize("fill", [3, 4, 8])
def test_a_step_fills_a_bucket_up_with_rows_that_read_nothing(fill: int) -> None:
    buffers = StepBuffers(StepShape(8, 8, 5), CPU)
    buffers.send(rows_of([(9, 1)] * 8, seed=9), PAGE, 8)  # numbers of a step before
    rows = rows_of([(0, 1), (11, 1), (6, 1)])
    buffers.send(rows, PAGE, fill)
    check(buffers.first(fill), rows, fill)


def test_tables_that_grow_change_or_end_are_those_of_their_step() -> None:
    """Only what differs from the step before is written; a row's place may go to another request."""
    draw, buffers = random.Random(1), StepBuffers(StepShape(4, 4, 8), CPU)
    tables = [[draw.randrange(99) for _ in range(8)] for _ in range(4)]
    for step in range(30):
        place = draw.randrange(4)
        if step % 3 == 0:
            tables[place] = [draw.randrange(99) for _ in range(8)]
        elif step % 3 == 1:
            tables[place][draw.randrange(8)] = draw.randrange(99)
        used = [draw.randint(1, 8) for _ in tables]
        starts = [PAGE * pages - 1 for pages in used]
        rows = Rows([7] * 4, starts, [1] * 4, [tuple(t[:n]) for t, n in zip(tables, used, strict=True)])
        buffers.send(rows, PAGE, 4)
        check(buffers.first(4), rows, 4)


def test_buckets_hold_every_number_of_rows_and_end_with_the_most() -> None:
    assert buckets(1) == (1,)
    assert buckets(3) == (1, 2, 3)
    assert buckets(20) == (1, 2, 4, 8, 16, 20)
    assert buckets(256) == (1, 2, 4, *range(8, 257, 8))
    assert (context_tiers(100), context_tiers(4096), context_tiers(9000)) == ((100,), (4096,), (4096, 9000))
    assert (sizes(1), sizes(6), sizes(8)) == ((1,), (1, 2, 4, 6), (1, 2, 4, 8))


def test_bytes_of_a_step_are_those_of_its_tensors() -> None:
    shape = StepShape(7, 3, 5)
    tensors = StepBuffers(shape, CPU).tensors
    assert sum(part.nbytes for part in tensors) <= step_bytes(shape) <= sum(part.nbytes + 16 for part in tensors)
