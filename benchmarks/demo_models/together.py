"""Several processes training one model: gradients are averaged, and each updates its share of the matrices.

Without a process group everything here is the work of one process alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn


def place() -> tuple[int, int]:
    """This process's rank and how many train together."""
    together = torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)


def average(model: nn.Module, numbers: list[float]) -> list[float]:
    """Replace the gradients by their mean over all processes; returns the mean of each of `numbers`."""
    if place()[1] == 1:
        return numbers
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor(numbers)])
    torch.distributed.all_reduce(flat)
    *means, tail = (flat / place()[1]).split([*(g.numel() for g in gradients), len(numbers)])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
    return [float(number) for number in tail]


def share(matrices: Sequence[Tensor], rank: int | None = None) -> Sequence[Tensor]:
    """The matrices that the process of this rank (default: this one) updates."""
    return matrices[place()[0] if rank is None else rank :: place()[1]]


def exchange(matrices: Sequence[Tensor]) -> None:
    """Give every process each matrix as its owner updated it."""
    world = place()[1]
    for owner in range(world) if world > 1 else ():
        owned = [matrix.detach() for matrix in share(matrices, owner)]
        flat = torch.cat([matrix.flatten() for matrix in owned])
        torch.distributed.broadcast(flat, owner)
        for matrix, new in zip(owned, flat.split([m.numel() for m in owned]), strict=True):
            matrix.copy_(new.view_as(matrix))
