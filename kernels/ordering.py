"""The likeliest tokens of rows of logits in one exact order: by logit, and of equal ones the lower id first."""

import torch
from torch import Tensor


def sort_all(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Values and ids of all tokens of each row in order, [R, vocabulary] both."""
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values, ids


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and ids [R, count] of the first `count` tokens of each row, as `sort_all` has them.

    torch.topk takes any of several equal values; rows in which that matters are chosen from anew.
    """
    width = logits.shape[-1]
    if count >= width:
        return sort_all(logits)
    values, ids = logits.topk(count + 1, dim=-1)
    tied = values[:, -1] == values[:, -2] if count else torch.zeros(len(logits), dtype=torch.bool)
    ids = ids[:, :count]
    if tied.any():
        ids[tied] = _lowest_ids(logits[tied], values[tied, -1:], count)
    ids = ids.sort(dim=-1).values
    values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _lowest_ids(logits: Tensor, least: Tensor, count: int) -> Tensor:
    """Ids [R, count] of all tokens above `least` [R, 1], and of those equal to it as many of the first as fit."""
    above, equal = logits > least, logits == least
    fitting = count - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= fitting))
    return chosen.nonzero()[:, 1].view(len(logits), count)
