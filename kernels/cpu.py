"""The CPU backend in plain torch: fused matrices, head-major pages, query heads folded into rows of their KV head.

Deterministic mode computes every product in tiles of one fixed shape and attends over KV splits of one fixed
length, joined in order; a trailing split that is masked out changes no bit. What it takes for granted of the BLAS,
that a row's bits do not depend on where in the tile it lies, tests/kernels/test_determinism.py checks.

Source: Dao et al., "FlashAttention", NeurIPS 2022 (attention over splits); Ainslie et al., "GQA", EMNLP 2023.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom
from torch import Tensor

from kernels.encoding import EncoderOps
from kernels.logprobs import logprobs
from kernels.ops import Draw, Heads, KvSpec, Logprobs, Rows, Sampling
from kernels.sampling import sample

_TILE = 16  # rows of a tile, in deterministic mode
_SPLIT = 64  # tokens of a KV split, in deterministic mode; a page that is larger is one split
_MAX_CONTEXT = 2**25  # numbers of keys and values copied at once for single tokens that attend together
_MAX_COPY = 2**22  # numbers of keys laid out at once for the tiles of a long prompt, in deterministic mode


class _Linear(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


class _KvCache(NamedTuple):
    pages: Tensor  # [layers, 2·KV heads, pages + 1, page size · dim]; keys first; the last page stays zero
    spec: KvSpec


class _Group(NamedTuple):
    """Rows that attend together: B of them, `per_row` tokens each, over `length` tokens of context, padded."""

    tokens: Tensor  # [B·per_row], which of the step's tokens
    table: Tensor  # [B·pages], padded with the zero page
    invalid: Tensor  # [B, per_row, length], True where a token must not look
    per_row: int
    start: int  # position of the first token; of several rows, the last such position
    unit: int  # tokens that `length` is a multiple of


class _Batch(NamedTuple):
    token_ids: Tensor  # [T], padded
    positions: Tensor  # [T], padded
    slots: Tensor  # [tokens], where keys and values go; not padded
    groups: list[_Group]


class CpuBackend(EncoderOps):
    """Torch on the CPU.

    Args:
        dtype: float32 or bfloat16, of weights, activations and KV pages.
        deterministic: same bits for a row whatever shares the step.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, deterministic: bool = False) -> None:
        self.dtype = dtype
        self.deterministic = deterministic

    def prepare_linear(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> _Linear:
        """See `kernels.ops.Backend`."""
        stacked = torch.cat([weight.to(self.dtype) for weight in weights])
        return _Linear(stacked, torch.cat([bias.to(self.dtype) for bias in biases]) if biases else None)

    def prepare_vector(self, weight: Tensor) -> Tensor:
        """See `kernels.ops.Backend`."""
        return weight.to(self.dtype, copy=True)

    def prepare_table(self, weight: Tensor) -> Tensor:
        """See `kernels.ops.Backend`."""
        return weight.to(self.dtype, copy=True)

    def tied_head(self, table: Tensor) -> _Linear:
        """See `kernels.ops.Backend`."""
        return _Linear(table, None)

    def prepare_rope(self, inv_freq: Sequence[float], max_positions: int) -> Tensor:
        """Float32 [max_positions, 2, 1, head_dim]: cosines, and sines whose first half is negated."""
        angles = torch.outer(torch.arange(max_positions).float(), torch.tensor(inv_freq, dtype=torch.float32))
        cos, sin = angles.double().cos(), angles.double().sin()
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
        padding = [0] * (-len(positions) % _TILE) if self.deterministic else []
        return _Batch(
            token_ids=torch.tensor([*rows.token_ids, *padding]),
            positions=torch.tensor(positions + padding),
            slots=torch.tensor(slots),
            groups=list(self._groups(rows, kv.spec)),
        )

    def embed(self, batch: _Batch, table: Tensor) -> Tensor:
        """See `kernels.ops.Backend`."""
        return table.index_select(0, batch.token_ids)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `kernels.ops.Backend`."""
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `kernels.ops.Backend`."""
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def linear(self, x: Tensor, weight: _Linear) -> Tensor:
        """See `kernels.ops.Backend`."""
        if not self.deterministic or len(x) == _TILE:
            return F.linear(x, *weight)
        return torch.cat([F.linear(tile, *weight) for tile in torch.split(x, _TILE)])

    def rope_and_write_kv(
        self, qkv: Tensor, heads: Heads, rope: Tensor, kv: _KvCache, layer: int, batch: _Batch
    ) -> Tensor:
        """See `kernels.ops.Backend`."""
        x = qkv.view(len(qkv), -1, heads.dim)
        rotated, values = x[:, : heads.query + heads.kv], x[:, heads.query + heads.kv :]
        cos, sin = rope.index_select(0, batch.positions).unbind(1)
        # Products and sum apart: a fused multiply-add rounds differently where the vector loop ends.
        turned = (rotated * cos + rotated.roll(heads.dim // 2, -1) * sin).to(self.dtype)
        keys, count = turned[:, heads.query :], len(batch.slots)
        pages = kv.pages[layer].view(2, heads.kv, -1, heads.dim)
        pages[0].index_copy_(1, batch.slots, keys[:count].transpose(0, 1))
        pages[1].index_copy_(1, batch.slots, values[:count].transpose(0, 1))
        return turned[:, : heads.query]

    def paged_attention(self, q: Tensor, heads: Heads, kv: _KvCache, layer: int, batch: _Batch) -> Tensor:
        """See `kernels.ops.Backend`."""
        out = torch.zeros_like(q)
        attend = _attend_in_tiles if self.deterministic else _attend
        for group in batch.groups:
            pages = kv.pages[layer].index_select(1, group.table)
            context = pages.view(2, heads.kv, len(group.invalid), -1, heads.dim)
            out.index_copy_(0, group.tokens, attend(q.index_select(0, group.tokens), heads, context, group))
        return out.flatten(1)

    def gated_silu(self, gate_up: Tensor) -> Tensor:
        """See `kernels.ops.Backend`."""
        gate, up = gate_up.chunk(2, dim=-1)
        if not self.deterministic:
            return F.silu(gate) * up
        # torch's silu gives other bits to the numbers left over where a thread's share ends; its exp does not.
        wide = gate.float()
        return (wide / (1 + torch.exp(-wide)) * up).to(self.dtype)

    def logits(self, x: Tensor, head: _Linear, tokens: Sequence[int]) -> Tensor:
        """See `kernels.ops.Backend`."""
        rows = x.index_select(0, torch.tensor(tokens, dtype=torch.int64))
        if self.deterministic:
            rows = F.pad(rows, (0, 0, 0, -len(rows) % _TILE))
        return self.linear(rows, head)[: len(tokens)].float()

    def sample(self, logits: Tensor, sampling: Sampling) -> Draw:
        """See `kernels.ops.Backend`."""
        return sample(logits, sampling)

    def logprobs(self, logits: Tensor, tokens: Sequence[int], top: int) -> Logprobs:
        """See `kernels.ops.Backend`."""
        return logprobs(logits, tokens, top)

    def _groups(self, rows: Rows, spec: KvSpec) -> "list[_Group]":
        """Single tokens of like context length together, every longer row alone."""
        unit = max(1, _SPLIT // spec.block_size) if self.deterministic else 1
        members: dict[object, list[int]] = {}
        for i, (start, count) in enumerate(zip(rows.starts, rows.counts, strict=True)):
            units = -(-(start + count) // (spec.block_size * unit))
            members.setdefault((units - 1).bit_length() if count == 1 else (i,), []).append(i)
        firsts = [0, *torch.tensor(rows.counts).cumsum(0).tolist()]
        return [
            _group(rows, spec, chosen[i : i + most], firsts, unit)
            for chosen in members.values()
            for most in (_most_together(rows, spec, chosen),)
            for i in range(0, len(chosen), most)
        ]


def _most_together(rows: Rows, spec: KvSpec, chosen: Sequence[int]) -> int:
    """How many of the rows `chosen` may attend together, so that copies of their pages stay small."""
    longest = max(rows.starts[i] + rows.counts[i] for i in chosen)
    return max(1, _MAX_CONTEXT // (2 * spec.num_kv_heads * spec.head_dim * longest))


def _group(rows: Rows, spec: KvSpec, chosen: Sequence[int], firsts: Sequence[int], unit: int) -> _Group:
    """The rows `chosen`, all of one token count, as a group whose length is a multiple of `unit` pages."""
    count = rows.counts[chosen[0]]
    ends = [rows.starts[i] + count for i in chosen]
    used = [-(-end // spec.block_size) for end in ends]
    pages = -(-max(used) // unit) * unit
    table = [
        block
        for i, n in zip(chosen, used, strict=True)
        for block in (*rows.block_tables[i][:n], *[spec.num_blocks] * (pages - n))
    ]
    position = torch.tensor(ends)[:, None] - count + torch.arange(count)  # [B, count]
    return _Group(
        tokens=torch.tensor([firsts[i] + j for i in chosen for j in range(count)]),
        table=torch.tensor(table),
        invalid=torch.arange(pages * spec.block_size) > position[..., None],
        per_row=count,
        start=max(ends) - count,
        unit=unit * spec.block_size,
    )


def _attend(q: Tensor, heads: Heads, context: Tensor, group: _Group) -> Tensor:
    """Attention of one group; arguments and result as in `_attend_in_tiles`.

    The query heads of a KV head are folded into rows: torch's own grouped-query path is several times slower.
    """
    batch, fold = len(group.invalid), heads.query // heads.kv
    queries = q.view(batch, group.per_row, heads.kv, fold, heads.dim).transpose(1, 2)
    keys, values = context.transpose(1, 2)
    valid = ~group.invalid[:, None, :, None].expand(-1, -1, -1, fold, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(queries.flatten(2, 3), keys, values, attn_mask=valid)
    return out.view(batch, heads.kv, group.per_row, fold, heads.dim).transpose(1, 2).reshape(q.shape)


def _attend_in_tiles(q: Tensor, heads: Heads, context: Tensor, group: _Group) -> Tensor:
    """Attention in tiles of a fixed number of rows over splits of a fixed length, for one group.

    Args:
        q: [B·per_row, query heads, dim].
        heads: of the projection.
        context: keys and values, [2, KV heads, B, length, dim].
        group: the rows.

    Returns:
        [B·per_row, query heads, dim].
    """
    batch, count, length = group.invalid.shape
    fold = heads.query // heads.kv
    per_tile = -(-_TILE // fold)
    tiles = -(-count // per_tile)
    pick = torch.arange(tiles * per_tile).clamp_(max=count - 1)  # the last token fills the last tile
    queries = q.view(batch, count, heads.kv, fold, heads.dim).index_select(1, pick).float() * heads.dim**-0.5
    queries = queries.view(batch, tiles, per_tile, heads.kv, fold, heads.dim).permute(3, 0, 1, 2, 4, 5)
    real = min(count, per_tile)  # of a single tile only these rows are worth more than the products
    invalid = group.invalid.index_select(1, pick).view(batch, tiles, per_tile, 1, length)[:, :, :real]
    at_once = max(1, _MAX_COPY // (heads.kv * batch * length * heads.dim))
    parts = []
    for first in range(0, tiles, at_once):
        some = slice(first, first + at_once)
        reach = min(length, -(-(group.start + some.stop * per_tile) // group.unit) * group.unit)
        seen = context[..., :reach, :].float()
        parts.append(_join_splits(queries[:, :, some], seen, invalid[:, some, ..., :reach], group.unit))
    out = torch.cat(parts, dim=2).view(heads.kv, batch, tiles * real, fold, heads.dim)[:, :, :count]
    return out.permute(1, 2, 0, 3, 4).reshape(q.shape).to(q.dtype)


def _join_splits(queries: Tensor, context: Tensor, invalid: Tensor, split: int) -> Tensor:
    """Softmax over all splits at once; products and sums split by split, added up in order.

    The maximum of all splits is exact in any order, and a split that is masked out adds exact zeros.

    Args:
        queries: [KV heads, B, tiles, tokens, fold, dim], scaled; whole tiles.
        context: keys and values, [2, KV heads, B, length, dim].
        invalid: [B, tiles, real, 1, length]; the first `real` tokens of each tile are wanted.
        split: tokens of a split; divides length.

    Returns:
        [KV heads, B, tiles, real, fold, dim].
    """
    kv_heads, batch, tiles, tokens, fold, dim = queries.shape
    splits = context.shape[3] // split
    keys, values = (
        part.view(kv_heads, batch, 1, splits, split, dim).expand(-1, -1, tiles, -1, -1, -1).reshape(-1, split, dim)
        for part in context
    )
    each = queries.reshape(-1, 1, tokens * fold, dim).expand(-1, splits, -1, -1).reshape(-1, tokens * fold, dim)
    real = invalid.shape[2]
    products = torch.bmm(each, keys.transpose(1, 2))
    scores = products.view(kv_heads, batch, tiles, splits, tokens, fold, split)[..., :real, :, :]
    hidden = invalid.reshape(batch, tiles, real, 1, splits, split).permute(0, 1, 4, 2, 3, 5)
    scores.masked_fill_(hidden, float("-inf"))
    weights = torch.exp(scores - scores.amax((3, 6), keepdim=True))
    totals = weights.sum(-1, keepdim=True).unbind(3)
    padded = F.pad(weights.flatten(-3, -2), (0, 0, 0, (tokens - real) * fold))  # the product's shape stays fixed
    outs = torch.bmm(padded.view(-1, tokens * fold, split), values)
    outs = outs.view(kv_heads, batch, tiles, splits, tokens, fold, dim)[..., :real, :, :]
    return _add_in_order(outs.unbind(3)) / _add_in_order(totals)


def _add_in_order(parts: Sequence[Tensor]) -> Tensor:
    """The sum, from first to last: torch.sum would choose an order by their number."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
