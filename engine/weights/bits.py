"""Small numbers out of the words and bytes they are packed in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes of 4 or 8 bits, uint8 [..., n], from integers [..., m] of any size: the least significant first."""
    import torch  # not at the top: the formats are read by processes that must not load torch

    found = words.contiguous().view(torch.uint8)
    return found if bits == 8 else torch.stack((found & 15, found >> 4), -1).flatten(-2)
