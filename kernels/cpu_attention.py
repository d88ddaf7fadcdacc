"""Attention of the CPU backend: a step's rows in groups, over copies of just the pages that a layer can see.

Three ways to attend: torch's own fused attention; the equation in blocks of tokens, for what that has not (softcap
and sinks); and, in deterministic mode, tiles of a fixed number of rows over KV splits of one fixed length, whose
sums are added in order. A split that is masked out adds exact zeros there, so those at either end may be left out.

Pages before the window of a row's first token are not copied; the tokens before it in the first page that is, are
zeroed in the copy: what no token of a row sees is not even multiplied by zero.

Source: Dao et al., "FlashAttention", NeurIPS 2022 (attention over splits); Ainslie et al., "GQA", EMNLP 2023;
Beltagy et al., "Longformer", 2020 (windows); Xiao et al., "Efficient Streaming Language Models with Attention
Sinks", ICLR 2024.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom
from torch import Tensor

from kernels.ops import Attending, Heads, KvSpec, Rows

TILE = 16
"""Rows of a tile, in deterministic mode."""
_SPLIT = 64  # tokens of a KV split, in deterministic mode; a page that is larger is one split
_MAX_CONTEXT = 2**25  # numbers of keys and values copied at once for single tokens that attend together
_MAX_COPY = 2**22  # numbers of keys laid out at once for the tiles of a long prompt, in deterministic mode
_MAX_SCORES = 2**20  # scores at once where softmax is written out; one token's may be more


class Group(NamedTuple):
    """Rows that attend together: B of them, `per_row` tokens each, over `length` tokens of context, padded.

    Attributes:
        tokens: [B·per_row], which of the step's tokens.
        table: [B·pages], each row's from its first visible page on, padded with the zero page.
        invalid: [B, per_row, length], True where a token must not look.
        unseen: [B, unit], True for the tokens of the first pages that no token of the row sees; None: none.
        per_row: tokens of each row.
        start: place in the context of a row's first token; of several rows, the last such place.
        unit: tokens that `length` is a multiple of.
        window: as in `Attending`.
    """

    tokens: Tensor
    table: Tensor
    invalid: Tensor
    unseen: Tensor | None
    per_row: int
    start: int
    unit: int
    window: int


def group_rows(rows: Rows, spec: KvSpec, window: int, deterministic: bool) -> list[Group]:
    """Single tokens that see like lengths of context together, every longer row alone."""
    unit = max(1, _SPLIT // spec.block_size) if deterministic else 1
    lengths = [_visible(rows, i, window, spec.block_size * unit) for i in range(len(rows.counts))]
    members: dict[object, list[int]] = {}
    for i, ((first, end), count) in enumerate(zip(lengths, rows.counts, strict=True)):
        units = -(-(end - first) // (spec.block_size * unit))
        members.setdefault((units - 1).bit_length() if count == 1 else (i,), []).append(i)
    begins = [0, *torch.tensor(rows.counts).cumsum(0).tolist()]
    groups = []
    for chosen in members.values():
        longest = max(lengths[i][1] - lengths[i][0] for i in chosen)
        most = max(1, _MAX_CONTEXT // (2 * spec.num_kv_heads * spec.head_dim * longest))
        for at in range(0, len(chosen), most):
            some = chosen[at : at + most]
            groups.append(_group(rows, spec, some, [lengths[i] for i in some], begins, unit, window))
    return groups


def _visible(rows: Rows, i: int, window: int, unit: int) -> tuple[int, int]:
    """What row i sees of its context, from a multiple of `unit` to its end."""
    start = rows.starts[i]
    return max(0, start + 1 - window) // unit * unit if window else 0, start + rows.counts[i]


def _group(
    rows: Rows,
    spec: KvSpec,
    chosen: Sequence[int],
    lengths: Sequence[tuple[int, int]],
    begins: Sequence[int],
    unit: int,
    window: int,
) -> Group:
    """The rows `chosen`, all of one token count, as a group whose length is a multiple of `unit` pages."""
    size, count = spec.block_size, rows.counts[chosen[0]]
    used = [-(-(end - first) // size) for first, end in lengths]
    pages = -(-max(used) // unit) * unit
    table = [
        block
        for i, (first, _), n in zip(chosen, lengths, used, strict=True)
        for block in (*rows.block_tables[i][first // size : first // size + n], *[spec.num_blocks] * (pages - n))
    ]
    starts = torch.tensor([end - count - first for first, end in lengths])[:, None]
    position, place = (starts + torch.arange(count))[..., None], torch.arange(pages * size)
    invalid = place > position
    unseen = None
    if window:
        invalid |= place <= position - window
        unseen = place[: unit * size] <= starts - window
    return Group(
        tokens=torch.tensor([begins[i] + j for i in chosen for j in range(count)]),
        table=torch.tensor(table),
        invalid=invalid,
        unseen=unseen,
        per_row=count,
        start=int(starts.max()),
        unit=unit * size,
        window=window,
    )


def copy_context(pages: Tensor, heads: Heads, group: Group) -> Tensor:
    """Keys and values of a group out of one layer's pages, [2, KV heads, B, length, dim].

    Args:
        pages: [2·KV heads, pages, page size · dim], keys first.
        heads: of the projection.
        group: the rows.
    """
    context = pages.index_select(1, group.table).view(2, heads.kv, len(group.invalid), -1, heads.dim)
    if group.unseen is not None:
        context[..., : group.unit, :].masked_fill_(group.unseen[..., None], 0)
    return context


def attend(
    q: Tensor, heads: Heads, attending: Attending, context: Tensor, group: Group, deterministic: bool
) -> Tensor:
    """Attention of one group.

    Args:
        q: [B·per_row, query heads, dim].
        heads: of the projection.
        attending: how.
        context: keys and values, [2, KV heads, B, length, dim].
        group: the rows.
        deterministic: the same bits for a row whatever shares the step.

    Returns:
        [B·per_row, query heads, dim].
    """
    if deterministic:
        return _attend_in_tiles(q, heads, attending, context, group)
    if attending.softcap or attending.sinks is not None:
        return _attend_in_blocks(q, heads, attending, context, group)
    return _attend_fused(q, heads, attending, context, group)


def _attend_fused(q: Tensor, heads: Heads, attending: Attending, context: Tensor, group: Group) -> Tensor:
    """With torch's own attention; arguments and result as in `attend`.

    The query heads of a KV head are folded into rows: torch's own grouped-query path is several times slower.
    """
    batch, fold = len(group.invalid), heads.query // heads.kv
    queries = q.view(batch, group.per_row, heads.kv, fold, heads.dim).transpose(1, 2)
    keys, values = context.transpose(1, 2)
    valid = ~group.invalid[:, None, :, None].expand(-1, -1, -1, fold, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(
        queries.flatten(2, 3), keys, values, attn_mask=valid, scale=attending.scale
    )
    return out.view(batch, heads.kv, group.per_row, fold, heads.dim).transpose(1, 2).reshape(q.shape)


def _attend_in_blocks(q: Tensor, heads: Heads, attending: Attending, context: Tensor, group: Group) -> Tensor:
    """Written out in float32, for as many tokens at once as make _MAX_SCORES scores; as `attend`."""
    batch, count, length = group.invalid.shape
    fold = heads.query // heads.kv
    queries = q.view(batch, count, heads.kv, fold, heads.dim).permute(2, 0, 1, 3, 4)
    sinks = None if attending.sinks is None else attending.sinks.float().view(heads.kv, 1, 1, fold, 1)
    at_once = max(1, _MAX_SCORES // (batch * heads.query * length))
    parts = []
    for first in range(0, count, at_once):
        some = slice(first, first + at_once)
        low, high = _reach(group, length, first, some.stop)
        keys, values = context[..., low:high, :].float()
        wanted = queries[:, :, some].float() * attending.scale
        scores = (wanted.flatten(2, 3) @ keys.transpose(2, 3)).view(*wanted.shape[:-1], high - low)
        _cap_and_hide(scores, attending.softcap, group.invalid[:, some, None, low:high])
        weights, own = _numerators(scores, -1, sinks)
        totals = weights.sum(-1, keepdim=True) if own is None else weights.sum(-1, keepdim=True) + own
        parts.append(((weights.flatten(2, 3) @ values).view(wanted.shape) / totals).to(q.dtype))
    return torch.cat(parts, 2).permute(1, 2, 0, 3, 4).reshape(q.shape)


def _attend_in_tiles(q: Tensor, heads: Heads, attending: Attending, context: Tensor, group: Group) -> Tensor:
    """In tiles of a fixed number of rows over splits of a fixed length; as `attend`."""
    batch, count, length = group.invalid.shape
    fold = heads.query // heads.kv
    per_tile = -(-TILE // fold)
    tiles = -(-count // per_tile)
    pick = torch.arange(tiles * per_tile).clamp_(max=count - 1)  # the last token fills the last tile
    queries = q.view(batch, count, heads.kv, fold, heads.dim).index_select(1, pick).float() * attending.scale
    queries = queries.view(batch, tiles, per_tile, heads.kv, fold, heads.dim).permute(3, 0, 1, 2, 4, 5)
    real = min(count, per_tile)  # of a single tile only these rows are worth more than the products
    invalid = group.invalid.index_select(1, pick).view(batch, tiles, per_tile, 1, length)[:, :, :real]
    at_once = max(1, _MAX_COPY // (heads.kv * batch * length * heads.dim))
    parts = []
    for first in range(0, tiles, at_once):
        some = slice(first, first + at_once)
        low, high = _reach(group, length, first * per_tile, some.stop * per_tile)
        seen = context[..., low:high, :].float()
        hidden = invalid[:, some, ..., low:high]
        parts.append(_join_splits(queries[:, :, some], seen, hidden, group.unit, attending))
    out = torch.cat(parts, dim=2).view(heads.kv, batch, tiles * real, fold, heads.dim)[:, :, :count]
    return out.permute(1, 2, 0, 3, 4).reshape(q.shape).to(q.dtype)


def _join_splits(queries: Tensor, context: Tensor, invalid: Tensor, split: int, attending: Attending) -> Tensor:
    """Softmax over all splits at once; products and sums split by split, added up in order.

    The maximum of all splits is exact in any order, and a split that is masked out adds exact zeros.

    Args:
        queries: [KV heads, B, tiles, tokens, fold, dim], scaled; whole tiles.
        context: keys and values, [2, KV heads, B, length, dim].
        invalid: [B, tiles, real, 1, length]; the first `real` tokens of each tile are wanted.
        split: tokens of a split; divides length.
        attending: how.

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
    _cap_and_hide(scores, attending.softcap, hidden)
    sinks = None if attending.sinks is None else attending.sinks.float().view(kv_heads, 1, 1, 1, 1, fold, 1)
    weights, own = _numerators(scores, (3, 6), sinks)
    totals = _add_in_order(weights.sum(-1, keepdim=True).unbind(3))
    padded = F.pad(weights.flatten(-3, -2), (0, 0, 0, (tokens - real) * fold))  # the product's shape stays fixed
    outs = torch.bmm(padded.view(-1, tokens * fold, split), values)
    outs = outs.view(kv_heads, batch, tiles, splits, tokens, fold, dim)[..., :real, :, :]
    return _add_in_order(outs.unbind(3)) / (totals if own is None else totals + own.squeeze(3))


def _reach(group: Group, length: int, first: int, last: int) -> tuple[int, int]:
    """What of `length` tokens of context the tokens first .. last - 1 of the rows can see, in whole units."""
    alone = group.window > 0 and len(group.invalid) == 1
    low = max(0, group.start + first + 1 - group.window) // group.unit * group.unit if alone else 0
    return low, min(length, -(-(group.start + last) // group.unit) * group.unit)


def _cap_and_hide(scores: Tensor, softcap: float, invalid: Tensor) -> None:
    """Bound the scores, and hide those that do not count, where they are."""
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores.masked_fill_(invalid, float("-inf"))


def _numerators(scores: Tensor, over: int | tuple[int, ...], sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What softmax divides, for each score, in its place, and for the sink, if there is one.

    That of a sink may be infinite, far above all scores: their shares are zero then, as they should be.

    Args:
        scores: with a number for each row that counts.
        over: dimensions of the maximum, which is taken off.
        sinks: broadcast to the maximum.
    """
    highest = scores.amax(over, keepdim=True)
    return scores.sub_(highest).exp_(), None if sinks is None else torch.exp(sinks - highest)


def _add_in_order(parts: Sequence[Tensor]) -> Tensor:
    """The sum, from first to last: torch.sum would choose an order by their number."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
