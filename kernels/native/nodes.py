"""The ops of a step as data: what each reads and writes, and the struct that it is to the library.

An activation is named by a handle: a tensor where ops run one by one, a `program.Value` where a whole step is
recorded. Where a handle's numbers lie, an `Addresses` knows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from ctypes import Structure
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from kernels.native import layout, library
from kernels.native.kv import KvPages
from kernels.native.layout import RowForm
from kernels.native.weights import PackedMatrix, StackedExperts, StackedLinear
from kernels.ops import ACTIVATIONS, Attending, Heads, QkNorm, Routing

H = TypeVar("H")
Read = TypeVar("Read", contravariant=True)


F32 = RowForm(layout.FLOAT32)
BF16 = RowForm(layout.BFLOAT16)
Forms = frozenset[RowForm]
PLAIN: Forms = frozenset({F32})


def needed(weights: Iterable[StackedLinear]) -> Forms:
    """The forms of inputs that these products read."""
    return frozenset(layout.needed(part.form) for weight in weights for part in weight.parts)


class Addresses(Protocol[Read]):
    """Where activations lie, and structs that live as long as the ops that point to them."""

    def f32(self, handle: Read | None, /) -> int | None:
        """Of the float32 numbers of an activation; None of None, and of what nobody reads."""

    def rows(self, handle: Read, forms: Forms | None = None, /) -> int:
        """Of a ClRows to write; or to read in these forms, or else in float32."""

    def keep(self, struct: Structure | ctypes.Array[Any], /) -> int:
        """Of a struct that is kept."""


@dataclass(frozen=True)
class Node(Generic[H]):
    """One op.

    Attributes:
        code: ClCode.
        struct: what it is to the library.
        reads: activations and in which forms; those that it changes in place among them.
        makes: an activation in the forms that are read; what it is called in the structs.
        plain: activations in float32.
        replaces: what the last of `plain` may take the place of.
    """

    code: int
    struct: Callable[[Addresses[H]], Structure]
    reads: tuple[tuple[H, Forms], ...] = ()
    makes: H | None = None
    plain: tuple[H, ...] = ()
    replaces: H | None = None


def embed(table: PackedMatrix, out: H, scale: float) -> Node[H]:
    """CL_OP_EMBED."""

    def struct(at: Addresses[H]) -> Structure:
        return library.ClEmbed(at.keep(table.struct()), at.rows(out), scale)

    return Node(library.CL_OP_EMBED, struct, makes=out)


def norm(x: H, residual: H | None, weight: Tensor, total: H | None, out: H, scale: float, eps: float) -> Node[H]:
    """CL_OP_NORM."""

    def struct(at: Addresses[H]) -> Structure:
        places = at.f32(x), at.f32(residual), weight.data_ptr(), at.f32(total)
        return library.ClNorm(*places, at.rows(out), scale, eps)

    reads = ((x, PLAIN),) if residual is None else ((x, PLAIN), (residual, PLAIN))
    plain = () if total is None else (total,)
    return Node(library.CL_OP_NORM, struct, reads, out, plain, replaces=residual)


def add(x: H, residual: H, out: H, width: int, scale: float) -> Node[H]:
    """CL_OP_ADD."""

    def struct(at: Addresses[H]) -> Structure:
        return library.ClAdd(at.f32(x), at.f32(residual), at.f32(out), width, scale)

    return Node(library.CL_OP_ADD, struct, ((x, PLAIN), (residual, PLAIN)), plain=(out,))


def linear(x: H, weight: StackedLinear, out: H, picked: bool) -> Node[H]:
    """CL_OP_LINEAR."""
    forms = needed([weight])

    def struct(at: Addresses[H]) -> Structure:
        return library.ClLinearOp(at.rows(x, forms), _keep_linear(at, [weight]), at.f32(out), picked)

    return Node(library.CL_OP_LINEAR, struct, ((x, forms),), plain=(out,))


def rope(
    qkv: H, heads: Heads, tables: tuple[Tensor, Tensor], kv: KvPages, layer: int, norms: QkNorm | None
) -> Node[H]:
    """CL_OP_ROPE."""
    cosines, sines = tables

    def struct(at: Addresses[H]) -> Structure:
        query, key = (None, None) if norms is None else (norms.query.data_ptr(), norms.key.data_ptr())
        return library.ClRope(
            qkv=at.f32(qkv),
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            query_norm=query,
            key_norm=key,
            kv=at.keep(kv.struct()),
            layer=layer,
            heads=heads.query,
            rotated=2 * cosines.shape[1],
            whole=norms is not None and norms.whole,
            eps=0.0 if norms is None else norms.eps,
        )

    return Node(library.CL_OP_ROPE, struct, ((qkv, PLAIN),))


def attention(qkv: H, heads: Heads, attending: Attending, kv: KvPages, layer: int, out: H) -> Node[H]:
    """CL_OP_ATTENTION."""
    scale, window, softcap, sinks = attending

    def struct(at: Addresses[H]) -> Structure:
        return library.ClAttention(
            qkv=at.f32(qkv),
            sinks=None if sinks is None else sinks.data_ptr(),
            kv=at.keep(kv.struct()),
            out=at.rows(out),
            layer=layer,
            heads=heads.query,
            window=window,
            scale=scale,
            softcap=softcap,
        )

    return Node(library.CL_OP_ATTENTION, struct, ((qkv, PLAIN),), out)


def gated(x: H, activation: str, out: H) -> Node[H]:
    """CL_OP_GATED."""

    def struct(at: Addresses[H]) -> Structure:
        return library.ClGated(at.f32(x), at.rows(out), ACTIVATIONS.index(activation))

    return Node(library.CL_OP_GATED, struct, ((x, PLAIN),), out)


def mixture(
    x: H, router: StackedLinear, experts: StackedExperts, routing: Routing, activation: str, out: H
) -> Node[H]:
    """CL_OP_MIXTURE."""
    forms = needed([router, *experts.gate_up])

    def struct(at: Addresses[H]) -> Structure:
        return library.ClMixture(
            x=at.rows(x, forms),
            router=_keep_linear(at, [router]),
            gate_up=_keep_linear(at, experts.gate_up),
            down=_keep_linear(at, experts.down),
            out=at.f32(out),
            experts=len(experts.down),
            top_k=routing.top_k,
            normalise=routing.normalise,
            activation=ACTIVATIONS.index(activation),
            intermediate=experts.down[0].inner,
        )

    return Node(library.CL_OP_MIXTURE, struct, ((x, forms),), plain=(out,))


def pick(x: H, out: H) -> Node[H]:
    """CL_OP_PICK."""

    def struct(at: Addresses[H]) -> Structure:
        return library.ClPick(at.f32(x), at.rows(out))

    return Node(library.CL_OP_PICK, struct, ((x, PLAIN),), out)


def cap(x: H, width: int, scale: float, softcap: float) -> Node[H]:
    """CL_OP_CAP."""

    def struct(at: Addresses[H]) -> Structure:
        return library.ClCap(at.f32(x), width, scale, softcap)

    return Node(library.CL_OP_CAP, struct, ((x, PLAIN),))


def _keep_linear(at: Addresses[H], weights: Iterable[StackedLinear]) -> int:
    """The address of the first of some ClLinear, one after another."""
    structs = []
    for weight in weights:
        struct, parts = weight.struct()
        at.keep(parts)
        structs.append(struct)
    return at.keep((library.ClLinear * len(structs))(*structs))
