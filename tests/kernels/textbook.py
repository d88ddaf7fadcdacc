"""The equations of attention in float64, a token and a head at a time, and sequences fed through scattered pages.

Nothing here is taken from a backend: tests hold every backend to it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.cpu import CpuBackend
from kernels.native.backend import NativeBackend
from kernels.native.kv import KvPages
from kernels.native.layout import TILE
from kernels.native.location import find_library
from kernels.ops import Attending, Backend, Heads, KvSpec, QkNorm, Rows
from kernels.reference import ReferenceBackend

BACKENDS: dict[str, Backend] = {
    "reference": ReferenceBackend(),
    "reference, float64": ReferenceBackend(torch.float64),
    "cpu": CpuBackend(),
    "cpu, deterministic": CpuBackend(deterministic=True),
} | ({"native": NativeBackend()} if find_library() else {})


class Layer(NamedTuple):
    """What one layer's attention is made of; weights in float32.

    Attributes:
        heads: of the projection.
        inv_freq: of the rotation, for the first 2·n numbers of a head.
        attending: its sinks are plain numbers here.
        rope_scale: factor of cosines and sines.
        norms: weights of the queries' and the keys' norm; whole where they are that long.
    """

    heads: Heads
    inv_freq: tuple[float, ...]
    attending: Attending
    rope_scale: float = 1.0
    norms: tuple[Tensor, Tensor] | None = None

    @property
    def width(self) -> int:
        """Numbers of a token's queries, keys and values."""
        return (self.heads.query + 2 * self.heads.kv) * self.heads.dim


EPS = 1e-5


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def padded(ops: Backend, x: Tensor) -> Tensor:
    """As a backend pads a step: to whole tiles of 16 in the deterministic CPU backend."""
    if isinstance(ops, CpuBackend):
        whole = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 16)) if ops.deterministic else x
        return whole.to(ops.dtype)
    return x.to(ops.dtype) if isinstance(ops, ReferenceBackend) else x


def attend(qkv: Tensor, layer: Layer) -> Tensor:
    """Attention of one sequence from position 0: [tokens, width] -> [tokens, query·dim]."""
    heads, how = layer.heads, layer.attending
    q, k, v = _split(qkv.double(), heads)
    if layer.norms is not None:
        q, k = _norm(q, layer.norms[0].double()), _norm(k, layer.norms[1].double())
    q, k = _rotate(q, layer), _rotate(k, layer)
    out = torch.empty_like(q)
    for t in range(len(q)):
        first = max(0, t + 1 - how.window) if how.window else 0
        for h in range(heads.query):
            g = h // (heads.query // heads.kv)
            scores = k[first : t + 1, g] @ q[t, h] * how.scale
            if how.softcap:
                scores = how.softcap * torch.tanh(scores / how.softcap)
            parts = torch.exp(scores)
            total = parts.sum() + (torch.exp(how.sinks[h].double()) if how.sinks is not None else 0)
            out[t, h] = parts / total @ v[first : t + 1, g]
    return out.flatten(1)


def _split(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    x = qkv.view(len(qkv), -1, heads.dim)
    return x[:, : heads.query], x[:, heads.query : -heads.kv], x[:, -heads.kv :]


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """Over each head; over all of a token where the weight is that long."""
    y = x if weight.numel() == x.shape[-1] else x.flatten(1)
    return (y / (y.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight).view(x.shape)


def _rotate(x: Tensor, layer: Layer) -> Tensor:
    """x [tokens, heads, dim]: pairs are complex numbers, turned by their angle and stretched; the rest stays."""
    n = len(layer.inv_freq)
    angles = torch.outer(torch.arange(len(x)).double(), torch.tensor(layer.inv_freq, dtype=torch.float64))
    factor = torch.polar(torch.full_like(angles, layer.rope_scale), angles)[:, None]
    turned = torch.complex(x[..., :n], x[..., n : 2 * n]) * factor
    return torch.cat([turned.real, turned.imag, x[..., 2 * n :]], -1)


def held(kv: Any) -> Tensor:
    """The tensor of all pages; the pages are its third dimension."""
    if isinstance(kv, KvPages):
        return kv.pages.view(torch.float32)[:, None]
    found: Tensor = getattr(kv, "pages", kv)
    return found


class Piece(NamedTuple):
    """Some tokens of a sequence, to go in one step."""

    sequence: int
    start: int
    tokens: int


class Pages:
    """Sequences on scattered pages of one backend, for one layer; every page first holds NaN.

    Args:
        ops: the backend.
        layer: of attention.
        sequences: [tokens, width] each.
        block_size: tokens of a page.
    """

    def __init__(self, ops: Backend, layer: Layer, sequences: Sequence[Tensor], block_size: int) -> None:
        self.ops, self.layer, self.sequences, self.block_size = ops, layer, sequences, block_size
        needed = [-(-len(sequence) // block_size) for sequence in sequences]
        blocks = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(1)).tolist()
        self.tables = [tuple(blocks.pop() for _ in range(n)) for n in needed]
        spec = KvSpec(2, sum(needed) + 2, block_size, layer.heads.kv, layer.heads.dim)
        self.kv = ops.allocate_kv(spec)
        held(self.kv)[:, :, : spec.num_blocks] = float("nan")
        self.rope = ops.prepare_rope(layer.inv_freq, 512, layer.rope_scale)
        sinks = None if layer.attending.sinks is None else ops.prepare_vector(layer.attending.sinks)
        self.attending = layer.attending._replace(sinks=sinks)
        self.norms: QkNorm | None = None
        if layer.norms is not None:
            query, key = map(ops.prepare_vector, layer.norms)
            self.norms = QkNorm(query, key, EPS, whole=len(layer.norms[0]) != layer.heads.dim)

    def step(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """The answers to each piece's tokens."""
        counts = [piece.tokens for piece in pieces]
        x = torch.cat([self.sequences[i][start : start + count] for i, start, count in pieces])
        tables = [self.tables[piece.sequence] for piece in pieces]
        rows = Rows([0] * sum(counts), [piece.start for piece in pieces], counts, tables)
        batch = self.ops.begin(rows, self.kv)
        heads = self.layer.heads
        q = self.ops.rope_and_write_kv(padded(self.ops, x), heads, self.rope, self.kv, 1, batch, self.norms)
        out: Tensor = self.ops.paged_attention(q, heads, self.attending, self.kv, 1, batch)
        return list(torch.split(out[: sum(counts)], counts))

    def poison(self, sequence: int, count: int) -> None:
        """NaN in the place of the first `count` tokens' keys and values."""
        table, size = self.tables[sequence], self.block_size
        slots = [table[p // size] * size + p % size for p in range(count)]
        if isinstance(self.ops, CpuBackend):
            heads = self.layer.heads
            self.kv.pages.view(2, 2 * heads.kv, -1, heads.dim)[:, :, slots] = float("nan")
        elif isinstance(self.ops, NativeBackend):
            for slot in slots:
                _poison_native(self.kv, *divmod(slot, size))
        else:
            self.kv.flatten(2, 3)[:, :, slots] = float("nan")


def _poison_native(kv: KvPages, block: int, place: int) -> None:
    """Float32 pages hold head after head: tiles of keys [dim][16 tokens], then of values [16 tokens][dim]."""
    tiles, dim = -(-kv.spec.block_size // TILE), -(-kv.spec.head_dim // TILE) * TILE
    heads = kv.pages.view(torch.float32)[:, block].view(-1, kv.spec.num_kv_heads, 2, tiles, TILE * dim)
    tile, lane = divmod(place, TILE)
    heads[:, :, 0, tile].view(-1, kv.spec.num_kv_heads, dim, TILE)[..., lane] = float("nan")
    heads[:, :, 1, tile].view(-1, kv.spec.num_kv_heads, TILE, dim)[..., lane, :] = float("nan")


def in_steps(pages: Pages, steps: Sequence[Sequence[Piece]]) -> list[Tensor]:
    """The answers to all tokens of each sequence, computed in these steps."""
    parts: list[list[Any]] = [[] for _ in pages.sequences]
    for pieces in steps:
        for piece, answer in zip(pieces, pages.step(pieces), strict=True):
            parts[piece.sequence].append(answer)
    return [torch.cat(answers) for answers in parts]
