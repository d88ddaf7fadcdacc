"""The reference backend: every op as its textbook equation in plain torch, in any float type up to float64.

It is the oracle the other backends are tested against, and always deterministic: each token attends alone and
asks its experts alone, and products are computed in tiles of 16 rows whatever the step holds. A quantised matrix
becomes the plain one it stands for when it is prepared.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom
from torch import Tensor

from kernels.encoding import EncoderOps
from kernels.logprobs import logprobs
from kernels.ops import Attending, Draw, Heads, KvSpec, Logprobs, Matrix, QkNorm, Routing, Rows, Sampling
from kernels.packed import Packed, dequantise
from kernels.sampling import sample

_TILE = 16


class _Linear(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


class _Experts(NamedTuple):
    gate_up: list[_Linear]  # one for each expert
    down: list[_Linear]


class _Batch(NamedTuple):
    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # [T], where each token's keys and values go
    contexts: list[Tensor]  # T tensors [position + 1]: the slots of each token's row up to itself


class ReferenceBackend(EncoderOps):
    """Plain torch on the CPU.

    Args:
        dtype: of weights, activations and KV pages.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    @property
    def layout_id(self) -> str:
        """See `kernels.ops.Backend`."""
        return f"reference 1 {self.dtype}"

    def prepare_linear(self, weights: Sequence[Matrix], biases: Sequence[Tensor] = ()) -> _Linear:
        """See `kernels.ops.Backend`."""
        plain = [dequantise(matrix) if isinstance(matrix, Packed) else matrix for matrix in weights]
        return _Linear(torch.cat(plain).to(self.dtype), torch.cat(list(biases)).to(self.dtype) if biases else None)

    def prepare_experts(
        self,
        gate_up: Sequence[Sequence[Matrix]],
        down: Sequence[Matrix],
        gate_up_biases: Sequence[Sequence[Tensor]] = (),
        down_biases: Sequence[Tensor] = (),
    ) -> _Experts:
        """See `kernels.ops.Backend`."""
        both = [
            self.prepare_linear(*parts) for parts in zip(gate_up, gate_up_biases or [()] * len(down), strict=True)
        ]
        biases = [[bias] for bias in down_biases] or [[] for _ in down]
        return _Experts(both, [self.prepare_linear([last], bias) for last, bias in zip(down, biases, strict=True)])

    def prepare_vector(self, weight: Tensor, offset: float = 0.0) -> Tensor:
        """See `kernels.ops.Backend`; with an offset it stays in float32, or wider."""
        if offset:
            return weight.to(torch.promote_types(self.dtype, torch.float32)) + offset
        return weight.to(self.dtype, copy=True)

    def prepare_table(self, weight: Matrix) -> Tensor:
        """See `kernels.ops.Backend`."""
        return (
            dequantise(weight).to(self.dtype) if isinstance(weight, Packed) else weight.to(self.dtype, copy=True)
        )

    def tied_head(self, table: Tensor) -> _Linear:
        """See `kernels.ops.Backend`."""
        return _Linear(table, None)

    def prepare_rope(
        self, inv_freq: Sequence[float], max_positions: int, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines [max_positions, n] of float32 angles, computed in float64."""
        angles = torch.outer(
            torch.arange(max_positions).float(), torch.tensor(inv_freq, dtype=torch.float32)
        ).double()
        return (angles.cos() * scale).to(self.dtype), (angles.sin() * scale).to(self.dtype)

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

    def embed(self, batch: _Batch, table: Tensor, scale: float = 1.0) -> Tensor:
        """See `kernels.ops.Backend`; the scale is first rounded to the number type, as Gemma's own code does."""
        return table[batch.token_ids] * torch.tensor(scale, dtype=self.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `kernels.ops.Backend`; rounded before it is multiplied by a weight of its own number type."""
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (normed.to(weight.dtype) * weight).to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See `kernels.ops.Backend`."""
        total = self.add(x, residual, scale)
        return self.rms_norm(total, weight, eps), total

    def add(self, x: Tensor, residual: Tensor, scale: float = 1.0) -> Tensor:
        """See `kernels.ops.Backend`."""
        return x * scale + residual

    def linear(self, x: Tensor, weight: _Linear) -> Tensor:
        """See `kernels.ops.Backend`."""
        rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -rows % _TILE))
        return torch.cat([F.linear(tile, *weight) for tile in torch.split(padded, _TILE)])[:rows]

    def rope_and_write_kv(
        self,
        qkv: Tensor,
        heads: Heads,
        rope: tuple[Tensor, Tensor],
        kv: Tensor,
        layer: int,
        batch: _Batch,
        norms: QkNorm | None = None,
    ) -> Tensor:
        """See `kernels.ops.Backend`."""
        q, k, v = torch.split(qkv.view(len(qkv), -1, heads.dim), [heads.query, heads.kv, heads.kv], dim=1)
        if norms is not None:
            q, k = self._norm_heads(q, norms.query, norms), self._norm_heads(k, norms.key, norms)
        cos, sin = (table[batch.positions, None] for table in rope)
        pages = kv[layer].flatten(1, 2)
        pages[0, batch.slots] = _rotate(k, cos, sin)
        pages[1, batch.slots] = v
        return _rotate(q, cos, sin).flatten(1)

    def _norm_heads(self, x: Tensor, weight: Tensor, norms: QkNorm) -> Tensor:
        """The norm of x [T, heads, dim], over each head or all of a token."""
        return self.rms_norm(x.flatten(1) if norms.whole else x, weight, norms.eps).view(x.shape)

    def paged_attention(
        self, q: Tensor, heads: Heads, attending: Attending, kv: Tensor, layer: int, batch: _Batch
    ) -> Tensor:
        """See `kernels.ops.Backend`."""
        pages = kv[layer].flatten(1, 2)
        queries = q.view(-1, heads.kv, heads.query // heads.kv, heads.dim)
        out = torch.empty_like(queries)
        for i, context in enumerate(batch.contexts):
            seen = context[-attending.window :]  # a window of 0 is all of it
            keys, values = pages[:, seen].transpose(1, 2)  # each [KV heads, seen, dim]
            scores = queries[i] @ keys.transpose(1, 2) * attending.scale
            out[i] = _softmax(_soft_cap(scores, attending.softcap), attending.sinks) @ values
        return out.view_as(q)

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """See `kernels.ops.Backend`."""
        gate, up = gate_up.chunk(2, dim=-1)
        if activation == "clamped_swiglu":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1
        return _ACTIVATIONS[activation](gate) * up

    def mixture(self, x: Tensor, router: _Linear, experts: _Experts, routing: Routing, activation: str) -> Tensor:
        """See `kernels.ops.Backend`."""
        scores = self.linear(x, router)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        shares = torch.softmax(scores, dim=-1)
        out = torch.zeros_like(x)
        for i, row in enumerate(scores):
            chosen = torch.sort(row, descending=True, stable=True).indices[: routing.top_k].sort().values
            weights = torch.softmax(row[chosen], dim=-1) if routing.normalise else shares[i, chosen]
            answers = [self._ask(x[i : i + 1], experts, int(expert), activation) for expert in chosen]
            out[i] = (weights[:, None] * torch.cat(answers)).sum(0)
        return out

    def _ask(self, x: Tensor, experts: _Experts, expert: int, activation: str) -> Tensor:
        inner = self.gated(self.linear(x, experts.gate_up[expert]), activation)
        return self.linear(inner, experts.down[expert])

    def logits(
        self, x: Tensor, head: _Linear, tokens: Sequence[int], scale: float = 1.0, softcap: float = 0.0
    ) -> Tensor:
        """See `kernels.ops.Backend`."""
        logits = self.linear(x[list(tokens)], head)
        return _soft_cap((logits if logits.dtype == torch.float64 else logits.float()) * scale, softcap)

    def sample(self, logits: Tensor, sampling: Sampling) -> Draw:
        """See `kernels.ops.Backend`."""
        return sample(logits, sampling)

    def logprobs(self, logits: Tensor, tokens: Sequence[int], top: int) -> Logprobs:
        """See `kernels.ops.Backend`."""
        return logprobs(logits, tokens, top)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + n]) by its angle (Su et al., RoFormer, 2021; Llama's order of pairs)."""
    n = cos.shape[-1]
    first, second, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap), or x where there is no cap."""
    return cap * torch.tanh(x / cap) if cap else x


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of scores [KV heads, fold, seen]; a sink for each head takes its share (Xiao et al., 2024)."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    column = sinks.view(*scores.shape[:2], 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _swish(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "clamped_swiglu": _swish,
}
