"""Encoder ops in plain torch, for both backends on the CPU.

Each row attends alone, so that what it comes to depends on its own length and numbers; every other op treats each
token by itself. In deterministic mode steps are padded to whole tiles for the products of matrices, and functions
are computed from those whose bits do not depend on where a number lies in memory.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom
from torch import Tensor

from kernels.encoder_ops import Looking, Passages, Span
from kernels.ops import Table

_TILE = 16  # rows of a tile of the backends' products
_QUERIES = (
    128  # that attend at once where scores are laid out: they never take more than that many rows of a prompt
)
_LEAST_NORM = 1e-12  # a vector of zeros stays one


class _Passages(NamedTuple):
    token_ids: Tensor  # [T], padded
    type_ids: Tensor  # [T], padded
    positions: Tensor  # [T], padded
    spans: tuple[Span, ...]


class EncoderOps:
    """The ops of `kernels.encoder_ops.EncoderBackend` that a backend in plain torch inherits.

    Attributes:
        dtype: of weights and activations.
        deterministic: same bits for a row whatever shares the step; so it is where a backend says nothing.
    """

    dtype: torch.dtype
    deterministic: bool = True

    def prepare_turns(self, inv_freq: Sequence[float], max_positions: int) -> Tensor:
        """Cosines and sines [max_positions, 2, 1, dim / 2] of float32 angles, computed in float64."""
        angles = torch.outer(torch.arange(max_positions).float(), torch.tensor(inv_freq, dtype=torch.float32))
        wide = angles.double()
        return torch.stack([wide.cos(), wide.sin()], dim=1).to(_wide(self.dtype)).unsqueeze(2)

    def begin_passages(self, passages: Passages) -> _Passages:
        """See `kernels.encoder_ops.EncoderBackend`."""
        padding = [0] * (-len(passages.token_ids) % _TILE) if self.deterministic else []
        firsts = accumulate(passages.counts, initial=0)
        return _Passages(
            token_ids=torch.tensor([*passages.token_ids, *padding]),
            type_ids=torch.tensor([*passages.type_ids, *padding]),
            positions=torch.tensor([*passages.positions, *padding]),
            spans=tuple(Span(first, count) for first, count in zip(firsts, passages.counts, strict=False)),
        )

    def embed_passages(self, batch: _Passages, words: Table, places: Table | None, types: Table | None) -> Tensor:
        """See `kernels.encoder_ops.EncoderBackend`."""
        x: Tensor = words.index_select(0, batch.token_ids)
        if types is not None:
            x = x + types.index_select(0, batch.type_ids)
        return x if places is None else x + places.index_select(0, batch.positions)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """See `kernels.encoder_ops.EncoderBackend`."""
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def pointwise(self, x: Tensor, function: str) -> Tensor:
        """See `kernels.encoder_ops.EncoderBackend`."""
        if not self.deterministic:
            return _FAST[function](x)
        return _EXACT[function](x.to(_wide(self.dtype))).to(self.dtype)

    def attend(self, qkv: Tensor, looking: Looking, rope: Tensor | None, batch: _Passages) -> Tensor:
        """See `kernels.encoder_ops.EncoderBackend`."""
        heads = looking.heads
        out = qkv.new_zeros(len(qkv), heads.query * heads.dim)
        for first, count in batch.spans:
            row = slice(first, first + count)
            q, k, v = qkv[row].view(count, 3, heads.query, heads.dim).unbind(1)
            if rope is not None:
                cos, sin = rope.index_select(0, batch.positions[row]).unbind(1)
                q, k = _turn(q, cos, sin), _turn(k, cos, sin)
            q, k, v = (part.transpose(0, 1).contiguous() for part in (q, k, v))
            answers = self._attend_row(q, k, v, looking)
            out[row] = answers.transpose(0, 1).reshape(count, -1)
        return out

    def pool(self, x: Tensor, spans: Sequence[Span], pooling: str) -> Tensor:
        """See `kernels.encoder_ops.EncoderBackend`; padded to whole tiles in deterministic mode."""
        pooled = torch.stack([_pool(x[first : first + length], pooling) for first, length in spans])
        return F.pad(pooled, (0, 0, 0, -len(pooled) % _TILE)) if self.deterministic else pooled

    def vectors(self, x: Tensor, count: int, normalise: bool) -> Tensor:
        """See `kernels.encoder_ops.EncoderBackend`."""
        wide = x[:count].to(_wide(self.dtype))
        if not normalise:
            return wide
        norms = torch.stack([row.double().pow(2).sum().sqrt() for row in wide])  # by row: by columns sums differ
        return (wide.double() / norms.clamp_min(_LEAST_NORM)[:, None]).to(wide.dtype)

    def _attend_row(self, q: Tensor, k: Tensor, v: Tensor, looking: Looking) -> Tensor:
        """Attention of one row; q, k, v and the result are [heads, tokens, dim]."""
        count, reach = q.shape[1], looking.reach
        if reach >= count - 1:
            reach = 0
        if not reach and not self.deterministic:
            return F.scaled_dot_product_attention(q[None], k[None], v[None], scale=looking.scale)[0]
        q, k, v = (part.to(_wide(self.dtype)) for part in (q, k, v))
        parts = []
        for first in range(0, count, _QUERIES):
            last = min(count, first + _QUERIES)
            low, high = (max(0, first - reach), min(count, last + reach)) if reach else (0, count)
            scores = q[:, first:last] @ k[:, low:high].transpose(1, 2) * looking.scale
            if reach:
                queries, keys = (torch.arange(*span, device=q.device) for span in ((first, last), (low, high)))
                distances = queries[:, None] - keys
                scores.masked_fill_(distances.abs() > reach, -math.inf)
            parts.append(torch.softmax(scores, dim=-1) @ v[:, low:high])
        return torch.cat(parts, dim=1).to(self.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and functions are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + dim/2]) by its angle (Su et al., RoFormer, 2021)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _pool(row: Tensor, pooling: str) -> Tensor:
    """One of POOLINGS, of [tokens, hidden]."""
    if pooling == "cls":
        return row[0]
    if pooling == "last":
        return row[-1]
    if pooling == "max":
        return row.amax(0)
    return (row.to(_wide(row.dtype)).sum(0) / len(row)).to(row.dtype)


_FAST: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}

# torch's own gelu, silu and sigmoid give other bits to the numbers left over where a thread's share ends; erf,
# tanh and exp do not.
_EXACT: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x)))),
    "relu": torch.relu,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
}
