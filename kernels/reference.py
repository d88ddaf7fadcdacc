"""The reference backend: every op as its textbook equation in plain torch, in any float type up to float64.

It is the oracle the other backends are tested against, and always deterministic: each token attends alone, and
products are computed in tiles of 16 rows whatever the step holds.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom
from torch import Tensor

from kernels.logprobs import logprobs
from kernels.ops import Draw, Heads, KvSpec, Logprobs, Rows, Sampling
from kernels.sampling import sample

_TILE = 16


class _Linear(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


class _Batch(NamedTuple):
    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # [T], where each token's keys and values go
    contexts: list[Tensor]  # T tensors [position + 1]: the slots each token attends to


class ReferenceBackend:
    """Plain torch on the CPU.

    Args:
        dtype: of weights, activations and KV pages.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def prepare_linear(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> _Linear:
        """See `kernels.ops.Backend`."""
        bias = torch.cat(list(biases)).to(self.dtype) if biases else None
        return _Linear(torch.cat(list(weights)).to(self.dtype), bias)

    def prepare_vector(self, weight: Tensor) -> Tensor:
        """See `kernels.ops.Backend`."""
        return weight.to(self.dtype, copy=True)

    def prepare_table(self, weight: Tensor) -> Tensor:
        """See `kernels.ops.Backend`."""
        return weight.to(self.dtype, copy=True)

    def tied_head(self, table: Tensor) -> _Linear:
        """See `kernels.ops.Backend`."""
        return _Linear(table, None)

    def prepare_rope(self, inv_freq: Sequence[float], max_positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [max_positions, head_dim / 2] of float32 angles, computed in float64."""
        angles = torch.outer(
            torch.arange(max_positions).float(), torch.tensor(inv_freq, dtype=torch.float32)
        ).double()
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def allocate_kv(self, spec: KvSpec) -> Tensor:
        """One tensor [layers, 2, pages, page size, KV heads, head_dim]."""
        shape = (spec.num_layers, 2, spec.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        return torch.zeros(shape, dtype=self.dtype)

    def scrub(self, kv: Tensor, blocks: Sequence[int]) -> None:
        """See `kernels.ops.Backend`."""
        kv[:, :, list(blocks)] = 0

    def begin(self, rows: Rows, kv: Tensor) -> _Batch:
        """See `kernels.ops.Backend`."""
        size = kv.shape[3]
        positions: list[int] = []
        contexts: list[Tensor] = []
        for start, count, table in zip(rows.starts, rows.counts, rows.block_tables, strict=True):
            slots = torch.tensor([table[p // size] * size + p % size for p in range(start + count)])
            positions.extend(range(start, start + count))
            contexts.extend(slots[: p + 1] for p in range(start, start + count))
        written = torch.stack([context[-1] for context in contexts])
        self.scrub(kv, [int(slot) // size for slot in written if slot % size == 0])
        return _Batch(
            token_ids=torch.tensor(rows.token_ids),
            positions=torch.tensor(positions),
            slots=written,
            contexts=contexts,
        )

    def embed(self, batch: _Batch, table: Tensor) -> Tensor:
        """See `kernels.ops.Backend`."""
        return table[batch.token_ids]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `kernels.ops.Backend`."""
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `kernels.ops.Backend`."""
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def linear(self, x: Tensor, weight: _Linear) -> Tensor:
        """See `kernels.ops.Backend`."""
        rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -rows % _TILE))
        return torch.cat([F.linear(tile, *weight) for tile in torch.split(padded, _TILE)])[:rows]

    def rope_and_write_kv(
        self, qkv: Tensor, heads: Heads, rope: tuple[Tensor, Tensor], kv: Tensor, layer: int, batch: _Batch
    ) -> Tensor:
        """See `kernels.ops.Backend`."""
        q, k, v = torch.split(qkv.view(len(qkv), -1, heads.dim), [heads.query, heads.kv, heads.kv], dim=1)
        cos, sin = (table[batch.positions, None] for table in rope)
        pages = kv[layer].flatten(1, 2)
        pages[0, batch.slots] = _rotate(k, cos, sin)
        pages[1, batch.slots] = v
        return _rotate(q, cos, sin).flatten(1)

    def paged_attention(self, q: Tensor, heads: Heads, kv: Tensor, layer: int, batch: _Batch) -> Tensor:
        """See `kernels.ops.Backend`."""
        pages = kv[layer].flatten(1, 2)
        queries = q.view(-1, heads.kv, heads.query // heads.kv, heads.dim)
        out = torch.empty_like(queries)
        for i, context in enumerate(batch.contexts):
            keys, values = pages[:, context].transpose(1, 2)  # each [KV heads, context, dim]
            scores = queries[i] @ keys.transpose(1, 2) / math.sqrt(heads.dim)
            out[i] = torch.softmax(scores, dim=-1) @ values
        return out.view_as(q)

    def gated_silu(self, gate_up: Tensor) -> Tensor:
        """See `kernels.ops.Backend`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return gate / (1 + torch.exp(-gate)) * up

    def logits(self, x: Tensor, head: _Linear, tokens: Sequence[int]) -> Tensor:
        """See `kernels.ops.Backend`."""
        logits = self.linear(x[list(tokens)], head)
        return logits if logits.dtype == torch.float64 else logits.float()

    def sample(self, logits: Tensor, sampling: Sampling) -> Draw:
        """See `kernels.ops.Backend`."""
        return sample(logits, sampling)

    def logprobs(self, logits: Tensor, tokens: Sequence[int], top: int) -> Logprobs:
        """See `kernels.ops.Backend`."""
        return logprobs(logits, tokens, top)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + dim/2]) by its angle (Su et al., RoFormer, 2021; Llama's order of pairs)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
