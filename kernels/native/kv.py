"""KV pages in the layout of the native kernels, and a step's rows as the library reads them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kernels.native.layout import MOST_HEAD_DIM
from kernels.native.library import ClKv, ClStep, Library
from kernels.native.memory import aligned_empty
from kernels.ops import KvSpec, Rows

_INT32 = "i"


class KvPages(NamedTuple):
    """Keys and values of all layers.

    Attributes:
        pages: uint8 [layers, blocks, bytes of a page].
        spec: their size.
        type: ClType of a number.
    """

    pages: Tensor
    spec: KvSpec
    type: int

    def struct(self) -> ClKv:
        """For the library; its address holds as long as the pages do."""
        return _struct(self.spec, self.type, self.pages.data_ptr())

    def scrub(self, blocks: Sequence[int]) -> None:
        """Zero pages in every layer."""
        for block in blocks:
            self.pages[:, block].zero_()


def allocate(library: Library, spec: KvSpec, kv_type: int) -> KvPages:
    """Zeroed pages; memory is taken from the system as they are first written.

    Raises:
        ValueError: heads are too long for the kernels.
    """
    if spec.head_dim > MOST_HEAD_DIM:
        raise ValueError(f"heads of {spec.head_dim} numbers; the native kernels take at most {MOST_HEAD_DIM}")
    layers, blocks = spec.num_layers, spec.num_blocks
    size = library.kv_page_bytes(_struct(spec, kv_type, None))
    return KvPages(aligned_empty(layers * blocks * size).view(layers, blocks, size), spec, kv_type)


def _struct(spec: KvSpec, kv_type: int, pages: int | None) -> ClKv:
    layers, blocks, size, heads, dim = spec
    return ClKv(kv_type, 0, layers, blocks, size, heads, dim, pages)


class StepRows(NamedTuple):
    """One step's rows as ClStep has them, in arrays of int32."""

    token_ids: array[int]
    positions: array[int]
    row_first: array[int]
    row_start: array[int]
    table_first: array[int]
    tables: array[int]

    @property
    def context(self) -> int:
        """Tokens of the longest row, those before the step included."""
        counts = zip(self.row_first, self.row_first[1:], self.row_start, strict=False)
        return max(start + last - first for first, last, start in counts)

    def fill(self, step: ClStep) -> None:
        """Point `step` here; it holds as long as this is kept."""
        step.tokens, step.rows = len(self.token_ids), len(self.row_start)
        step.token_ids = self.token_ids.buffer_info()[0]
        step.positions = self.positions.buffer_info()[0]
        step.row_first = self.row_first.buffer_info()[0]
        step.row_start = self.row_start.buffer_info()[0]
        step.table_first = self.table_first.buffer_info()[0]
        step.tables = self.tables.buffer_info()[0]


def lay_out(rows: Rows) -> StepRows:
    """The arrays of a step."""
    positions, tables = array(_INT32), array(_INT32)
    row_first, table_first = array(_INT32, [0]), array(_INT32, [0])
    for start, count, table in zip(rows.starts, rows.counts, rows.block_tables, strict=True):
        positions.extend(range(start, start + count))
        tables.extend(table)
        row_first.append(len(positions))
        table_first.append(len(tables))
    return StepRows(
        array(_INT32, rows.token_ids), positions, row_first, array(_INT32, rows.starts), table_first, tables
    )


def fresh_blocks(rows: Rows, block_size: int) -> list[int]:
    """The pages whose first position the step writes."""
    found: list[int] = []
    for start, count, table in zip(rows.starts, rows.counts, rows.block_tables, strict=True):
        first, last = -(-start // block_size), (start + count - 1) // block_size
        if first <= last:
            found.extend(table[first : last + 1])
    return found
