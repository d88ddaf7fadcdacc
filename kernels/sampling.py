"""One token from each row of logits, in torch: greedy, temperature, top-k, top-p, each row as if it were alone.

A draw uses one number u in [0, 1): the token at which the cumulative probability first exceeds u times its total.
Which way a row takes depends on its own parameters only, so its token never depends on the rows beside it.

Source: inverse transform sampling (Devroye 1986, chapter III.2); Holtzman et al., "The Curious Case of Neural Text
Degeneration", ICLR 2020 (top-p).
"""

import torch
from torch import Tensor

from kernels.ops import Draw, Sampling


def sample(logits: Tensor, sampling: Sampling) -> Draw:
    """One token for each row of `logits` [R, vocabulary]."""
    finite = torch.isfinite(logits).all(dim=-1)
    tokens = logits.argmax(dim=-1)
    drawn = finite & (sampling.temperature > 0)
    filtered = (sampling.top_k > 0) | (sampling.top_p < 1)
    for choose, rows in ((_draw, drawn & ~filtered), (_draw_filtered, drawn & filtered)):
        if rows.any():
            tokens[rows] = choose(logits[rows].double(), Sampling(*(field[rows] for field in sampling)))
    return Draw(tokens.tolist(), finite.tolist())


def _probabilities(logits: Tensor, temperature: Tensor) -> Tensor:
    """softmax(logits / temperature); the maximum is taken off first, so that no temperature overflows."""
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature[:, None], dim=-1)


def _draw(logits: Tensor, sampling: Sampling) -> Tensor:
    cumulative = _probabilities(logits, sampling.temperature).cumsum(-1)
    return _first_above(cumulative, sampling.uniform * cumulative[:, -1])


def _draw_filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Draw from the k likeliest tokens, and of these from the fewest that reach top_p of their sum."""
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = _probabilities(logits, sampling.temperature)
    rank = torch.arange(logits.shape[-1])
    probabilities[(rank >= sampling.top_k[:, None]) & (sampling.top_k > 0)[:, None]] = 0
    cumulative = probabilities.cumsum(-1)
    enough = sampling.top_p[:, None] * cumulative[:, -1:]
    probabilities[(cumulative - probabilities >= enough) & (rank > 0)] = 0
    cumulative = probabilities.cumsum(-1)
    chosen = _first_above(cumulative, sampling.uniform * cumulative[:, -1])
    return order.gather(-1, chosen[:, None])[:, 0]


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index of the first entry above `target`; rounding at the very top falls back to the last that added."""
    found = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())[:, 0]
    return torch.minimum(found, last)
