"""One token from each row of logits on the device, the very one that `kernels.sampling` draws, without a sort.

A row is looked through in chunks by many programs: its highest logit, then the weights exp((logit - highest) / t)
in float64, summed by chunk. A row that draws from all tokens, or from those above min-p, finds its token in the
order of ids from these sums. A row cut by top-k or top-p finds it in the order of ranks (`sampling_ranks`), mostly
in a short list of its likeliest tokens (`sampling_stages`). Where the list does not hold what the cut keeps, or is
longer than its place, the whole row is searched.

Every sum has one order and there are no atomics: a row's token does not depend on the rows beside it. It differs
from that of `kernels.sampling` only where a random number lies as near a border as rounding in float64 moves one.
All sizes follow from those of the logits, and no number is read back, so that a CUDA graph can hold it all.

Source: `kernels.sampling`; Park et al., "Qrita: High-performance Top-k and Top-p Algorithm for GPUs using
Pivot-based Truncation and Selection", 2026 (arXiv 2602.01518); Devroye 1986, chapter III.2 (inverse transform).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels.ops import Sampling
from kernels.sampling import sample as sample_exactly
from kernels.triton.case import MODEL, Case, Draw, Expected
from kernels.triton.configs import config
from kernels.triton.launch import launch
from kernels.triton.sampling_choice import choose_tokens
from kernels.triton.sampling_stages import gather_segments, scan_chunks, settle_rows, weigh_chunks

LISTED = 4096  # longest list of a row; a smaller vocabulary is searched whole
_SUB = 64  # tokens of which the highest is kept, to find the pivot
_REACHING = 1024  # such blocks reach it
_GATHERED = 128  # of which a program puts so many in their places
_SHARE = 4  # a chunk may list one of so many of its tokens


class Workspace(NamedTuple):
    """What the kernels of a draw tell each other; for P rows of C chunks.

    Attributes:
        maxima: float64 [P, C].
        places: int32 [P, C], tokens that have them.
        sound: int32 [P, C], 1 where all logits are finite.
        tops: float32 [P, C · chunk / 64], the highest of each block of 64 tokens.
        highest: float64 [P].
        pivot: float32 [P].
        masses: float64 [P, C], weights.
        listed: float64 [P, C], weights of what is listed.
        counts: int32 [P, C], tokens that are listed.
        segments: int32 [P, C, chunk / 4], these tokens.
        ids: int32 [P, LISTED], all of them one after another.
    """

    maxima: Tensor
    places: Tensor
    sound: Tensor
    tops: Tensor
    highest: Tensor
    pivot: Tensor
    masses: Tensor
    listed: Tensor
    counts: Tensor
    segments: Tensor
    ids: Tensor


class Drawn(NamedTuple):
    """What is drawn.

    Attributes:
        tokens: int32 [P]; of a row that is not finite, any token of the vocabulary.
        finite: int32 [P]; 1 where all logits were.
    """

    tokens: Tensor
    finite: Tensor


def make_workspace(rows: int, vocabulary: int, device: torch.device | str) -> Workspace:
    """For at most so many rows."""
    size = _Size(vocabulary)
    chunks, chunk = size.chunks, size.chunk

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros((rows, *shape), dtype=dtype, device=device)

    return Workspace(
        maxima=new(torch.float64, chunks),
        places=new(torch.int32, chunks),
        sound=new(torch.int32, chunks),
        tops=new(torch.float32, chunks * chunk // _SUB),
        highest=new(torch.float64),
        pivot=new(torch.float32),
        masses=new(torch.float64, chunks),
        listed=new(torch.float64, chunks),
        counts=new(torch.int32, chunks),
        segments=new(torch.int32, chunks, chunk // _SHARE),
        ids=new(torch.int32, LISTED),
    )


def make_drawn(rows: int, device: torch.device | str) -> Drawn:
    """For so many rows."""
    return Drawn(*(torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(2)))


def sample(logits: Tensor, sampling: Sampling, workspace: Workspace, out: Drawn) -> None:
    """Draw one token for each row, and tell which rows are finite.

    Args:
        logits: float32 [P, vocabulary]; its rows may lie apart.
        sampling: tensors on the same device, without adjustments, which `sampling_adjust` makes.
        workspace: for P rows or more.
        out: of P rows or more.
    """
    scan(logits, workspace, out)
    draw(logits, sampling, workspace, out)


def scan(logits: Tensor, workspace: Workspace, out: Drawn, again: bool = False) -> None:
    """Find each row's highest logit with its token, and whether all are finite.

    Args:
        logits: float32 or float64 [P, vocabulary].
        workspace: for P rows or more.
        out: of P rows or more.
        again: the logits are adjusted: who was finite is known, and a row of -inf alone keeps its token.
    """
    rows, size, work = len(logits), _Size(logits.shape[-1]), workspace
    blocks, tops = triton.cdiv(rows, size.rows), size.chunks * size.chunk // _SUB
    launch(
        scan_chunks, (blocks, size.chunks), logits, logits.stride(0), work.maxima, work.places, work.sound,
        work.tops, rows, VOCABULARY=size.vocabulary, CHUNKS=size.chunks, CHUNK=size.chunk, SUB=_SUB,
        LISTED=size.listed, ROWS=size.rows, num_warps=8,
    )  # fmt: skip
    launch(
        settle_rows, (blocks,), work.maxima, work.places, work.sound, work.tops, work.highest, work.pivot,
        out.tokens, out.finite, rows, CHUNKS=size.chunks, TOPS=tops, REACHING=min(_REACHING, tops // 2),
        AGAIN=again, LISTED=size.listed, ROWS=size.rows, WIDTH=size.width,
        MANY=triton.next_power_of_2(tops), num_warps=8,
    )  # fmt: skip


def draw(logits: Tensor, sampling: Sampling, workspace: Workspace, out: Drawn) -> None:
    """Put a drawn token in the place of the likeliest where a row asks for one; after `scan`."""
    rows, size, work = len(logits), _Size(logits.shape[-1]), workspace
    temperature, top_k, top_p, uniform, min_p, _ = sampling
    blocks, segment = triton.cdiv(rows, size.rows), size.chunk // _SHARE
    launch(
        weigh_chunks, (blocks, size.chunks), logits, logits.stride(0), temperature, top_k, top_p, min_p,
        work.highest, out.finite, work.pivot, work.masses, work.listed, work.counts, work.segments, rows,
        VOCABULARY=size.vocabulary, CHUNKS=size.chunks, CHUNK=size.chunk, SEGMENT=segment, LISTED=size.listed,
        ROWS=size.rows, num_warps=4,
    )  # fmt: skip
    if size.listed:
        launch(
            gather_segments, (blocks, LISTED // _GATHERED), work.counts, work.segments, temperature, top_k, top_p,
            work.highest, out.finite, work.ids, rows, CHUNKS=size.chunks, SEGMENT=segment, LISTED=LISTED,
            ROWS=size.rows, BLOCK=_GATHERED, WIDTH=size.width, num_warps=8,
        )  # fmt: skip
    launch(
        choose_tokens, (blocks,), logits, logits.stride(0), temperature, top_k, top_p, uniform, min_p,
        work.highest, out.finite, work.masses, work.listed, work.counts, work.ids, out.tokens, rows,
        VOCABULARY=size.vocabulary, CHUNKS=size.chunks, CHUNK=size.chunk, SEGMENT=segment, LISTED=size.listed,
        ROWS=size.rows, BLOCK=size.block, WIDTH=size.width, num_warps=size.warps,
    )  # fmt: skip


class _Size:
    """How a vocabulary is cut up."""

    def __init__(self, vocabulary: int) -> None:
        chosen = config("sample", vocabulary)
        self.vocabulary = vocabulary
        self.rows, self.warps = chosen["ROWS"], chosen["num_warps"]
        self.chunk, self.block = chosen["CHUNK"], chosen["BLOCK"]
        self.chunks = triton.cdiv(vocabulary, self.chunk)
        self.width = triton.next_power_of_2(self.chunks)
        self.listed = LISTED if vocabulary > LISTED else 0


def reference(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens and finiteness, by sorting in float64."""
    temperature, top_k, top_p, uniform, min_p, _ = sampling
    given = Sampling(temperature.cpu(), top_k.cpu(), top_p.cpu(), uniform.cpu(), min_p.cpu())
    found = sample_exactly(logits.cpu(), given)
    return torch.tensor(found.token_ids), torch.tensor(found.finite)


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Rows of every kind side by side: greedy, drawn from all, cut by each of the parameters."""
    sizes = [(1, 128256), (64, 128256)] if scale == MODEL else [(24, 300), (6, 5000)]
    for rows, vocabulary in sizes:
        yield _case(draw, rows, vocabulary)


def _case(draw: Draw, rows: int, vocabulary: int) -> Case:
    logits = draw.normal(rows, vocabulary, dtype=torch.float32, scale=3.0)
    kind = torch.arange(rows)
    sampling = Sampling(
        temperature=draw.given(0.4 * (kind % 5).double()),
        top_k=draw.given(torch.tensor([0, 1, 7, 0, 40, 2000])[kind % 6]),
        top_p=draw.given(torch.tensor([1.0, 0.3, 1.0, 0.95], dtype=torch.float64)[kind % 4]),
        uniform=draw.uniform(0, 1, rows, dtype=torch.float64),
        min_p=draw.given(torch.tensor([0.0, 0.0, 0.02], dtype=torch.float64)[kind % 3]),
    )

    def run() -> tuple[Tensor, ...]:
        workspace, out = make_workspace(rows, vocabulary, draw.device), make_drawn(rows, draw.device)
        sample(logits, sampling, workspace, out)
        return out.tokens, out.finite

    def expected() -> tuple[Expected, ...]:
        return tuple(Expected(part.double(), None) for part in reference(logits, sampling))

    return Case(f"sample {rows} x {vocabulary}", run, expected, logits.nbytes)
