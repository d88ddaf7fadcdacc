"""Draws of steps in memory that stays where it is: parameters sent at once, tokens read when they are wanted.

A step may begin before the tokens of the one before are read: a token id below 0 stands for what was drawn in a
place of that step, and is taken from there on the device.

    id < 0: token_ids[i] = drawn[-1 - id]

Source: `kernels.triton.sampling`, whose kernels draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import Adjustments, Draw, Sampling
from kernels.triton.case import Case, Expected
from kernels.triton.case import Draw as Given
from kernels.triton.launch import launch
from kernels.triton.sampling import Drawn, make_workspace, sample
from kernels.triton.sampling_adjust import sample_adjusted

_BLOCK = 256
_GREEDY = (0.0, 0.0, 1.0, 0.0, 0.0)  # temperature, top_k, top_p, uniform, min_p
_ALIGNED = (
    4  # rows; so that what lies in one piece begins at multiples of 16 bytes, which kernels are compiled for
)
_IN_FLIGHT = 2  # draws on their way to or from the device


def _take_jit(
    token_ids_ptr,  # int32 [tokens]
    drawn_ptr,  # int32 [places]
    tokens,
    BLOCK: tl.constexpr,
):
    """Some tokens a program."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(token_ids_ptr + offs, mask=offs < tokens, other=0)
    named = (offs < tokens) & (ids < 0)
    tl.store(token_ids_ptr + offs, tl.load(drawn_ptr + (-1 - ids), mask=named, other=0), mask=named)


_take = triton.jit(_take_jit, do_not_specialize=["tokens"])


def take(token_ids: Tensor, drawn: Tensor) -> None:
    """Put what was drawn in the places of ids below 0.

    Args:
        token_ids: int32 [T], contiguous; -1 - i names place i.
        drawn: int32 [places].
    """
    tokens = len(token_ids)
    launch(_take, (triton.cdiv(tokens, _BLOCK),), token_ids, drawn, tokens, BLOCK=_BLOCK, num_warps=4)


class Drawing:
    """Draws for at most so many rows.

    Args:
        rows: of a step.
        vocabulary: numbers of a row of logits.
        device: where they are.

    Attributes:
        rows: that it has room for.
        vocabulary: as given.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        rows = -(-rows // _ALIGNED) * _ALIGNED
        self.rows, self.vocabulary = rows, vocabulary
        self._device = device
        self._workspace = make_workspace(rows, vocabulary, device)
        self._drawn = torch.zeros(2, rows, dtype=torch.int32, device=device)
        self._given = torch.tensor(_GREEDY, dtype=torch.float64).repeat(rows, 1).T.contiguous().to(device)
        self._here = [_Here(rows, device) for _ in range(_IN_FLIGHT)] if device.type != "meta" else []
        self._turn = 0

    @property
    def tokens(self) -> Tensor:
        """What was drawn last, int32 [rows]."""
        return self._drawn[0]

    def send(self, sampling: Sampling, places: Sequence[int]) -> None:
        """Copy how to draw to the device; rows that are in no place take the likeliest token.

        Args:
            sampling: of some rows, on the host.
            places: of these among the rows of logits.
        """
        if self._here:
            self._turn = (self._turn + 1) % len(self._here)
            self._given.copy_(self._here[self._turn].parameters(sampling, places), non_blocking=True)

    def draw(self, logits: Tensor) -> None:
        """Draw for the first rows, those of `logits` float32 [P, vocabulary], with what was sent."""
        count = len(logits)
        sample(logits, self._sampling(count), self._workspace, self._out(count))

    def draw_adjusted(self, logits: Tensor, adjustments: Adjustments) -> None:
        """The same from adjusted logits; `adjustments` name rows of `logits`, and are on the host."""
        count, wide = len(logits), torch.empty_like(logits, dtype=torch.float64)
        there = Adjustments(*(tuple(part.to(self._device) for part in entries) for entries in adjustments))  # type: ignore[arg-type]  # as long as before
        sample_adjusted(
            logits, self._sampling(count)._replace(adjustments=there), self._workspace, wide, self._out(count)
        )

    def warm_up(self, logits: Tensor) -> None:
        """Start every kernel once, over some logits."""
        nobody, number = torch.full((1,), -1), torch.ones(1, dtype=torch.float64)
        none = nobody, torch.zeros(1, dtype=torch.int64)
        self.draw(logits)
        self.draw_adjusted(logits, Adjustments(none, (*none, number), (*none, number, number)))
        take(self._drawn[1], self.tokens)

    def read(self, places: Sequence[int]) -> Callable[[], Draw]:
        """What was drawn in some places; the call waits for it, and holds until the draw after the next."""
        here = self._here[self._turn]
        here.receive(self._drawn)
        return lambda: here.drawn(places)

    def _sampling(self, count: int) -> Sampling:
        temperature, top_k, top_p, uniform, min_p = self._given[:, :count]
        return Sampling(temperature, top_k.view(torch.int64), top_p, uniform, min_p)

    def _out(self, count: int) -> Drawn:
        return Drawn(*self._drawn[:, :count])


class _Here:
    """Parameters on their way to the device, and tokens on their way back."""

    def __init__(self, rows: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        greedy = torch.tensor(_GREEDY, dtype=torch.float64)
        self._given = torch.empty(len(greedy), rows, dtype=torch.float64, pin_memory=is_cuda)
        self._greedy = greedy[:, None]
        self._drawn = torch.empty(2, rows, dtype=torch.int32, pin_memory=is_cuda)
        self._done = torch.cuda.Event() if is_cuda else None

    def parameters(self, sampling: Sampling, places: Sequence[int]) -> Tensor:
        """As they are to lie on the device; whoever wants the tokens has waited for the draw before the last."""
        self._wait()
        self._given.copy_(self._greedy)
        temperature, top_k, top_p, uniform, min_p, _ = sampling
        chosen = torch.stack([temperature, top_k.view(torch.float64), top_p, uniform, min_p])
        self._given[:, torch.tensor(places)] = chosen
        return self._given

    def receive(self, drawn: Tensor) -> None:
        """Begin to copy what was drawn."""
        self._drawn.copy_(drawn, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def drawn(self, places: Sequence[int]) -> Draw:
        """What was received."""
        self._wait()
        tokens, finite = self._drawn.tolist()
        return Draw([tokens[place] for place in places], [finite[place] != 0 for place in places])

    def _wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()


def cases(draw: Given, scale: str) -> Iterator[Case]:
    """Some tokens are named, and some are not."""
    drawn = draw.given(torch.tensor([7, 8, 9], dtype=torch.int32))
    given = draw.given(torch.tensor([5, -1, -3, 0, -3, -2, 6], dtype=torch.int32))

    def run() -> tuple[Tensor, ...]:
        token_ids = given.clone()
        take(token_ids, drawn)
        return (token_ids,)

    def expected() -> tuple[Expected, ...]:
        return (Expected(torch.tensor([5, 7, 9, 0, 9, 8, 6]).double(), None),)

    yield Case(f"take 7 tokens of 3 ({scale})", run, expected, 2 * given.nbytes)
