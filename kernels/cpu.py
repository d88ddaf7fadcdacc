"""The CPU backend in plain torch: fused matrices, head-major pages, query heads folded into rows of their KV head.

Deterministic mode computes every product in tiles of one fixed shape and attends over KV splits of one fixed
length (`kernels/cpu_attention.py`). What it takes for granted of the BLAS, that a row's bits do not depend on
where in the tile it lies, and of torch's functions, that a number's bits do not depend on where in a tensor it
lies, tests/kernels/test_determinism.py checks.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom
from torch import Tensor

from kernels import packed_cpu
from kernels.cpu_activations import activate, activate_exactly
from kernels.cpu_attention import TILE, Group, attend, copy_context, group_rows
from kernels.encoding import EncoderOps
from kernels.logprobs import logprobs
from kernels.ops import Attending, Draw, Heads, KvSpec, Logprobs, Matrix, QkNorm, Routing, Rows, Sampling
from kernels.packed import Packed
from kernels.sampling import sample

# oneDNN compiles a kernel for each shape of a bfloat16 product, of 0.6 MB, and keeps 1024 of them, and torch keeps
# as many again: steps of many sizes made 700 MB that no plan knew. Both read this at their first product.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "16")


class _Plain(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


_Linear: TypeAlias = _Plain | packed_cpu.PackedLinear
_Table: TypeAlias = Tensor | packed_cpu.PackedTable


class _Experts(NamedTuple):
    gate_up: list[_Linear]  # one for each expert
    down: list[_Linear]


class _KvCache(NamedTuple):
    pages: Tensor  # [layers, 2·KV heads, pages + 1, page size · dim]; keys first; the last page stays zero
    spec: KvSpec


class _Batch(NamedTuple):
    token_ids: Tensor  # [T], padded
    positions: Tensor  # [T], padded
    slots: Tensor  # [tokens], where keys and values go; not padded
    rows: Rows
    groups: dict[int, list[Group]]  # by window, made when a layer first asks for it


class CpuBackend(EncoderOps):
    """Torch on the CPU.

    Args:
        dtype: float32 or bfloat16, of weights, activations and KV pages.
        deterministic: same bits for a row whatever shares the step.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, deterministic: bool = False) -> None:
        self.dtype = dtype
        self.deterministic = deterministic

    @property
    def layout_id(self) -> str:
        """See `kernels.ops.Backend`; torch packs four bits as its own kernels on this processor want them."""
        return f"cpu 1 {self.dtype}, torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"

    def prepare_linear(self, weights: Sequence[Matrix], biases: Sequence[Tensor] = ()) -> _Linear:
        """See `kernels.ops.Backend`."""
        if any(isinstance(matrix, Packed) for matrix in weights):
            return packed_cpu.prepare(weights, biases, self.dtype)
        stacked = torch.cat([weight.to(self.dtype) for weight in weights])
        return _Plain(stacked, torch.cat([bias.to(self.dtype) for bias in biases]) if biases else None)

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
        """See `kernels.ops.Backend`; with an offset it stays in float32."""
        return weight.float() + offset if offset else weight.to(self.dtype, copy=True)

    def prepare_table(self, weight: Matrix) -> _Table:
        """See `kernels.ops.Backend`."""
        if isinstance(weight, Packed):
            return packed_cpu.prepare_table(weight)
        plain: Tensor = weight.to(self.dtype, copy=True)
        return plain

    def tied_head(self, table: _Table) -> _Linear:
        """See `kernels.ops.Backend`."""
        return _Plain(table, None) if isinstance(table, Tensor) else packed_cpu.tie(table, self.dtype)

    def prepare_rope(self, inv_freq: Sequence[float], max_positions: int, scale: float = 1.0) -> Tensor:
        """Float32 [max_positions, 2, 1, 2·n]: cosines, and sines whose first half is negated."""
        angles = torch.outer(torch.arange(max_positions).float(), torch.tensor(inv_freq, dtype=torch.float32))
        cos, sin = angles.double().cos() * scale, angles.double().sin() * scale
        return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], dim=1).float().unsqueeze(2)

    def allocate_kv(self, spec: KvSpec) -> _KvCache:
        """See `kernels.ops.Backend`."""
        shape = (spec.num_layers, 2 * spec.num_kv_heads, spec.num_blocks + 1, spec.block_size * spec.head_dim)
        return _KvCache(torch.zeros(shape, dtype=self.dtype), spec)

    def scrub(self, kv: _KvCache, blocks: Sequence[int]) -> None:
        """See `kernels.ops.Backend`."""
        kv.pages.index_fill_(2, torch.tensor(blocks), 0)

    def begin(self, rows: Rows, kv: _KvCache) -> _Batch:
        """See `kernels.ops.Backend`."""
        size = kv.spec.block_size
        spans = list(zip(rows.starts, rows.counts, rows.block_tables, strict=True))
        positions = [p for start, count, _ in spans for p in range(start, start + count)]
        slots = [
            table[p // size] * size + p % size
            for start, count, table in spans
            for p in range(start, start + count)
        ]
        fresh = [slot // size for slot in slots if slot % size == 0]
        if fresh:
            self.scrub(kv, fresh)
        padding = [0] * (-len(positions) % TILE) if self.deterministic else []
        return _Batch(
            token_ids=torch.tensor([*rows.token_ids, *padding]),
            positions=torch.tensor(positions + padding),
            slots=torch.tensor(slots),
            rows=rows,
            groups={},
        )

    def embed(self, batch: _Batch, table: _Table, scale: float = 1.0) -> Tensor:
        """See `kernels.ops.Backend`; the scale is first rounded to the number type, as Gemma's own code does."""
        if isinstance(table, Tensor):
            found = table.index_select(0, batch.token_ids)
        else:
            found = packed_cpu.read_rows(table, batch.token_ids).to(self.dtype)
        return found if scale == 1 else found * torch.tensor(scale, dtype=self.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `kernels.ops.Backend`; rounded before it is multiplied by a weight of its own number type."""
        if x.dtype == weight.dtype:
            return F.rms_norm(x, weight.shape, weight, eps)
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See `kernels.ops.Backend`."""
        total = self.add(x, residual, scale)
        return self.rms_norm(total, weight, eps), total

    def add(self, x: Tensor, residual: Tensor, scale: float = 1.0) -> Tensor:
        """See `kernels.ops.Backend`."""
        return x + residual if scale == 1 else x * scale + residual

    def linear(self, x: Tensor, weight: _Linear) -> Tensor:
        """See `kernels.ops.Backend`."""
        if isinstance(weight, packed_cpu.PackedLinear):
            return packed_cpu.linear(x, weight, TILE if self.deterministic else 0)
        if not self.deterministic or len(x) == TILE:
            return F.linear(x, *weight)
        return torch.cat([F.linear(tile, *weight) for tile in torch.split(x, TILE)])

    def rope_and_write_kv(
        self,
        qkv: Tensor,
        heads: Heads,
        rope: Tensor,
        kv: _KvCache,
        layer: int,
        batch: _Batch,
        norms: QkNorm | None = None,
    ) -> Tensor:
        """See `kernels.ops.Backend`."""
        x = qkv.view(len(qkv), -1, heads.dim)
        rotated, values = x[:, : heads.query + heads.kv], x[:, heads.query + heads.kv :]
        if norms is not None:
            rotated = self._norm_heads(rotated, heads, norms)
        turned = _turn(rotated, rope.index_select(0, batch.positions)).to(self.dtype)
        keys, count = turned[:, heads.query :], len(batch.slots)
        pages = kv.pages[layer].view(2, heads.kv, -1, heads.dim)
        pages[0].index_copy_(1, batch.slots, keys[:count].transpose(0, 1))
        pages[1].index_copy_(1, batch.slots, values[:count].transpose(0, 1))
        return turned[:, : heads.query]

    def _norm_heads(self, x: Tensor, heads: Heads, norms: QkNorm) -> Tensor:
        """Queries and keys [T, query + kv, dim], each with its norm over a head or over all of a token."""
        parts = zip(x.split([heads.query, heads.kv], 1), (norms.query, norms.key), strict=True)  # type: ignore[no-untyped-call]  # torch's
        return torch.cat(
            [
                self.rms_norm(part.flatten(1) if norms.whole else part, weight, norms.eps).view(part.shape)
                for part, weight in parts
            ],
            dim=1,
        )

    def paged_attention(
        self, q: Tensor, heads: Heads, attending: Attending, kv: _KvCache, layer: int, batch: _Batch
    ) -> Tensor:
        """See `kernels.ops.Backend`."""
        out = torch.zeros_like(q)
        for group in self._groups(batch, kv.spec, attending.window):
            context = copy_context(kv.pages[layer], heads, group)
            some = q.index_select(0, group.tokens)
            out.index_copy_(0, group.tokens, attend(some, heads, attending, context, group, self.deterministic))
        return out.flatten(1)

    def _groups(self, batch: _Batch, spec: KvSpec, window: int) -> list[Group]:
        """The step's rows as layers with this window attend."""
        if window not in batch.groups:
            batch.groups[window] = group_rows(batch.rows, spec, window, self.deterministic)
        return batch.groups[window]

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """See `kernels.ops.Backend`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return activate_exactly(gate, up, activation) if self.deterministic else activate(gate, up, activation)

    def mixture(self, x: Tensor, router: _Linear, experts: _Experts, routing: Routing, activation: str) -> Tensor:
        """See `kernels.ops.Backend`.

        Beside x and the answer in float32 it holds what a gated MLP of one expert holds for at most all T tokens,
        and their rows and answers.
        """
        chosen, weights = _route(self.linear(x, router).float(), routing)
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert in sorted(set(chosen.flatten().tolist())):
            tokens, place = torch.where(chosen == expert)
            rows = x.index_select(0, tokens)
            if self.deterministic or (self.dtype == torch.bfloat16 and len(rows) > TILE):
                rows = _in_tiles(rows)  # in bfloat16 each number of rows would be a product to compile
            inner = self.gated(self.linear(rows, experts.gate_up[expert]), activation)
            answers = self.linear(inner, experts.down[expert])[: len(tokens)].float()
            out.index_add_(0, tokens, answers * weights[tokens, place, None])
        return out.to(x.dtype)

    def logits(
        self, x: Tensor, head: _Linear, tokens: Sequence[int], scale: float = 1.0, softcap: float = 0.0
    ) -> Tensor:
        """See `kernels.ops.Backend`."""
        rows = x.index_select(0, torch.tensor(tokens, dtype=torch.int64))
        if self.deterministic:
            rows = _in_tiles(rows)
        logits = self.linear(rows, head)[: len(tokens)].float()
        if scale != 1:
            logits.mul_(scale)
        return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits

    def sample(self, logits: Tensor, sampling: Sampling) -> Draw:
        """See `kernels.ops.Backend`."""
        return sample(logits, sampling)

    def logprobs(self, logits: Tensor, tokens: Sequence[int], top: int) -> Logprobs:
        """See `kernels.ops.Backend`."""
        return logprobs(logits, tokens, top)


def _in_tiles(x: Tensor) -> Tensor:
    """Padded with rows of zeros to whole tiles."""
    return F.pad(x, (0, 0, 0, -len(x) % TILE))


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the first 2·n numbers of each head of x [T, heads, dim] by angles [T, 2, 1, 2·n]."""
    size = angles.shape[-1]
    cos, sin = angles.unbind(1)
    part = x[..., :size]
    # Products and sum apart: a fused multiply-add rounds differently where the vector loop ends.
    turned = part * cos + part.roll(size // 2, -1) * sin
    return turned if size == x.shape[-1] else torch.cat([turned, x[..., size:].float()], -1)


def _route(scores: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """The experts that each row of scores [T, experts] chooses, and their weights, both [T, top_k]."""
    ordered, experts = torch.sort(scores, dim=-1, descending=True, stable=True)
    chosen = experts[:, : routing.top_k]
    if routing.normalise:
        return chosen, torch.softmax(ordered[:, : routing.top_k], -1)
    return chosen, torch.softmax(scores, -1).gather(-1, chosen)
