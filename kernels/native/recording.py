"""The ops of a decoder's step as native nodes, for whoever runs them one by one and whoever records them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from kernels.native import nodes
from kernels.native.kv import KvPages
from kernels.native.nodes import Node
from kernels.native.weights import PackedMatrix, StackedExperts, StackedLinear
from kernels.ops import Attending, Heads, QkNorm, Routing

H = TypeVar("H")


class StepOps(ABC, Generic[H]):
    """Ops of `kernels.ops.Backend` from `embed` to `logits`; an activation is float32 to whoever sees it.

    Args:
        weights_dtype: float32 or bfloat16, of plain weights.
    """

    def __init__(self, weights_dtype: torch.dtype) -> None:
        self.weights_dtype = weights_dtype

    @abstractmethod
    def _width(self, x: H) -> int:
        """Numbers of each row."""

    @abstractmethod
    def _is_picked(self, x: H) -> bool:
        """Its rows are those that logits are wanted of, not all tokens of the step."""

    @abstractmethod
    def _pick(self, x: H, tokens: Sequence[int]) -> H:
        """The rows `tokens` of x."""

    @abstractmethod
    def _new(self, like: H, width: int) -> H:
        """An activation that an op is to write, of as many rows as `like`."""

    @abstractmethod
    def _tokens(self, batch: Any, width: int) -> H:
        """The same with a row for each token of the step."""

    @abstractmethod
    def _emit(self, node: Node[H], batch: Any = None) -> None:
        """Run or record an op."""

    @abstractmethod
    def _own(self, qkv: H) -> H:
        """What may be changed in place of `qkv`."""

    @abstractmethod
    def _queries(self, qkv: H, heads: Heads) -> H:
        """The queries of qkv, which keeps its layout."""

    @abstractmethod
    def _whole(self, q: H, heads: Heads) -> H:
        """Queries in the layout of qkv."""

    def embed(self, batch: Any, table: PackedMatrix, scale: float = 1.0) -> H:
        """See `kernels.ops.Backend`; the scale is first rounded to the number type, as Gemma's own code does."""
        out = self._tokens(batch, table.inner)
        rounded = torch.tensor(scale, dtype=self.weights_dtype).item()
        self._emit(nodes.embed(table, out, rounded), batch)
        return out

    def rms_norm(self, x: H, weight: Tensor, eps: float) -> H:
        """See `kernels.ops.Backend`."""
        out = self._new(x, len(weight))
        self._emit(nodes.norm(x, None, weight, None, out, 1.0, eps))
        return out

    def add_rms_norm(self, x: H, residual: H, weight: Tensor, eps: float, scale: float = 1.0) -> tuple[H, H]:
        """See `kernels.ops.Backend`."""
        out, total = self._new(x, len(weight)), self._new(x, len(weight))
        self._emit(nodes.norm(x, residual, weight, total, out, scale, eps))
        return out, total

    def add(self, x: H, residual: H, scale: float = 1.0) -> H:
        """See `kernels.ops.Backend`."""
        width = self._width(x)
        out = self._new(x, width)
        self._emit(nodes.add(x, residual, out, width, scale))
        return out

    def linear(self, x: H, weight: StackedLinear) -> H:
        """See `kernels.ops.Backend`."""
        out = self._new(x, weight.out)
        self._emit(nodes.linear(x, weight, out, self._is_picked(x)))
        return out

    def rope_and_write_kv(
        self,
        qkv: H,
        heads: Heads,
        rope: tuple[Tensor, Tensor],
        kv: KvPages,
        layer: int,
        batch: Any,
        norms: QkNorm | None = None,
    ) -> H:
        """See `kernels.ops.Backend`."""
        own = self._own(qkv)
        self._emit(nodes.rope(own, heads, rope, kv, layer, norms), batch)
        return self._queries(own, heads)

    def paged_attention(self, q: H, heads: Heads, attending: Attending, kv: KvPages, layer: int, batch: Any) -> H:
        """See `kernels.ops.Backend`."""
        out = self._tokens(batch, heads.query * heads.dim)
        self._emit(nodes.attention(self._whole(q, heads), heads, attending, kv, layer, out), batch)
        return out

    def gated(self, gate_up: H, activation: str) -> H:
        """See `kernels.ops.Backend`."""
        out = self._new(gate_up, self._width(gate_up) // 2)
        self._emit(nodes.gated(gate_up, activation, out))
        return out

    def mixture(
        self, x: H, router: StackedLinear, experts: StackedExperts, routing: Routing, activation: str
    ) -> H:
        """See `kernels.ops.Backend`."""
        out = self._new(x, experts.down[0].out)
        self._emit(nodes.mixture(x, router, experts, routing, activation, out))
        return out

    def logits(
        self, x: H, head: StackedLinear, tokens: Sequence[int], scale: float = 1.0, softcap: float = 0.0
    ) -> H:
        """See `kernels.ops.Backend`."""
        logits = self.linear(self._pick(x, tokens), head)
        if scale != 1 or softcap:
            self._emit(nodes.cap(logits, head.out, scale, softcap))
        return logits
