"""The likeliest tokens of rows of logits in one exact order: by logit, and of equal ones the lower id first.

Rows are looked through in blocks of columns: torch takes the largest of many short blocks many times faster than
the place of the largest number of a long row, and whatever is sought lies in a few of them.
"""

import numpy as np
import torch
from torch import Tensor

_NARROW_BLOCK, _WIDE_BLOCK = 32, 256
_SMALL = 2**18  # logits that numpy looks through while torch would only begin; it has one thread


class Highest:
    """The largest logit of each row, where it is, and whether all of its row are finite.

    Args:
        logits: [R, vocabulary].

    Attributes:
        token: int64 [R], the first of the largest.
        finite: bool [R].
    """

    def __init__(self, logits: Tensor) -> None:
        if logits.numel() <= _SMALL:
            numbers = logits.numpy()
            self.finite = torch.from_numpy(np.isfinite(numbers.min(-1)) & np.isfinite(numbers.max(-1)))
            self.token = torch.from_numpy(numbers.argmax(-1))
            return
        blocks = _in_blocks(logits, _WIDE_BLOCK)
        highest = [part.amax(-1) for part in blocks]
        lowest = torch.cat([part.amin(-1) for part in blocks], -1).amin(-1)
        maxima = torch.cat(highest, -1)
        self.finite = torch.isfinite(lowest) & torch.isfinite(maxima.amax(-1))
        first = maxima.argmax(-1) * _WIDE_BLOCK
        columns = (first[:, None] + torch.arange(_WIDE_BLOCK)).clamp_(max=logits.shape[-1] - 1)
        self.token = columns.gather(-1, logits.gather(-1, columns).argmax(-1, keepdim=True))[:, 0]


def _in_blocks(logits: Tensor, width: int) -> list[Tensor]:
    """All columns of rows [R, n] as [R, n // width, width], and those that are left as [R, 1, n % width]."""
    whole = logits.shape[-1] // width * width
    parts = [logits[:, :whole].view(len(logits), whole // width, width)] if whole else []
    return parts + ([logits[:, None, whole:]] if whole < logits.shape[-1] else [])


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
    values, ids = _highest(logits, count + 1)
    tied = values[:, -1] == values[:, -2] if count else torch.zeros(len(logits), dtype=torch.bool)
    ids = ids[:, :count]
    if tied.any():
        ids[tied] = _lowest_ids(logits[tied], values[tied, -1:], count)
    ids = ids.sort(dim=-1).values
    values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _highest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest numbers of each row, falling, and columns that have them; of equal ones any.

    Each of the `count` blocks with the largest maxima has one of them or more, and no other block has a larger.
    """
    width = logits.shape[-1]
    if width < 2 * count * _NARROW_BLOCK:
        values, ids = logits.topk(count, dim=-1)
        return values, ids
    maxima = torch.cat([part.amax(-1) for part in _in_blocks(logits, _NARROW_BLOCK)], -1)
    first = maxima.topk(count, dim=-1).indices * _NARROW_BLOCK
    columns = (first[..., None] + torch.arange(_NARROW_BLOCK)).flatten(1)
    some = logits.gather(-1, columns.clamp(max=width - 1)).masked_fill_(columns >= width, float("-inf"))
    values, places = some.topk(count, dim=-1)
    return values, columns.gather(-1, places)


def _lowest_ids(logits: Tensor, least: Tensor, count: int) -> Tensor:
    """Ids [R, count] of all tokens above `least` [R, 1], and of those equal to it as many of the first as fit."""
    above, equal = logits > least, logits == least
    fitting = count - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= fitting))
    return chosen.nonzero()[:, 1].view(len(logits), count)
