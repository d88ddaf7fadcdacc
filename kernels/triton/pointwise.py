"""What touches each number once: adding the residual, reading rows of a table, and finishing logits.

    add      x · scale + residual
    gather   table[row] · scale
    finish   cap · tanh(logit · scale / cap), or logit · scale

Source: Gemma Team, "Gemma 2", 2024 (embeddings scaled in their own number type; soft-capped logits).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.case import MODEL, Case, Draw, Expected, expect
from kernels.triton.configs import config
from kernels.triton.functions import soft_cap
from kernels.triton.lang import round_to
from kernels.triton.launch import launch


@triton.jit(do_not_specialize=["size"])
def _add(
    x_ptr,  # [size]
    residual_ptr,  # [size]
    out_ptr,  # [size], may be either
    scale,
    size,
    BLOCK: tl.constexpr,
):
    """A block of numbers a program."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) * scale
    x += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, round_to(x, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gather(
    table_ptr,  # [n, WIDTH]
    rows_ptr,  # int32 or int64 [picked]
    out_ptr,  # [picked, WIDTH]
    scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Part of a row a program."""
    to = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + to).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < WIDTH
    x = tl.load(table_ptr + row * WIDTH + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + to * WIDTH + offs, round_to(x * scale, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"])
def _finish(
    x_ptr,  # [size]
    out_ptr,  # float32 [size], may be x
    scale,
    cap,
    size,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of numbers a program."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) * scale
    if HAS_CAP:
        x = soft_cap(x, cap)
    tl.store(out_ptr + offs, round_to(x, out_ptr.dtype.element_ty), mask=mask)


def add(x: Tensor, residual: Tensor, scale: float, out: Tensor) -> None:
    """Write x·scale + residual; all contiguous and of one size, `out` may be either."""
    size = x.numel()
    chosen = config("add", size)
    launch(_add, (triton.cdiv(size, chosen["BLOCK"]),), x, residual, out, float(scale), size, **chosen)


def embed(table: Tensor, token_ids: Tensor, scale: float, out: Tensor) -> None:
    """Write table[token_ids] · scale, which is first rounded to the table's number type.

    Args:
        table: [vocabulary, hidden], contiguous.
        token_ids: int32 or int64 [T], all within the table.
        scale: of the numbers.
        out: [T, hidden], contiguous.
    """
    _rows(table, token_ids, float(torch.tensor(scale, dtype=table.dtype)), out)


def pick(x: Tensor, rows: Tensor, out: Tensor) -> None:
    """Write x[rows] for rows int32 or int64 [P] within x [T, width]; out [P, width]; x and out contiguous."""
    _rows(x, rows, 1.0, out)


def _rows(table: Tensor, rows: Tensor, scale: float, out: Tensor) -> None:
    picked, width = out.shape
    chosen = config("gather", width)
    grid = (picked, triton.cdiv(width, chosen["BLOCK"]))
    launch(_gather, grid, table, rows, out, scale, WIDTH=width, **chosen)


def finish_logits(x: Tensor, scale: float, softcap: float, out: Tensor) -> None:
    """Write softcap · tanh(x · scale / softcap), or x · scale where softcap is 0.

    Args:
        x: [P, vocabulary], contiguous, float32 or bfloat16.
        scale: of the logits.
        softcap: the largest size of a logit; 0: none.
        out: float32, as x; may be x.
    """
    size = x.numel()
    chosen = config("finish", size)
    grid = (triton.cdiv(size, chosen["BLOCK"]),)
    launch(_finish, grid, x, out, float(scale), float(softcap or 1.0), size, HAS_CAP=softcap != 0, **chosen)


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Each with sizes that fill a block, and that fill none."""
    is_model = scale == MODEL
    for size in [(1, 4096), (256, 4096)] if is_model else [(3, 700), (1, 1)]:
        for dtype in (torch.bfloat16, torch.float32):
            yield _add_case(draw, dtype, *size)
    for count, width in [(1, 4096), (256, 4096)] if is_model else [(5, 1500), (1, 3)]:
        yield _gather_case(draw, torch.bfloat16, 128256 if is_model else 50, count, width)
    yield _gather_case(draw, torch.float32, 50, 3, 64)
    for rows, width in [(1, 128256), (64, 128256)] if is_model else [(3, 1001)]:
        for cap in (0.0, 30.0):
            for dtype in (torch.bfloat16, torch.float32):
                yield _finish_case(draw, dtype, rows, width, cap)


def _add_case(draw: Draw, dtype: torch.dtype, rows: int, width: int) -> Case:
    x, residual = draw.normal(rows, width, dtype=dtype), draw.normal(rows + 1, width, dtype=dtype)[1:]

    def run() -> tuple[Tensor, ...]:
        out = torch.empty_like(x)
        add(x, residual, 0.22, out)
        return (out,)

    def expected() -> tuple[Expected, ...]:
        return (expect(x.double() * 0.22 + residual.double(), dtype),)

    return Case(f"add {rows} x {width} {dtype}", run, expected, 3 * x.nbytes)


def _gather_case(draw: Draw, dtype: torch.dtype, vocabulary: int, count: int, width: int) -> Case:
    table, ids = (
        draw.normal(vocabulary, width, dtype=dtype),
        draw.integers(0, vocabulary, count, dtype=torch.int32),
    )
    scale = 59.87  # bfloat16 has 60

    def run() -> tuple[Tensor, ...]:
        out, rows = table.new_empty(count, width), table.new_empty(count, width)
        embed(table, ids, scale, out)
        pick(table, ids.long(), rows)
        return out, rows

    def expected() -> tuple[Expected, ...]:
        plain = table[ids.long()]
        scaled = plain.double() * torch.tensor(scale, dtype=dtype).double().item()
        return expect(scaled, dtype), Expected(plain, None)

    return Case(
        f"gather {count} of {vocabulary} x {width} {dtype}", run, expected, 4 * count * width * dtype.itemsize
    )


def _finish_case(draw: Draw, dtype: torch.dtype, rows: int, width: int, cap: float) -> Case:
    x = draw.normal(rows, width, dtype=dtype, scale=30.0)

    def run() -> tuple[Tensor, ...]:
        out = torch.empty_like(x, dtype=torch.float32)
        finish_logits(x, 0.7, cap, out)
        return (out,)

    def expected() -> tuple[Expected, ...]:
        logits = x.double() * 0.7
        return (expect(torch.tanh(logits / cap) * cap if cap else logits, torch.float32),)

    return Case(f"finish {rows} x {width} {dtype} cap {cap:g}", run, expected, x.nbytes + rows * width * 4)
