"""The backend in Triton: ops on a CUDA device, and decode steps as graphs; in Triton's interpreter on the CPU.

Activations have the number type of the weights; vectors are float32. Products of plain matrices are cuBLAS's, but
for logits and the scores of experts, which are float32, and in deterministic mode, where one kernel makes every
product in one order, and every token attends by the kernel for prompts. With bfloat16, inputs of e4m3 matrices are
rounded to e4m3 by token where there are many (W8A8); of int8 and four-bit matrices they stay as they are. The ops
of encoders are torch's, beside these products.

Source: Dao et al., "FlashAttention", NeurIPS 2022; He et al., "Defeating Nondeterminism in LLM Inference", 2025.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom
from torch import Tensor

from kernels.encoder_ops import Passages
from kernels.encoding import EncoderOps
from kernels.logprobs import logprobs
from kernels.ops import Attending, Draw, Heads, KvSpec, Logprobs, Matrix, QkNorm, Routing, Rows, Sampling
from kernels.steps import StepLimits, StepModel
from kernels.triton import embed, gated, kv_cache, linear, norm, pointwise
from kernels.triton.attention_decode import decode_attention
from kernels.triton.attention_prefill import prefill_attention
from kernels.triton.drawing import Drawing
from kernels.triton.graphs import CudaRecorder, GraphedStep, RepeatingRecorder
from kernels.triton.kv_cache import KvPages
from kernels.triton.layout import decode_workspace_bytes
from kernels.triton.mixture import Experts, mixture
from kernels.triton.mixture import prepare as prepare_experts
from kernels.triton.rope import rope_and_write
from kernels.triton.step import StepBatch, one_step
from kernels.triton.weights import Form, Linear, prepare_linear, prepare_table, shape_of, tie

_LAYOUT = 1  # of prepared objects; another number where their tensors come to mean something else
_FLOAT = 4


class Angles(NamedTuple):
    """Cosines and sines, float32 [positions, n]."""

    cos: Tensor
    sin: Tensor


class TritonBackend(EncoderOps):
    """Triton's kernels on one device.

    Args:
        dtype: float32 or bfloat16, of plain weights and activations.
        kv_dtype: of keys and values, one of `kernels.triton.kv_cache.KV_TYPES`; "" as `dtype`.
        deterministic: same bits for a row whatever shares the step.
        device: "cuda"; "cpu" where Triton interprets; "meta", where nothing is computed.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.bfloat16,
        kv_dtype: str = "",
        deterministic: bool = False,
        device: str = "cuda",
    ) -> None:
        self.dtype = dtype
        self.kv_dtype = kv_dtype or str(dtype).removeprefix("torch.")
        self.deterministic = deterministic
        self.device = torch.device(device)
        self._scratch = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._workspace = torch.empty(0, dtype=torch.float32, device=self.device)
        self._outgrown: list[Tensor] = []  # graphs that were recorded with them still write there
        self._lent: Tensor | None = None
        self._drawing: Drawing | None = None
        self._slots: Tensor | None = None  # of the step that is computed

    @property
    def layout_id(self) -> str:
        """See `kernels.ops.Backend`."""
        return f"triton {_LAYOUT} {self.dtype}"

    def prepare_linear(self, weights: Sequence[Matrix], biases: Sequence[Tensor] = ()) -> Linear:
        """See `kernels.ops.Backend`."""
        return prepare_linear(weights, biases, self.dtype, self.device)

    def prepare_experts(
        self,
        gate_up: Sequence[Sequence[Matrix]],
        down: Sequence[Matrix],
        gate_up_biases: Sequence[Sequence[Tensor]] = (),
        down_biases: Sequence[Tensor] = (),
    ) -> Experts:
        """See `kernels.ops.Backend`."""
        return prepare_experts(gate_up, down, gate_up_biases, down_biases, self.dtype, self.device)

    def prepare_vector(self, weight: Tensor, offset: float = 0.0) -> Tensor:
        """See `kernels.ops.Backend`; float32."""
        return (weight.to(self.device).float() + offset).contiguous()

    def prepare_table(self, weight: Matrix) -> Form:
        """See `kernels.ops.Backend`."""
        return prepare_table(weight, self.dtype, self.device)

    def tied_head(self, table: Form) -> Linear:
        """See `kernels.ops.Backend`; one copy serves both."""
        return tie(table)

    def prepare_rope(self, inv_freq: Sequence[float], max_positions: int, scale: float = 1.0) -> Angles:
        """Cosines and sines [max_positions, n] of float32 angles, computed in float64."""
        frequencies = torch.tensor(inv_freq, dtype=torch.float32)
        angles = torch.outer(torch.arange(max_positions).float(), frequencies).double()
        both = ((turn * scale).float().to(self.device) for turn in (angles.cos(), angles.sin()))
        return Angles(*both)

    def allocate_kv(self, spec: KvSpec) -> KvPages:
        """See `kernels.ops.Backend`."""
        return kv_cache.allocate(spec, self.kv_dtype, self.device)

    def scrub(self, kv: KvPages, blocks: Sequence[int]) -> None:
        """See `kernels.ops.Backend`."""
        kv_cache.scrub(kv, blocks)

    def begin(self, rows: Rows, kv: KvPages) -> StepBatch:
        """See `kernels.ops.Backend`; no page is zeroed: attention reads nothing behind a row's last token."""
        return one_step(rows, kv.spec.block_size, self.device)

    def compile(self, model: StepModel, kv: KvPages, limits: StepLimits) -> GraphedStep:
        """See `kernels.steps.Compiler`."""
        recorder = CudaRecorder() if self.device.type == "cuda" else RepeatingRecorder()
        return GraphedStep(model, self, kv, limits, recorder, is_lazy=self.device.type == "cpu")

    def embed(self, batch: StepBatch, table: Form, scale: float = 1.0) -> Tensor:
        """See `kernels.ops.Backend`."""
        self._slots = batch.at.slots
        return self._look_up(table, batch.at.token_ids, scale)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `kernels.ops.Backend`."""
        out = torch.empty_like(x)
        norm.rms_norm(x, weight, eps, out)
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See `kernels.ops.Backend`."""
        out, total = torch.empty_like(x), torch.empty_like(x)
        norm.add_rms_norm(x, residual, weight, eps, scale, total, out)
        return out, total

    def add(self, x: Tensor, residual: Tensor, scale: float = 1.0) -> Tensor:
        """See `kernels.ops.Backend`."""
        out = torch.empty_like(x)
        pointwise.add(x, residual, scale, out)
        return out

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        """See `kernels.ops.Backend`."""
        out = x.new_empty(len(x), _outputs(weight))
        self._multiply(x, weight, out)
        return out

    def rope_and_write_kv(
        self,
        qkv: Tensor,
        heads: Heads,
        rope: Angles,
        kv: KvPages,
        layer: int,
        batch: StepBatch,
        norms: QkNorm | None = None,
    ) -> Tensor:
        """See `kernels.ops.Backend`; the queries are rotated where they lie."""
        rope_and_write(qkv, heads, batch.at.positions, batch.at.slots, *rope, kv, layer, norms)
        return qkv[:, : heads.query * heads.dim]

    def paged_attention(
        self, q: Tensor, heads: Heads, attending: Attending, kv: KvPages, layer: int, batch: StepBatch
    ) -> Tensor:
        """See `kernels.ops.Backend`."""
        at = batch.at
        if batch.is_decode and not self.deterministic:
            out = q.new_empty(len(q), heads.query * heads.dim)
            workspace = self._workspace_for(batch, heads)
            lengths = at.block_tables, at.lengths
            decode_attention(q, kv, layer, *lengths, heads, attending, out, workspace, batch.context)
            return out
        out = q.new_zeros(len(q), heads.query * heads.dim)  # tokens of no row stay so
        places = at.block_tables, at.starts, at.query_starts
        prefill_attention(
            q, kv, layer, *places, heads, attending, out, batch.most_tokens, deterministic=self.deterministic
        )
        return out

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """See `kernels.ops.Backend`."""
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        gated.gated(gate_up, activation, out)
        return out

    def mixture(self, x: Tensor, router: Linear, experts: Experts, routing: Routing, activation: str) -> Tensor:
        """See `kernels.ops.Backend`; tokens that only fill a step up ask nobody."""
        scores = x.new_empty(len(x), _outputs(router), dtype=torch.float32)
        self._multiply(x, router, scores)
        out = torch.empty_like(x)
        slots, exact = self._slots, self.deterministic
        mixture(x, scores, experts, routing, activation, out, slots=slots, deterministic=exact)
        return out

    def logits(
        self, x: Tensor, head: Linear, tokens: Sequence[int], scale: float = 1.0, softcap: float = 0.0
    ) -> Tensor:
        """See `kernels.ops.Backend`; float32."""
        rows = self.pick(x, tokens)
        lent = self._lent
        out = rows.new_empty(len(rows), _outputs(head), dtype=torch.float32) if lent is None else lent
        self._multiply(rows, head, out)
        if scale != 1 or softcap:
            pointwise.finish_logits(out, scale, softcap, out)
        return out

    @contextmanager
    def logits_in(self, out: Tensor) -> Iterator[None]:
        """Inside, logits are written to `out`, float32 [rows, vocabulary], and nothing else is asked for."""
        self._lent = out
        try:
            yield
        finally:
            self._lent = None

    def pick(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """Some rows of x [n, width], contiguous; the first ones are not copied."""
        if rows == range(len(rows)) or list(rows) == list(range(len(rows))):
            return x[: len(rows)]
        out = x.new_empty(len(rows), x.shape[1])
        is_cuda = self.device.type == "cuda"  # from pinned memory a copy waits for nothing that was started before
        numbers = torch.tensor(rows, dtype=torch.int32, pin_memory=is_cuda)
        pointwise.pick(x, numbers.to(self.device, non_blocking=is_cuda), out)
        return out

    def sample(self, logits: Tensor, sampling: Sampling) -> Draw:
        """See `kernels.ops.Backend`."""
        rows, vocabulary = logits.shape
        if self._drawing is None or self._drawing.rows < rows or self._drawing.vocabulary != vocabulary:
            self._drawing = Drawing(rows, vocabulary, self.device)
        places = range(rows)
        self._drawing.send(sampling, places)
        if sampling.adjustments is None:
            self._drawing.draw(logits)
        else:
            self._drawing.draw_adjusted(logits, sampling.adjustments)
        return self._drawing.read(places)()

    def logprobs(self, logits: Tensor, tokens: Sequence[int], top: int) -> Logprobs:
        """See `kernels.ops.Backend`; on the host, so that they have the bits that every backend gives them."""
        return logprobs(logits.cpu(), tokens, top)

    def prepare_turns(self, inv_freq: Sequence[float], max_positions: int) -> Tensor:
        """See `kernels.encoding.EncoderOps`."""
        return super().prepare_turns(inv_freq, max_positions).to(self.device)

    def begin_passages(self, passages: Passages) -> Any:
        """See `kernels.encoder_ops.EncoderBackend`."""
        batch = super().begin_passages(passages)
        numbers = {name: getattr(batch, name).to(self.device) for name in ("token_ids", "type_ids", "positions")}
        return batch._replace(**numbers)

    def embed_passages(self, batch: Any, words: Form, places: Form | None, types: Form | None) -> Tensor:
        """See `kernels.encoder_ops.EncoderBackend`."""
        x = self._look_up(words, batch.token_ids)
        if types is not None:
            x = x + self._look_up(types, batch.type_ids)
        return x if places is None else x + self._look_up(places, batch.positions)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """See `kernels.encoder_ops.EncoderBackend`; in float32."""
        return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)

    def _look_up(self, table: Form, ids: Tensor, scale: float = 1.0) -> Tensor:
        out = torch.empty(len(ids), shape_of(table)[1], dtype=self.dtype, device=self.device)
        embed.embed(ids, table, scale, out)
        return out

    def _multiply(self, x: Tensor, weight: Linear, out: Tensor) -> None:
        """x · weightᵀ + bias, with scratch that is large enough for all products so far."""
        needed = linear.scratch_bytes(weight, len(x), x.element_size())
        if needed > len(self._scratch):
            self._outgrown.append(self._scratch)
            self._scratch = self._scratch.new_empty(needed)
        exact = self.deterministic
        linear.linear(x, weight, out, self._scratch, deterministic=exact, round_inputs=self._rounds(weight))

    def _rounds(self, weight: Linear) -> bool:
        """Inputs of e4m3 matrices become e4m3, as such models are published to be run; those of others stay."""
        return self.dtype is torch.bfloat16 and linear.rounds_to(weight) is torch.float8_e4m3fn

    def _workspace_for(self, batch: StepBatch, heads: Heads) -> Tensor | None:
        """Room for the answers of the splits of a context."""
        needed = decode_workspace_bytes(batch.rows, batch.context, *heads) // _FLOAT
        if needed > len(self._workspace):
            self._outgrown.append(self._workspace)
            self._workspace = self._workspace.new_empty(needed)
        return self._workspace if needed else None


def _outputs(weight: Linear) -> int:
    """Of all its matrices."""
    return sum(shape_of(part)[0] for part in weight.parts)
