"""Low-rank adapters beside a product: several adapters in a step, each for the rows that ask it.

    y[t, slice] += scale[a] · B[a, slice] · (A[a, slice] · x[t]),  a = adapter of row t; -1: none

Rows are sorted by adapter as a mixture sorts tokens by expert. To shrink is a long sum for few outputs, so it is
cut into splits of a fixed size, and to expand adds them in their order: the same bits whatever shares the step.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; Chen et al., "Punica:
Multi-Tenant LoRA Serving", MLSys 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import routing
from kernels.triton.case import MODEL, Case, Draw, Expected, expect
from kernels.triton.configs import config
from kernels.triton.lang import dot, round_to
from kernels.triton.launch import launch
from kernels.triton.routing import Sorted, sort

SPLIT = 1024  # inputs that a program sums
UNIT = 16  # ranks are rounded up to whole ones
HIGHEST = 256


class Adapters(NamedTuple):
    """What some adapters add to one product, which may be of several matrices stacked: its slices.

    Attributes:
        a: [adapters, slices · rank, K]; rows past an adapter's own rank are not read.
        b: of each slice [adapters, N, rank].
        scales: float32 [adapters].
        ranks: int32 [adapters]: each one's own.
        rank: room for each, a multiple of UNIT.
    """

    a: Tensor
    b: tuple[Tensor, ...]
    scales: Tensor
    ranks: Tensor
    rank: int


def prepare(
    pairs: Sequence[Sequence[tuple[Tensor, Tensor] | None]],
    scales: Sequence[float],
    dtype: torch.dtype,
    device: str,
) -> Adapters:
    """Put adapters side by side.

    Args:
        pairs: of each adapter, for each slice, A [r, K] and B [N, r]; None: it changes nothing there.
        scales: of each adapter, such as its alpha through its rank.
        dtype: of activations.
        device: where.

    Raises:
        ValueError: a rank above HIGHEST.
    """
    ranks = [max((len(pair[0]) for pair in slices if pair), default=0) for slices in pairs]
    if max(ranks) > HIGHEST:
        raise ValueError(f"an adapter of rank {max(ranks)}; at most {HIGHEST}")
    rank = max(UNIT, triton.cdiv(max(ranks), UNIT) * UNIT)
    shapes = _shapes(pairs)
    a = torch.zeros(len(pairs), len(shapes), rank, shapes[0][0], dtype=dtype, device=device)
    b = tuple(torch.zeros(len(pairs), n, rank, dtype=dtype, device=device) for _, n in shapes)
    for at, slices in enumerate(pairs):
        for place, pair in enumerate(slices):
            if pair:
                a[at, place, : len(pair[0])] = pair[0].to(a)
                b[place][at, :, : pair[1].shape[1]] = pair[1].to(a)
    return Adapters(
        a.flatten(1, 2),
        b,
        torch.tensor(scales, dtype=torch.float32, device=device),
        torch.tensor(ranks, dtype=torch.int32, device=device),
        rank,
    )


def _shapes(pairs: Sequence[Sequence[tuple[Tensor, Tensor] | None]]) -> list[tuple[int, int]]:
    """Inputs and outputs of each slice."""
    columns = zip(*pairs, strict=True)
    return [next((pair[0].shape[1], len(pair[1])) for pair in column if pair) for column in columns]


@triton.jit(do_not_specialize=["rows"])
def _shrink(
    x_ptr,  # [rows, K]
    entries_ptr,  # int32 [tiles, BLOCK_M]
    tiles_ptr,  # int32 [tiles, 2]: adapter, rows filled
    ranks_ptr,  # int32 [adapters]
    a_ptr,  # [adapters, WIDTH, K]
    parts_ptr,  # float32 [splits, rows, WIDTH]
    rows,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_R of the ranks of one adapter over one tile of its rows and SPLIT inputs."""
    tile = tl.program_id(0)
    filled = tl.load(tiles_ptr + 2 * tile + 1)
    adapter = tl.load(tiles_ptr + 2 * tile).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R
    if filled == 0:
        return
    if r % RANK >= tl.load(ranks_ptr + adapter):
        return
    there = tl.arange(0, BLOCK_M) < filled
    row = tl.load(entries_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M), mask=there, other=0).to(tl.int64)
    offs_r = r + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    offs_k = split * SPLIT + tl.arange(0, BLOCK_K)
    a_ptr += ((adapter * WIDTH + offs_r) * K)[:, None] + offs_k[None, :]
    x_ptr += (row * K)[None, :] + offs_k[:, None]
    acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    for k in range(0, SPLIT, BLOCK_K):
        in_k = k + offs_k < K
        a = tl.load(a_ptr + k, mask=in_k[None, :], other=0.0)
        x = tl.load(x_ptr + k, mask=in_k[:, None] & there[None, :], other=0.0)
        acc = dot(a, x, acc)
    to = parts_ptr + ((split.to(tl.int64) * rows + row) * WIDTH)[None, :] + offs_r[:, None]
    tl.store(to, acc, mask=there[None, :])


@triton.jit
def _whole(at, mask, apart, SPLITS: tl.constexpr):
    """The sum of the parts of what begins at `at`, in their order; 0 where there is none."""
    total = tl.zeros(mask.shape, tl.float32)
    for split in range(SPLITS):
        total += tl.load(at + split * apart, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["rows", "width", "first"])
def _expand(
    parts_ptr,  # float32 [SPLITS, rows, width]
    entries_ptr,  # int32 [tiles, BLOCK_M]
    tiles_ptr,  # int32 [tiles, 2]: adapter, rows filled
    ranks_ptr,  # int32 [adapters]
    scales_ptr,  # float32 [adapters]
    b_ptr,  # [adapters, N, RANK]
    out_ptr,  # [rows, STRIDE], N of them
    rows,
    width,
    first,
    N: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_N outputs of one slice of one adapter over one tile of its rows."""
    tile = tl.program_id(0)
    filled = tl.load(tiles_ptr + 2 * tile + 1)
    if filled == 0:
        return
    adapter = tl.load(tiles_ptr + 2 * tile).to(tl.int64)
    own = tl.load(ranks_ptr + adapter)
    there = tl.arange(0, BLOCK_M) < filled
    row = tl.load(entries_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M), mask=there, other=0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_ptr += ((adapter * N + tl.minimum(n, N - 1)) * RANK)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for r in range(0, own, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        at = parts_ptr + (row * width)[None, :] + first + offs_r[:, None]
        inner = _whole(at, there[None, :] & (offs_r < own)[:, None], rows.to(tl.int64) * width, SPLITS)
        b = tl.load(b_ptr + offs_r[None, :])
        acc = dot(b, round_to(inner, b.dtype), acc)
    mask = (n < N)[:, None] & there[None, :]
    to = out_ptr + (row * STRIDE)[None, :] + n[:, None]
    y = tl.load(to, mask=mask, other=0.0).to(tl.float32) + acc * tl.load(scales_ptr + adapter)
    tl.store(to, round_to(y, out_ptr.dtype.element_ty), mask=mask)


def allocate(rows: int, adapters: int, device: torch.device, *, deterministic: bool) -> Sorted:
    """Room for rows sorted by adapter."""
    return routing.allocate(rows, adapters, _tile_rows(rows, deterministic), device)


def parts(rows: int, adapters: Adapters) -> Tensor:
    """Room for what rows become between the two products: float32 [splits, rows, slices · rank]."""
    return adapters.a.new_empty(
        triton.cdiv(adapters.a.shape[2], SPLIT), rows, adapters.a.shape[1], dtype=torch.float32
    )


def by_adapter(ids: Tensor, into: Sorted) -> None:
    """Sort rows by adapter, once for all products of a step: ids int32 [rows], -1: none."""
    sort(ids, len(into.entries) // max(1, len(into.tiles)), into)


def add_adapters(x: Tensor, adapters: Adapters, rows: Sorted, room: Tensor, out: Tensor) -> None:
    """Add what adapters say to a product's outputs.

    Args:
        x: [T, K], contiguous.
        adapters: of this product.
        rows: sorted by adapter.
        room: of `parts` for T rows.
        out: [T, sum of N], changed; its rows may be wider apart.
    """
    shrink(x, adapters, rows, room)
    expand(room, adapters, rows, out)


def shrink(x: Tensor, adapters: Adapters, rows: Sorted, room: Tensor) -> None:
    """Write A · x of each row's adapter in parts; see `add_adapters`."""
    _, width, inner = adapters.a.shape
    tiles = len(rows.tiles)
    if not tiles:
        return
    chosen = config("lora_shrink", len(rows.entries) // tiles)
    block_r = chosen.pop("BLOCK_R")
    while adapters.rank % block_r:
        block_r //= 2
    launch(
        _shrink,
        (tiles, width // block_r, room.shape[0]),
        x,
        rows.entries,
        rows.tiles,
        adapters.ranks,
        adapters.a,
        room,
        len(x),
        K=inner,
        WIDTH=width,
        RANK=adapters.rank,
        SPLIT=SPLIT,
        BLOCK_M=len(rows.entries) // tiles,
        BLOCK_R=block_r,
        **chosen,
    )


def expand(room: Tensor, adapters: Adapters, rows: Sorted, out: Tensor) -> None:
    """Add scale · B · the sum of parts, slice by slice; see `add_adapters`."""
    tiles, at = len(rows.tiles), 0
    if not tiles:
        return
    block_m = len(rows.entries) // tiles
    chosen = config("lora_expand", block_m)
    for place, b in enumerate(adapters.b):
        n = b.shape[1]
        launch(
            _expand,
            (tiles, triton.cdiv(n, chosen["BLOCK_N"])),
            room,
            rows.entries,
            rows.tiles,
            adapters.ranks,
            adapters.scales,
            b,
            out[:, at : at + n],
            room.shape[1],
            room.shape[2],
            place * adapters.rank,
            N=n,
            RANK=adapters.rank,
            SPLITS=room.shape[0],
            STRIDE=out.stride(0),
            BLOCK_M=block_m,
            BLOCK_R=UNIT if adapters.rank % 32 else 32,
            **chosen,
        )
        at += n


def _tile_rows(rows: int, deterministic: bool) -> int:
    return config("lora_fixed" if deterministic else "lora", rows)["BLOCK_M"]


def reference(
    x: Tensor,
    pairs: Sequence[Sequence[tuple[Tensor, Tensor] | None]],
    scales: Sequence[float],
    ids: Tensor,
    y: Tensor,
) -> Tensor:
    """In float64, but that A · x has the type of x."""
    out, at = y.double(), 0
    for place, (_, width) in enumerate(_shapes(pairs)):
        for row, adapter in enumerate(ids.tolist()):
            pair = pairs[adapter][place] if adapter >= 0 else None
            if pair:
                inner = (pair[0].double() @ x[row].double()).to(x.dtype).double()
                out[row, at : at + width] += scales[adapter] * (pair[1].double() @ inner)
        at += width
    return out


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Few and many rows, of which some ask nobody; ranks of each size; slices of one product."""
    if scale == MODEL:
        for rows in (1, 16, 256):
            yield _case(draw, torch.bfloat16, rows, 4096, (4096, 1024, 1024), (16, 64, 16, 8))
        yield _case(draw, torch.bfloat16, 256, 4096, (14336, 14336), (256,))
        return
    yield _case(draw, torch.bfloat16, 7, 1100, (40, 16), (1, 8, 17))
    yield _case(draw, torch.float32, 3, 64, (33,), (16, 2))
    yield _case(draw, torch.bfloat16, 2, 48, (64,), (256,))


def _case(
    draw: Draw, dtype: torch.dtype, rows: int, inner: int, widths: tuple[int, ...], ranks: tuple[int, ...]
) -> Case:
    x, y = draw.normal(rows, inner, dtype=dtype), draw.normal(rows, sum(widths), dtype=dtype)
    ids = draw.integers(-1, len(ranks), rows, dtype=torch.int32)
    pairs = [
        [
            (
                draw.normal(rank, inner + place, dtype=dtype, scale=inner**-0.5)[:, :inner],
                draw.normal(width, rank, dtype=dtype),
            )
            for place, width in enumerate(widths)
        ]
        for rank in ranks
    ]
    scales = [2.0 / rank for rank in ranks]
    adapters = prepare(pairs, scales, dtype, draw.device)

    def run() -> tuple[Tensor, ...]:
        out = y.clone()
        sorted_rows = allocate(rows, len(ranks), x.device, deterministic=False)
        by_adapter(ids, sorted_rows)
        add_adapters(x, adapters, sorted_rows, parts(rows, adapters), out)
        return (out,)

    def expected() -> tuple[Expected, ...]:
        return (expect(reference(x, pairs, scales, ids, y), dtype),)

    weights = sum((inner + width) * max(ranks) for width in widths) * min(rows, len(ranks))
    flops = 2 * rows * sum((inner + width) * max(ranks) for width in widths)
    name = f"{rows} rows {inner} x {widths} of ranks {ranks} {dtype}"
    return Case(name, run, expected, weights * dtype.itemsize + x.nbytes + 2 * y.nbytes, flops, "bfloat16")
