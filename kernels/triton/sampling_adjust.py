"""Bans, bias and penalties of single logits, entry by entry, in a float64 copy from which tokens are then drawn.

    x = x + bias;  x = (x / r if x > 0 else x · r) - t;  x = min(x, 1e300);  x = -inf where banned

A row whose every token is banned takes the likeliest as if none were. An entry of row -1 is none, so that lists
may be filled up to a fixed length.

Source: `kernels.sampling`; Keskar et al., "CTRL", 2019 (repetition penalty).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import Adjustments, Sampling
from kernels.sampling import sample as sample_exactly
from kernels.triton.case import MODEL, Case, Draw, Expected
from kernels.triton.launch import launch
from kernels.triton.sampling import Drawn, Workspace, draw, make_drawn, make_workspace, scan

_BAN, _ADD, _PENALISE = range(3)
_ENTRIES, _COPIED = 256, 4096  # of one program


@triton.jit(do_not_specialize=["stride"])
def _widen(
    logits_ptr,  # [rows, VOCABULARY]
    stride,
    wide_ptr,  # float64 [rows, VOCABULARY]
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A part of a row in float64."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < VOCABULARY
    x = tl.load(logits_ptr + row * stride + at, mask=inside, other=0.0)
    tl.store(wide_ptr + row * VOCABULARY + at, x.to(tl.float64), mask=inside)


@triton.jit(do_not_specialize=["entries"])
def _change(
    wide_ptr,  # float64 [rows, VOCABULARY]
    rows_ptr,  # int64 [entries]
    tokens_ptr,  # int64 [entries]
    first_ptr,  # float64 [entries]: bias, or divisor; none of bans
    second_ptr,  # float64 [entries]: what a penalty takes off
    entries,
    VOCABULARY: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some entries, none of which names what another does."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + at, mask=at < entries, other=-1)
    token = tl.load(tokens_ptr + at, mask=at < entries, other=0)
    real = (row >= 0) & (token < VOCABULARY)
    x_ptr = wide_ptr + row * VOCABULARY + token
    if KIND == 0:
        tl.store(x_ptr, tl.zeros([BLOCK], tl.float64) + float("-inf"), mask=real)
    else:
        x = tl.load(x_ptr, mask=real, other=0.0)
        first = tl.load(first_ptr + at, mask=real, other=1.0)
        if KIND == 1:
            x += first
        else:
            x = tl.where(x > 0, x / first, x * first) - tl.load(second_ptr + at, mask=real, other=0.0)
        tl.store(x_ptr, x, mask=real)


def adjust(logits: Tensor, adjustments: Adjustments, wide: Tensor) -> None:
    """Write the logits to `wide`, adjusted, but for the bound 1e300, which who reads them keeps.

    Args:
        logits: float32 [P, vocabulary]; its rows may lie apart.
        adjustments: on the same device; entries of row -1 are passed over.
        wide: float64 [P or more, vocabulary], contiguous.
    """
    rows, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, _COPIED)
    launch(
        _widen, (rows, blocks), logits, logits.stride(0), wide, VOCABULARY=vocabulary, BLOCK=_COPIED, num_warps=8
    )
    banned, bias, penalties = adjustments
    _start(wide, _ADD, bias[0], bias[1], bias[2], None)
    _start(wide, _PENALISE, *penalties)
    _start(wide, _BAN, banned[0], banned[1], None, None)


def _start(
    wide: Tensor, kind: int, rows: Tensor, tokens: Tensor, first: Tensor | None, second: Tensor | None
) -> None:
    launch(
        _change, (triton.cdiv(len(rows), _ENTRIES),), wide, rows, tokens, first, second, len(rows),
        VOCABULARY=wide.shape[-1], KIND=kind, BLOCK=_ENTRIES, num_warps=4,
    )  # fmt: skip


def sample_adjusted(logits: Tensor, sampling: Sampling, workspace: Workspace, wide: Tensor, out: Drawn) -> None:
    """Draw as `sampling.sample` does, from adjusted logits.

    Args:
        logits: float32 [P, vocabulary].
        sampling: with adjustments, all on the same device.
        workspace: for P rows or more.
        wide: float64 [P or more, vocabulary], to work in.
        out: of P rows or more.
    """
    if sampling.adjustments is None:
        raise ValueError("there are no adjustments to make")
    scan(logits, workspace, out)
    adjust(logits, sampling.adjustments, wide)
    adjusted = wide[: len(logits)]
    scan(adjusted, workspace, out, again=True)
    draw(adjusted, sampling, workspace, out)


def reference(logits: Tensor, sampling: Sampling) -> Tensor:
    """Tokens, by sorting in float64."""
    return torch.tensor(sample_exactly(logits.cpu(), sampling).token_ids)


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Adjusted rows of every kind, beside one that is not and one all of whose tokens are banned."""
    for rows, vocabulary in [(64, 128256)] if scale == MODEL else [(24, 300)]:
        yield _case(draw, rows, vocabulary)


def _case(draw: Draw, rows: int, vocabulary: int) -> Case:
    logits = draw.normal(rows, vocabulary, dtype=torch.float32, scale=3.0)
    kind = torch.arange(rows)
    entries = _entries(rows, vocabulary)
    given = Sampling(
        temperature=0.5 * (kind % 3).double(),
        top_k=torch.tensor([0, 9])[kind % 2],
        top_p=torch.tensor([1.0, 0.9, 1.0], dtype=torch.float64)[kind % 3],
        uniform=(kind.double() + 0.5) / rows,
        min_p=torch.tensor([0.0, 0.01], dtype=torch.float64)[kind % 2],
        adjustments=entries,
    )
    sampling = Sampling(
        temperature=draw.given(given.temperature),
        top_k=draw.given(given.top_k),
        top_p=draw.given(given.top_p),
        uniform=draw.given(given.uniform),
        min_p=draw.given(given.min_p),
        adjustments=Adjustments(*(tuple(map(draw.given, part)) for part in entries)),  # type: ignore[arg-type]  # as many as there are
    )

    def run() -> tuple[Tensor, ...]:
        out, workspace = make_drawn(rows, draw.device), make_workspace(rows, vocabulary, draw.device)
        wide = torch.empty(logits.shape, dtype=torch.float64, device=draw.device)
        sample_adjusted(logits, sampling, workspace, wide, out)
        return (out.tokens,)

    def expected() -> tuple[Expected, ...]:
        return (Expected(reference(logits, given).double(), None),)

    return Case(f"sample adjusted {rows} x {vocabulary}", run, expected, logits.nbytes)


def _entries(rows: int, vocabulary: int) -> Adjustments:
    """Some of each; the last row has none, the first one's tokens are all banned."""
    made = torch.Generator().manual_seed(1)
    row = torch.arange(rows - 1).repeat_interleave(20)
    token = torch.cat([torch.randperm(vocabulary, generator=made)[:20] for _ in range(rows - 1)])
    size = len(row)
    first = torch.zeros(vocabulary, dtype=torch.int64), torch.arange(vocabulary)
    others = row > 0
    banned = torch.cat([first[0], row[others][::3]]), torch.cat([first[1], token[others][::3]])
    bias = 4 * torch.randn(size, generator=made).double()
    divisors = 0.5 + torch.rand(size, generator=made).double()
    return Adjustments(banned, (row, token, bias), (row, token, divisors, bias.roll(1) / 3))
