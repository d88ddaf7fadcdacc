"""The matrices of a layer's experts in one form and one tensor of each kind, made of what files have of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import Matrix
from kernels.packed import Packed, dequantise
from kernels.triton.experts import Stacked
from kernels.triton.weights import Form, Fp8, Int4, Int8, Plain, layout_of, prepare_matrix, shape_of


def plain(matrix: Matrix) -> Tensor:
    """Its numbers, in float64."""
    return (dequantise(matrix) if isinstance(matrix, Packed) else matrix).double()


def beside(matrices: Sequence[Matrix]) -> Matrix:
    """One matrix of the rows of all, in the packed form that they share, or else plain."""
    first, *others = matrices
    if isinstance(first, Packed) and all(_is_like(first, other) for other in others):
        zeros = None if first.zeros is None else torch.cat([one.zeros for one in matrices])
        codes, scales = (torch.cat([getattr(one, name) for one in matrices]) for name in ("codes", "scales"))
        return first._replace(codes=codes, scales=scales, zeros=zeros)
    return torch.cat([dequantise(one) if isinstance(one, Packed) else one for one in matrices])


def _is_like(one: Packed, other: Matrix) -> bool:
    """Of one layout, table and order of columns, which is supposed of tensors without numbers; in whole groups."""
    if not isinstance(other, Packed) or layout_of(one) != layout_of(other) or one.shape[0] % one.rows:
        return False
    pairs = [(one.table, other.table), (one.order, other.order)]
    return all(a is None or b is None or a.is_meta or torch.equal(a, b) for a, b in pairs)


def stack(matrices: Sequence[Matrix], dtype: torch.dtype, device: torch.device | str) -> Stacked:
    """One behind the other; experts of different forms all become plain.

    Args:
        matrices: [N, K] of each expert.
        dtype: that is computed in.
        device: where they are to be; "meta": their sizes alone.
    """
    if len({layout_of(one) if isinstance(one, Packed) else None for one in matrices}) > 1:
        matrices = [dequantise(one) if isinstance(one, Packed) else one for one in matrices]
    held: dict[str, Tensor] = {}
    for at, matrix in enumerate(matrices):
        form = prepare_matrix(matrix, dtype, device)
        for name, part in form._asdict().items():
            if isinstance(part, Tensor):
                held.setdefault(name, part.new_empty(len(matrices), *part.shape))[at] = part
    return _stacked(form, held)


def _stacked(form: Form, held: dict[str, Tensor]) -> Stacked:
    """What `held` has, by the names and numbers of one expert's form."""
    inner = shape_of(form)[1]
    if isinstance(form, Plain):
        return Stacked("plain", held["weight"], None, None, None, None, inner, 1, 0, inner)
    kind = {Int4: "int4", Int8: "int8", Fp8: "float8"}[type(form)]
    zeros, table, order = (held.get(name) for name in ("zeros", "table", "order"))
    rows, width = form.rows if isinstance(form, Fp8) else 1, form.width if isinstance(form, Int4) else 0
    return Stacked(kind, held["codes"], held["scales"], zeros, table, order, form.group, rows, width, inner)
