"""One token from each row of logits, in torch: adjusted, scaled, cut down and drawn, each row as if it were alone.

The order: bans, bias, repetition penalty, frequency and presence penalties, temperature, min-p, top-k, top-p, each
of these over what the ones before it left. It is that of vLLM (docs.vllm.ai, vllm.v1.sample.sampler, 0.22).
transformers cuts by min-p last, which leaves the same tokens unless top-p is used too. A greedy row takes the
likeliest token after the adjustments.

A draw uses one number u in [0, 1): the token at which the cumulative weight first exceeds u times its total.
Which way a row takes depends on its own parameters and logits only, and every sum runs along the row in order, so
its token never depends on the rows beside it.

Source: inverse transform sampling (Devroye 1986, chapter III.2); Holtzman et al., "The Curious Case of Neural Text
Degeneration", ICLR 2020 (top-p); Nguyen et al., "Turning Up the Heat", 2024 (min-p); Keskar et al., "CTRL", 2019
(repetition penalty).
"""

import torch
from torch import Tensor

from kernels.ops import Adjustments, Draw, Sampling
from kernels.ordering import Highest, likeliest, sort_all

_NARROW = (256, 4096)  # of a longer row only so many tokens are put in order, if what can be drawn is among them
_AT_ONCE = 2**18  # logits weighed at once: in float64 they fit a cache, and memory stays bounded
_HIGHEST = 1e300  # no adjustment takes a logit beyond it, so that differences stay finite


def sample(logits: Tensor, sampling: Sampling) -> Draw:
    """One token for each row of `logits` [R, vocabulary]."""
    found = Highest(logits)
    finite, tokens = found.finite, found.token
    if sampling.adjustments is None:
        _choose(tokens, logits, sampling, finite)
        return Draw(tokens.tolist(), finite.tolist())
    changed = _changed(sampling.adjustments, len(logits))
    _choose(tokens, logits, sampling, finite & ~changed)
    adjusted = _adjusted(logits, sampling.adjustments, changed)
    possible = finite[changed] & (adjusted.amax(-1) > float("-inf"))
    chosen = Highest(adjusted).token
    _choose(chosen, adjusted, _only(sampling, changed), possible)
    tokens[changed] = torch.where(possible, chosen, tokens[changed])
    return Draw(tokens.tolist(), finite.tolist())


def _only(sampling: Sampling, rows: Tensor) -> Sampling:
    """The parameters of `rows`, a mask or indexes, without their adjustments."""
    temperature, top_k, top_p, uniform, min_p, _ = sampling
    return Sampling(temperature[rows], top_k[rows], top_p[rows], uniform[rows], min_p[rows])


def _changed(adjustments: Adjustments, count: int) -> Tensor:
    changed = torch.zeros(count, dtype=torch.bool)
    for rows in (adjustments.banned[0], adjustments.bias[0], adjustments.penalties[0]):
        changed[rows] = True
    return changed


def _adjusted(logits: Tensor, adjustments: Adjustments, changed: Tensor) -> Tensor:
    """The `changed` rows in float64, adjusted."""
    wide = logits[changed].double()
    place = changed.cumsum(0) - 1
    rows, tokens, added = adjustments.bias
    wide[place[rows], tokens] += added
    rows, tokens, repetition, taken = adjustments.penalties
    old = wide[place[rows], tokens]
    wide[place[rows], tokens] = torch.where(old > 0, old / repetition, old * repetition) - taken
    wide.clamp_(max=_HIGHEST)
    rows, tokens = adjustments.banned
    wide[place[rows], tokens] = float("-inf")
    return wide


def _choose(tokens: Tensor, logits: Tensor, sampling: Sampling, possible: Tensor) -> None:
    """Put a drawn token in the place of the likeliest where the row asks for it and it is `possible`."""
    drawn = possible & (sampling.temperature > 0)
    if not drawn.any():
        return
    ordered = (sampling.top_k > 0) | (sampling.top_p < 1)
    floor = ~ordered & (sampling.min_p > 0)
    for choose, rows in (
        (_draw, drawn & ~ordered & ~floor),
        (_draw_above_floor, drawn & floor),
        (_draw_in_order, drawn & ordered),
    ):
        for some in torch.split(rows.nonzero()[:, 0], max(1, _AT_ONCE // logits.shape[-1])):
            if len(some):
                tokens[some] = choose(logits[some], _only(sampling, some))


def _draw(logits: Tensor, sampling: Sampling) -> Tensor:
    """Draw from all tokens; the maximum is taken off first, so that no temperature overflows."""
    scaled = (logits - _maximum(logits).double()).div_(sampling.temperature[:, None])
    return _pick(torch.softmax(scaled, dim=-1, out=scaled).cumsum_(-1), sampling.uniform)


def _draw_above_floor(logits: Tensor, sampling: Sampling) -> Tensor:
    """Draw from the tokens that have at least min_p of the likeliest one's probability."""
    return _pick(_weights(logits, _maximum(logits), sampling).cumsum_(-1), sampling.uniform)


def _maximum(logits: Tensor) -> Tensor:
    return logits.amax(-1, keepdim=True)


def _draw_in_order(logits: Tensor, sampling: Sampling) -> Tensor:
    """Draw from the k likeliest tokens above the floor: of these, from the fewest that reach top_p of their sum.

    A few of the likeliest are enough where top_k is small, or else where they reach top_p; if not, some more, and
    in the end all are sorted.
    """
    tokens = torch.empty_like(sampling.top_k)
    left, mass = torch.ones(len(logits), dtype=torch.bool), _mass(logits, sampling)
    for narrow in _NARROW:
        few = left & (sampling.top_k <= narrow)
        if logits.shape[-1] > narrow and few.any():
            part = _only(sampling, few)
            count = narrow if bool((part.top_k == 0).any()) else int(part.top_k.max())
            tokens[few], reached = _draw_among(*likeliest(logits[few], count), part, mass[few])
            left[few] = ~reached & (part.top_k == 0)
    if left.any():
        tokens[left], _ = _draw_among(*sort_all(logits[left]), _only(sampling, left))
    return tokens


def _mass(logits: Tensor, sampling: Sampling) -> Tensor:
    """The weight [R] of all tokens above the floor, where top_k is 0."""
    mass = torch.zeros_like(sampling.top_p)
    endless = sampling.top_k == 0
    if endless.any():
        rows = logits[endless]
        weights = _weights(rows, _maximum(rows), _only(sampling, endless))
        mass[endless] = weights.cumsum_(-1)[:, -1]
    return mass


def _draw_among(
    values: Tensor, ids: Tensor, sampling: Sampling, mass: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw from the likeliest tokens of each row, given in order.

    Args:
        values: their logits [R, n], falling.
        ids: their ids [R, n].
        sampling: of the rows.
        mass: [R], weight of all tokens above the floor, where top_k is 0; None when all are among `values`.

    Returns:
        The tokens [R], and whether top_p was reached among them.
    """
    weights = _weights(values, values[:, :1], sampling)
    rank = torch.arange(values.shape[-1])
    weights[(rank >= sampling.top_k[:, None]) & (sampling.top_k > 0)[:, None]] = 0
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    if mass is not None:
        total = torch.where(sampling.top_k > 0, total, mass)
    enough = (sampling.top_p * total)[:, None]
    weights[(cumulative - weights >= enough) & (rank > 0)] = 0
    chosen = _pick(weights.cumsum(-1), sampling.uniform)
    return ids.gather(-1, chosen[:, None])[:, 0], cumulative[:, -1] >= enough[:, 0]


def _weights(logits: Tensor, highest: Tensor, sampling: Sampling) -> Tensor:
    """exp((logit - highest) / temperature) in float64; 0 below min_p, the likeliest token having 1."""
    weights = (logits - highest.double()).div_(sampling.temperature[:, None]).exp_()
    if not bool((sampling.min_p > 0).any()):
        return weights
    return weights.masked_fill_(weights < sampling.min_p[:, None], 0)


def _pick(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Index of the first entry above the share `uniform` of all; rounding at the top gives the last that added."""
    target = uniform * cumulative[:, -1]
    found = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())[:, 0]
    return torch.minimum(found, last)
