"""Matrices rounded to few bits: plainly, or so that later columns make up for the rounding of earlier ones.

With error feedback the columns of W are rounded one after another, and what a column's rounding changes of W·x for
the inputs x of a calibration text is taken off the columns still to come. The scale of each group of columns is
chosen among several for the least error.

Source: Frantar et al., "GPTQ", ICLR 2023, sections 3 and 4 (column blocks, Cholesky, damping); Hassibi et al.,
"Optimal Brain Surgeon", 1993.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from engine.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 128  # columns whose updates wait for one product, where no group is larger
_DAMPING = 0.01  # of the mean of H's diagonal, added to it; more where it is not enough
_MOST_DAMPING = 10.0
_SHRINKS = tuple(1 - i / 40 for i in range(21))  # of a group's range, that are tried: 1 to 0.5


class Grid(NamedTuple):
    """What numbers are rounded to.

    Attributes:
        bits: 4 or 8.
        group: columns that share a scale; 0: all.
        symmetric: no zeros; codes of int4 then stand for themselves less 8.
    """

    bits: int
    group: int
    symmetric: bool

    @property
    def lowest(self) -> int:
        """Of a code, as it is computed with: of a symmetric grid signed."""
        return (-127 if self.bits == 8 else -8) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """Of a code."""
        return (1 << self.bits - 1) - 1 if self.symmetric else (1 << self.bits) - 1


class Rounded(NamedTuple):
    """A rounded matrix: w = (codes - zeros) · scales, zeros none of a symmetric one.

    Attributes:
        codes: int8 or int16 [out, in], from the grid's lowest to its highest.
        scales: float32 [out, groups].
        zeros: float32 [out, groups], or None.
        group: columns that share a scale.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int

    def plain(self) -> Tensor:
        """The matrix in float32."""
        values = self.codes.float()
        if self.zeros is not None:
            values = values - self._spread(self.zeros)
        return values * self._spread(self.scales)

    def _spread(self, parts: Tensor) -> Tensor:
        return parts.repeat_interleave(self.group, 1)[:, : self.codes.shape[1]]


def round_plainly(weight: Tensor, grid: Grid) -> Rounded:
    """Each number to the nearest; the range of a group is that of its numbers.

    Args:
        weight: float32 [out, in].
        grid: to round to.

    Raises:
        EngineError: WEIGHTS_INVALID, a number is not finite or a scale beyond its number type.
    """
    group = grid.group or weight.shape[1]
    parts = [_range(some, grid, 1.0) for some in torch.split(weight, group, 1)]
    scales = torch.stack([scale for scale, _ in parts], 1)
    zeros = None if grid.symmetric else torch.stack([zero for _, zero in parts], 1)
    codes = torch.cat(
        [_codes(some, *part, grid) for some, part in zip(torch.split(weight, group, 1), parts, strict=True)], 1
    )
    _check(weight, scales)
    return Rounded(codes.to(torch.int8), scales, zeros, group)


def round_with_feedback(weight: Tensor, gram: Tensor, grid: Grid) -> Rounded:
    """Rounded for the least change of its products with the inputs that `gram` is of.

    Args:
        weight: float32 [out, in].
        gram: float32 [in, in], the sum of x·xᵀ over inputs x.
        grid: to round to.

    Raises:
        EngineError: WEIGHTS_INVALID, a number is not finite or a scale beyond its number type.
    """
    left = weight.clone()
    columns = weight.shape[1]
    inverse = _inverse_root(gram)
    importance = gram.diagonal().clamp_min(1e-12 * float(gram.diagonal().max()) + 1e-30)
    group = grid.group or columns
    step = group if grid.group else min(_BLOCK, columns)
    scales, zeros, codes = [], [], torch.empty(weight.shape, dtype=torch.int8)
    for begin in range(0, columns, step):
        end = min(begin + step, columns)
        if begin % group == 0:
            reach = slice(begin, min(begin + group, columns))
            scale, zero = _best_range(left[:, reach], importance[reach], grid)
            scales.append(scale)
            zeros.append(zero)
        errors = _round_block(left[:, begin:end], codes[:, begin:end], inverse[begin:end, begin:end],
                              (scales[-1], zeros[-1]), grid)  # fmt: skip
        left[:, end:].addmm_(errors, inverse[begin:end, end:], alpha=-1)
    found = torch.stack(scales, 1)
    _check(weight, found)
    return Rounded(codes, found, None if grid.symmetric else torch.stack(zeros, 1), group)


def relative_error(weight: Tensor, rounded: Tensor, gram: Tensor | None) -> float:
    """How far the outputs are off: |(W - Q)·x| / |W·x| in the root mean square over inputs, or without x.

    Args:
        weight: float32 [out, in].
        rounded: float32, the same shape.
        gram: as in `round_with_feedback`; None: all inputs are alike.
    """
    change = weight - rounded
    lost = change.square().sum() if gram is None else ((change @ gram) * change).sum()
    whole = weight.square().sum() if gram is None else ((weight @ gram) * weight).sum()
    return float((lost.clamp_min(0) / whole).sqrt()) if whole > 0 else 0.0


def _round_block(
    left: Tensor, codes: Tensor, inverse: Tensor, scaling: tuple[Tensor, Tensor], grid: Grid
) -> Tensor:
    """Round columns one after another, each error shared among those of the block to come; the errors, divided."""
    errors = torch.empty_like(left)
    scale, zero = scaling
    for i in range(left.shape[1]):
        column = left[:, i]
        code = _codes(column[:, None], scale, zero, grid)[:, 0]
        codes[:, i] = code
        errors[:, i] = (column - (code - zero) * scale) / inverse[i, i]
        left[:, i + 1 :].addr_(errors[:, i], inverse[i, i + 1 :], alpha=-1)
    return errors


def _inverse_root(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of (H + damping)⁻¹; inputs that were always zero count as if they stood alone."""
    size = gram.shape[0]
    mean = float(gram.diagonal().mean())
    damping = _DAMPING
    while damping <= _MOST_DAMPING and mean > 0:
        damped = gram + torch.eye(size) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return torch.triu(upper)
        damping *= 10
    return torch.eye(size)


def _best_range(some: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero of each row of a group, by the least error that plain rounding then makes."""
    best_scale, best_zero = _range(some, grid, 1.0)
    least = _cost(some, importance, best_scale, best_zero, grid)
    for shrink in _SHRINKS[1:]:
        scale, zero = _range(some, grid, shrink)
        cost = _cost(some, importance, scale, zero, grid)
        better = cost < least
        least = torch.where(better, cost, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _cost(some: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    rounded = (_codes(some, scale, zero, grid) - zero[:, None]) * scale[:, None]
    return ((some - rounded).square() * importance).sum(1)


def _range(some: Tensor, grid: Grid, shrink: float) -> tuple[Tensor, Tensor]:
    """Scale and zero [out] of a group whose outermost numbers, times `shrink`, are the outermost codes."""
    if grid.symmetric:
        reach = some.abs().amax(1) * shrink / grid.highest
        scale = _storable(reach, grid)
        return scale, torch.zeros_like(scale)
    low, high = some.amin(1).clamp_max(0) * shrink, some.amax(1).clamp_min(0) * shrink
    scale = _storable((high - low) / grid.highest, grid)
    zero = (-low / scale).half().float()
    return scale, zero


def _storable(scale: Tensor, grid: Grid) -> Tensor:
    """Scales as they are kept: float16 of int4, float32 of int8; of numbers that are all zero any."""
    scale = scale.half().float() if grid.bits == 4 else scale
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _codes(some: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The nearest codes, as float32."""
    codes: Tensor = (some / scale[:, None] + zero[:, None]).round_().clamp_(grid.lowest, grid.highest)
    return codes


def _check(weight: Tensor, scales: Tensor) -> None:
    if not bool(weight.isfinite().all()) or not bool(scales.isfinite().all()):
        raise EngineError("WEIGHTS_INVALID", "a matrix has numbers that are infinite, none, or too large for int4")
