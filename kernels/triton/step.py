"""One step's rows as tensors on the device: built on the host in one piece of memory, and copied there at once.

The tables of pages come last, so that a copy may end behind those of the rows that there are. A row that only
fills a graph's bucket has no tokens before it, length 0, slot -1 no pages: it reads nothing, writes nowhere.

    token_ids, positions   int32 [T]
    slots                  int64 [T]     page · block_size + place in the page; -1: nowhere
    starts, lengths        int32 [R]     tokens of a row before the step, and with it
    query_starts           int32 [R + 1] where each row's tokens begin
    block_tables           int32 [R, pages]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import Rows

_NOWHERE = -1
_ALIGNED = 16  # bytes: kernels are compiled for addresses that divide by it


class StepShape(NamedTuple):
    """Sizes of a step's tensors: tokens, rows, and the most pages of a row."""

    tokens: int
    rows: int
    pages: int


class StepTensors(NamedTuple):
    """A step's rows on the device; see this module."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    starts: Tensor
    lengths: Tensor
    query_starts: Tensor
    block_tables: Tensor


class StepBatch(NamedTuple):
    """A step, prepared.

    Attributes:
        at: its tensors.
        is_decode: every row has one token, or none.
        most_tokens: of one row in this step.
        context: no row has more tokens, with those before the step.
    """

    at: StepTensors
    is_decode: bool
    most_tokens: int
    context: int

    @property
    def tokens(self) -> int:
        """Of the step, those that fill it up included."""
        return self.at.token_ids.shape[0]

    @property
    def rows(self) -> int:
        """Of the step, those that fill it up included."""
        return self.at.lengths.shape[0]


class _Field(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class _Numbers(NamedTuple):
    """A step's numbers on the host, as in `StepTensors`."""

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int64]
    starts: NDArray[np.int32]
    lengths: NDArray[np.int32]
    query_starts: NDArray[np.int32]
    block_tables: NDArray[np.int32]


class StepBuffers:
    """Memory for the tensors of steps of one shape, or of fewer rows of one token each.

    Args:
        shape: of the largest step.
        device: where it is computed.
        hosts: steps that may be on their way to the device at once.
    """

    def __init__(self, shape: StepShape, device: torch.device, hosts: int = 2) -> None:
        self.shape = shape
        self._device = device
        self._fields = _lay_out(shape)
        self._before_tables = self._fields["block_tables"].begin
        self._at = torch.zeros(self._fields["block_tables"].end, dtype=torch.uint8, device=device)
        self._hosts = [_Host(self._fields, device) for _ in range(hosts)] if device.type != "meta" else []
        self._turn = 0

    @property
    def tensors(self) -> StepTensors:
        """All of it, on the device."""
        return StepTensors(**{name: self._view(name) for name in StepTensors._fields})

    def first(self, rows: int) -> StepTensors:
        """The tensors of a step of so many rows of one token each, on the device."""
        ends = {name: rows + (name == "query_starts") for name in StepTensors._fields}
        return StepTensors(**{name: self._view(name)[:end] for name, end in ends.items()})

    def send(self, rows: Rows, block_size: int, fill: int = 0) -> None:
        """Copy a step to the device.

        Args:
            rows: of the step; no more than there is room for.
            block_size: tokens of a page.
            fill: rows, of one token each, that the step is filled up to.
        """
        if not self._hosts:
            return
        host = self._hosts[self._turn]
        self._turn = (self._turn + 1) % len(self._hosts)
        host.wait()
        host.write(rows, block_size, fill)
        end = self._before_tables + 4 * self.shape.pages * max(fill, len(rows.starts))
        self._at[:end].copy_(host.memory[:end], non_blocking=True)
        host.sent()

    def _view(self, name: str) -> Tensor:
        field = self._fields[name]
        return self._at[field.begin : field.end].view(field.dtype).view(field.shape)


class _Host:
    """A step on the host, in memory that the device reads; written again once that is done."""

    def __init__(self, fields: Mapping[str, _Field], device: torch.device) -> None:
        self.memory = torch.zeros(fields["block_tables"].end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._read = torch.cuda.Event() if device.type == "cuda" else None
        views = {name: _numbers(self.memory.numpy(), field) for name, field in fields.items()}
        self._at = _Numbers(**views)
        self._tables: list[tuple[int, ...]] = [()] * len(self._at.lengths)
        self._order = np.arange(max(len(self._at.token_ids), len(self._at.query_starts)))

    def wait(self) -> None:
        """Until the device has read what was sent."""
        if self._read is not None:
            self._read.synchronize()

    def sent(self) -> None:
        """The device will read it."""
        if self._read is not None:
            self._read.record()

    def write(self, rows: Rows, block_size: int, fill: int) -> None:
        """A step's numbers; with `fill`, those of the rows behind it, too."""
        at, count, tokens = self._at, len(rows.starts), len(rows.token_ids)
        for i, table in enumerate(rows.block_tables):
            if table != self._tables[i]:
                self._write_table(i, table)
        starts = np.array(rows.starts, np.int64)
        at.starts[:count] = starts
        at.token_ids[:tokens] = rows.token_ids
        if tokens == count:
            row, positions = self._order[:count], starts
            at.lengths[:count] = starts + 1
            at.query_starts[: count + 1] = self._order[: count + 1]
        else:
            counts = np.array(rows.counts, np.int64)
            ends = np.cumsum(counts)
            row = np.repeat(self._order[:count], counts)
            positions = self._order[:tokens] + np.repeat(starts - ends + counts, counts)
            at.lengths[:count] = starts + counts
            at.query_starts[1 : count + 1] = ends
        at.positions[:tokens] = positions
        at.slots[:tokens] = (
            at.block_tables[row, positions // block_size] * np.int64(block_size) + positions % block_size
        )
        if fill > count:
            self._fill(count, fill)

    def _write_table(self, row: int, table: Sequence[int]) -> None:
        """What differs: most tables are as they were, or longer by a page."""
        before, table = self._tables[row], tuple(table)
        kept = len(before) if table[: len(before)] == before else 0
        self._at.block_tables[row, kept : len(table)] = table[kept:]
        self._tables[row] = table

    def _fill(self, count: int, fill: int) -> None:
        """Rows behind a step of rows of one token each."""
        at = self._at
        for numbers in (at.starts, at.lengths, at.token_ids, at.positions):
            numbers[count:fill] = 0
        at.slots[count:fill] = _NOWHERE
        at.query_starts[count + 1 : fill + 1] = count
        for row in range(count, fill):
            if self._tables[row]:
                at.block_tables[row] = 0
                self._tables[row] = ()


def one_step(rows: Rows, block_size: int, device: torch.device) -> StepBatch:
    """A step in memory of its own."""
    counts = np.asarray(rows.counts, np.int64)
    lengths = np.asarray(rows.starts, np.int64) + counts
    most, context = int(counts.max(initial=1)), int(lengths.max(initial=1))
    pages = max(1, -(-context // block_size))
    buffers = StepBuffers(StepShape(int(counts.sum()), len(counts), pages), device, hosts=1)
    cut = [table[:pages] for table in rows.block_tables]
    buffers.send(rows._replace(block_tables=cut), block_size)
    return StepBatch(buffers.tensors, most == 1, most, context)


def idle_step(tokens: int, device: torch.device, context: int) -> StepBatch:
    """A step of tokens of no row, which are written nowhere and read nothing: for starting every kernel once."""
    buffers = StepBuffers(StepShape(tokens, 1, 1), device, hosts=1)
    buffers.tensors.slots.fill_(_NOWHERE)
    return StepBatch(buffers.tensors, is_decode=False, most_tokens=tokens, context=context)


def step_bytes(shape: StepShape) -> int:
    """Of a step's tensors."""
    return _lay_out(shape)["block_tables"].end


def _lay_out(shape: StepShape) -> dict[str, _Field]:
    """Where each field lies; the tables last."""
    tokens, rows, pages = shape
    fields: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "slots": (torch.int64, (tokens,)),
        "token_ids": (torch.int32, (tokens,)),
        "positions": (torch.int32, (tokens,)),
        "starts": (torch.int32, (rows,)),
        "lengths": (torch.int32, (rows,)),
        "query_starts": (torch.int32, (rows + 1,)),
        "block_tables": (torch.int32, (rows, pages)),
    }
    found: dict[str, _Field] = {}
    at = 0
    for name, (dtype, size) in fields.items():
        begin = -(-at // _ALIGNED) * _ALIGNED
        at = begin + dtype.itemsize * int(np.prod(size))
        found[name] = _Field(dtype, size, begin, at)
    return found


def _numbers(memory: NDArray[np.uint8], field: _Field) -> NDArray[Any]:
    kind = np.int64 if field.dtype == torch.int64 else np.int32
    return memory[field.begin : field.end].view(kind).reshape(field.shape)
