"""Adapters in Triton: rows without one keep their bits, and a row's bits do not depend on who shares the step."""

import pytest
import torch
from torch import Tensor

from kernels.triton import lora
from kernels.triton.case import Draw
from tests.kernels.proofs import DEVICE

DRAW = Draw(DEVICE)
INNER, WIDTHS = 1056, (48, 16)


def adapters(ranks: tuple[int, ...]) -> lora.Adapters:
    def pair(at: int, rank: int, width: int) -> tuple[Tensor, Tensor]:
        draw = Draw(DEVICE, 10 * at + width)
        return draw.normal(rank, INNER, scale=0.03), draw.normal(width, rank)

    pairs = [[pair(at, rank, width) for width in WIDTHS] for at, rank in enumerate(ranks)]
    return lora.prepare(pairs, [2.0] * len(ranks), torch.bfloat16, DEVICE)


def added(x: Tensor, ids: Tensor, of: lora.Adapters, y: Tensor) -> Tensor:
    out = y.clone()
    rows = lora.allocate(len(x), len(of.ranks), x.device, deterministic=True)
    lora.by_adapter(ids, rows)
    lora.add_adapters(x, of, rows, lora.parts(len(x), of), out)
    return out


def test_rows_are_alike_alone_and_beside_others_and_stay_where_nobody_is_asked() -> None:
    of = adapters((16, 3))
    x, y = DRAW.normal(4, INNER), DRAW.normal(4, sum(WIDTHS))
    ids = DRAW.given(torch.tensor([1, -1, 0, 1], dtype=torch.int32))
    together = added(x, ids, of, y)
    assert torch.equal(together[1], y[1])
    assert not torch.equal(together[0], y[0])
    for row in (0, 2):
        one = slice(row, row + 1)
        assert torch.equal(added(x[one].contiguous(), ids[one], of, y[one]), together[one])


def test_slices_of_a_wider_tensor_are_changed_and_nothing_beside_them() -> None:
    of = adapters((8,))
    x, wide = DRAW.normal(2, INNER), DRAW.normal(2, sum(WIDTHS) + 16)
    ids, before = torch.zeros(2, dtype=torch.int32, device=DEVICE), wide.clone()
    rows = lora.allocate(2, 1, x.device, deterministic=True)
    lora.by_adapter(ids, rows)
    lora.add_adapters(x, of, rows, lora.parts(2, of), wide[:, 16:])
    assert torch.equal(wide[:, :16], before[:, :16])
    assert torch.equal(wide[:, 16:], added(x, ids, of, before[:, 16:].contiguous()))


def test_a_rank_that_is_too_high_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 257"):
        lora.prepare([[(torch.zeros(257, 8), torch.zeros(4, 257))]], [1.0], torch.bfloat16, "cpu")
