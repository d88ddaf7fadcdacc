"""The CPU backend in C++: ops as programs of one op, whole steps as programs of all.

Every op gives a row the same bits whatever shares the step, wherever it lies and however its prompt was cut: there
is no other mode. Encoders' own ops are torch's, beside native products.

Source: include/cloister_kernels.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.encoding import EncoderOps
from kernels.logprobs import logprobs
from kernels.native import layout
from kernels.native.kv import KvPages, StepRows, allocate, fresh_blocks, lay_out
from kernels.native.library import ClLimits, ClOp, ClRows, ClStep, Library, load, threads
from kernels.native.memory import aligned_empty
from kernels.native.nodes import Forms, Node
from kernels.native.program import NativeStep, record
from kernels.native.recording import StepOps
from kernels.native.weights import (
    PackedMatrix,
    StackedExperts,
    StackedLinear,
    prepare_linear,
    prepare_matrix,
)
from kernels.ops import Draw, Heads, KvSpec, Logprobs, Matrix, Rows, Sampling, Table
from kernels.sampling import sample
from kernels.steps import StepLimits, StepModel

_LAYOUT = 1  # of prepared objects; another number where their tensors come to mean something else


class _Batch(NamedTuple):
    rows: StepRows


class NativeBackend(StepOps[Tensor], EncoderOps):
    """The native library on the CPU.

    Args:
        dtype: float32 or bfloat16, of plain weights; with bfloat16 integers are multiplied as integers.
        kv_dtype: float32, bfloat16 or int8, of keys and values; "" as `dtype`.
        deterministic: of encoders' ops, as `kernels.encoding` has them.
        library: None takes that of the process.

    Raises:
        NativeUnavailable: there is none.
        ValueError: CLOISTER_KERNELS_ISA names none that runs here.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        kv_dtype: str = "",
        deterministic: bool = False,
        library: Library | None = None,
    ) -> None:
        super().__init__(dtype)
        self.dtype = torch.float32  # of activations
        self.deterministic = deterministic
        self.kv_dtype = kv_dtype or str(dtype).removeprefix("torch.")
        self.library = load() if library is None else library
        self._scratch = aligned_empty(0)

    @property
    def layout_id(self) -> str:
        """See `kernels.ops.Backend`; the same for all instruction sets."""
        return f"native {_LAYOUT} {self.weights_dtype}"

    def prepare_linear(self, weights: Sequence[Matrix], biases: Sequence[Tensor] = ()) -> StackedLinear:
        """See `kernels.ops.Backend`."""
        return prepare_linear(self.library, weights, biases, self.weights_dtype.itemsize)

    def prepare_experts(
        self,
        gate_up: Sequence[Sequence[Matrix]],
        down: Sequence[Matrix],
        gate_up_biases: Sequence[Sequence[Tensor]] = (),
        down_biases: Sequence[Tensor] = (),
    ) -> StackedExperts:
        """See `kernels.ops.Backend`."""
        first = zip(gate_up, gate_up_biases or [()] * len(down), strict=True)
        last = zip(down, [[bias] for bias in down_biases] or [[]] * len(down), strict=True)
        return StackedExperts(
            tuple(self.prepare_linear(*parts) for parts in first),
            tuple(self.prepare_linear([matrix], biases) for matrix, biases in last),
        )

    def prepare_vector(self, weight: Tensor, offset: float = 0.0) -> Tensor:
        """See `kernels.ops.Backend`; float32."""
        return (weight.float() + offset).contiguous()

    def prepare_table(self, weight: Matrix) -> PackedMatrix:
        """See `kernels.ops.Backend`."""
        return prepare_matrix(self.library, weight, self.weights_dtype.itemsize)

    def tied_head(self, table: PackedMatrix) -> StackedLinear:
        """See `kernels.ops.Backend`; one copy serves both."""
        return StackedLinear((table,), None)

    def prepare_rope(
        self, inv_freq: Sequence[float], max_positions: int, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines [max_positions, n] of float32 angles, computed in float64."""
        frequencies = torch.tensor(inv_freq, dtype=torch.float32)
        angles = torch.outer(torch.arange(max_positions).float(), frequencies).double()
        return (angles.cos() * scale).float(), (angles.sin() * scale).float()

    def allocate_kv(self, spec: KvSpec) -> KvPages:
        """See `kernels.ops.Backend`."""
        return allocate(self.library, spec, layout.KV_TYPES[self.kv_dtype])

    def scrub(self, kv: KvPages, blocks: Sequence[int]) -> None:
        """See `kernels.ops.Backend`."""
        kv.scrub(blocks)

    def begin(self, rows: Rows, kv: KvPages) -> _Batch:
        """See `kernels.ops.Backend`."""
        kv.scrub(fresh_blocks(rows, kv.spec.block_size))
        return _Batch(lay_out(rows))

    def compile(self, model: StepModel, kv: KvPages, limits: StepLimits) -> NativeStep:
        """See `kernels.steps.Compiler`."""
        whole, picked = (record(model, kv, self.weights_dtype, whole=all_tokens) for all_tokens in (True, False))
        return NativeStep(self.library, whole, picked, kv, limits)

    def embed_passages(self, batch: Any, words: Table, places: Table | None, types: Table | None) -> Tensor:
        """See `kernels.encoder_ops.EncoderBackend`."""
        x = self._look_up(words, batch.token_ids)
        if types is not None:
            x = x + self._look_up(types, batch.type_ids)
        return x if places is None else x + self._look_up(places, batch.positions)

    def sample(self, logits: Tensor, sampling: Sampling) -> Draw:
        """See `kernels.ops.Backend`."""
        return sample(logits, sampling)

    def logprobs(self, logits: Tensor, tokens: Sequence[int], top: int) -> Logprobs:
        """See `kernels.ops.Backend`."""
        return logprobs(logits, tokens, top)

    def _look_up(self, table: PackedMatrix, ids: Tensor) -> Tensor:
        rows = Rows(ids.tolist(), [0], [len(ids)], [()])
        return self.embed(_Batch(lay_out(rows)), table)

    def _width(self, x: Tensor) -> int:
        return x.shape[1]

    def _is_picked(self, x: Tensor) -> bool:
        return False  # rows that were picked are all that there are

    def _pick(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        return x.index_select(0, torch.tensor(tokens, dtype=torch.int64))

    def _new(self, like: Tensor, width: int) -> Tensor:
        return torch.empty(len(like), width)

    def _tokens(self, batch: _Batch, width: int) -> Tensor:
        return torch.empty(len(batch.rows.token_ids), width)

    def _own(self, qkv: Tensor) -> Tensor:
        return qkv.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def _queries(self, qkv: Tensor, heads: Heads) -> Tensor:
        return qkv[:, : heads.query * heads.dim]

    def _whole(self, q: Tensor, heads: Heads) -> Tensor:
        """Attention reads queries where the rotation left them."""
        width = (heads.query + 2 * heads.kv) * heads.dim
        if q.stride() == (width, 1):
            return q.as_strided((len(q), width), (width, 1))
        return torch.nn.functional.pad(q, (0, width - q.shape[1]))

    def _emit(self, node: Node[Tensor], batch: _Batch | None = None) -> None:
        """Run it."""
        at, step, limits = _Tensors(), ClStep(), ClLimits(context=1, threads=threads())
        op = ClOp(node.code, at.keep(node.struct(at)))
        if batch is not None:
            batch.rows.fill(step)
            limits.context = batch.rows.context
        else:
            handle = node.plain[0] if node.plain else node.makes if node.makes is not None else node.reads[0][0]
            step.tokens = step.rows = len(handle)
        if not step.tokens:
            return
        limits.tokens, limits.rows, limits.picks = step.tokens, step.rows, step.tokens
        step.picks, step.threads = step.tokens, limits.threads
        needed = self.library.scratch_bytes(ctypes.addressof(op), 1, limits)
        if needed > len(self._scratch):
            self._scratch = aligned_empty(needed)
        step.scratch = self._scratch.data_ptr()
        self.library.run(ctypes.addressof(op), 1, ctypes.addressof(step))


class _Tensors:
    """Tensors as handles; a `kernels.native.nodes.Addresses`."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def f32(self, handle: Tensor | None, /) -> int | None:
        """A handle that is not as ops hand them on is copied."""
        if handle is None:
            return None
        handle = handle.float().contiguous()
        self._kept.append(handle)
        return handle.data_ptr()

    def rows(self, handle: Tensor, forms: Forms | None = None, /) -> int:
        return self.keep(ClRows(f32=self.f32(handle), width=handle.shape[1]))

    def keep(self, struct: Structure | ctypes.Array[Any], /) -> int:
        self._kept.append(struct)
        return ctypes.addressof(struct)
