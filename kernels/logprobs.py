"""What a model thinks of given tokens: log probabilities of its own distribution, ranks, and the likeliest tokens.

Each row's numbers are those it has alone: log_softmax, counts and order run along the row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import Logprobs
from kernels.ordering import Highest, likeliest

_AT_ONCE = 2**21  # logits taken to float64 at once: 16 MiB


def logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> Logprobs:
    """See `kernels.ops.Backend.logprobs`."""
    wanted = torch.tensor(tokens, dtype=torch.int64)
    slices = max(1, _AT_ONCE // logits.shape[-1])
    pairs = zip(torch.split(logits, slices), torch.split(wanted, slices), strict=True)
    parts = [_slice(*pair, top) for pair in pairs]
    return Logprobs(*([entry for part in field for entry in part] for field in zip(*parts, strict=True)))


def _slice(logits: Tensor, tokens: Tensor, top: int) -> Logprobs:
    finite = Highest(logits).finite
    if not bool(finite.all()):
        logits = logits.masked_fill(~finite[:, None], 0)  # what is said of these rows means nothing
    logs = torch.log_softmax(logits.double(), dim=-1)
    own = logits.gather(-1, tokens[:, None])
    earlier = torch.arange(logits.shape[-1]) < tokens[:, None]
    rank = 1 + (logits > own).sum(-1) + ((logits == own) & earlier).sum(-1)
    _, ids = likeliest(logits, top)
    return Logprobs(
        logprob=logs.gather(-1, tokens[:, None])[:, 0].tolist(),
        rank=rank.tolist(),
        top_ids=ids.tolist(),
        top_logprobs=logs.gather(-1, ids).tolist(),
        finite=finite.tolist(),
    )
