"""Embeddings and heads rounded to few bits, some rows at a time: the largest matrices of a small model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from engine.prepare.error_feedback import Grid, Rounded, round_plainly
from kernels.packed import Packed

if TYPE_CHECKING:
    from torch import Tensor

GRIDS: Mapping[int, Grid] = {8: Grid(8, 0, symmetric=True), 4: Grid(4, 32, symmetric=False)}
"""What tables are rounded to, by bits: a scale for each token, or scale and zero for each 32 of its numbers."""

_AT_ONCE = 1 << 22  # numbers that are in float32 at once

Stored = Callable[[Rounded], Mapping[str, bytes]]


class RoundedTable(NamedTuple):
    """A rounded table.

    Attributes:
        packed: as the backends take it.
        content: the tensors of our own format, piece by piece.
        error: of its numbers, relative, in the root mean square.
    """

    packed: Packed
    content: Mapping[str, list[bytes]]
    error: float


def round_table(weight: Tensor, bits: int, stored: Stored) -> RoundedTable:
    """Each row by itself, to the nearest.

    Args:
        weight: [vocabulary, hidden], of any number type.
        bits: 8 or 4.
        stored: the tensors of our own format of some rows.

    Raises:
        EngineError: WEIGHTS_INVALID, a number is not finite or a scale beyond its number type.
    """
    grid, rows = GRIDS[bits], max(1, _AT_ONCE // weight.shape[1])
    codes = torch.empty(weight.shape, dtype=torch.int8 if grid.symmetric else torch.uint8)
    scales, zeros, content = [], [], dict[str, list[bytes]]()
    lost = whole = 0.0
    for first in range(0, len(weight), rows):
        some = weight[first : first + rows].float()
        found = round_plainly(some, grid)
        codes[first : first + rows] = found.codes
        scales.append(found.scales)
        zeros += [] if found.zeros is None else [found.zeros]
        for key, piece in stored(found).items():
            content.setdefault(key, []).append(piece)
        lost += float((some - found.plain()).double().square().sum())
        whole += float(some.double().square().sum())
    columns = grid.group or weight.shape[1]
    packed = Packed(codes, torch.cat(scales), 1, columns, bits, torch.cat(zeros) if zeros else None)
    return RoundedTable(packed, content, (lost / whole) ** 0.5 if whole else 0.0)
