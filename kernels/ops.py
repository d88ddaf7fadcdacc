"""The op protocol: about a dozen fused operations that a model is written in, and what a backend must promise.

A backend owns the layout of weights and of the KV pages: it takes plain tensors once, in `prepare_*` and
`allocate_kv`, and hands out opaque objects that only it reads. Models and the scheduler therefore never ask which
device they run on.

A step's tokens are flattened: row after row, `T` tokens in all. A backend may pad them (to whole tiles); what it
hands from op to op is its own business, and only `logits` gives the caller one row for each token it names.

Promise of a deterministic backend: the logits of a row have the same bits whatever other rows share the step,
wherever the row lies among them, and however its prompt was cut into chunks at page borders. Draws and log
probabilities have the same bits for the same logits in every backend, whatever the other rows are.

Source: Dao et al., "FlashAttention", NeurIPS 2022; Kwon et al., SOSP 2023 (paged attention); He et al.,
"Defeating Nondeterminism in LLM Inference", 2025 (batch invariance by fixed tiles and splits).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Matrix: TypeAlias = Any  # a weight matrix as its file has it: a Tensor [out, in], or `kernels.packed.Packed`
Linear: TypeAlias = Any  # a weight matrix, or several stacked, in the backend's layout
Experts: TypeAlias = Any  # the matrices of all experts of one layer
Vector: TypeAlias = Any  # the weight of a norm
Table: TypeAlias = Any  # an embedding table, plain or quantised, whose rows can be read
Rope: TypeAlias = Any  # cosines and sines of every position
KvCache: TypeAlias = Any  # keys and values of all layers, in pages
Batch: TypeAlias = Any  # one step's rows, prepared
Hidden: TypeAlias = Any  # activations of a step's tokens


class KvSpec(NamedTuple):
    """Size of a KV cache: layers, pages, tokens per page, KV heads, and numbers per head."""

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int


class Heads(NamedTuple):
    """How a fused projection splits into heads: query heads, KV heads, numbers per head."""

    query: int
    kv: int
    dim: int


class QkNorm(NamedTuple):
    """RMS norms of queries and keys, before they are rotated.

    Attributes:
        query: weight [dim], or [query·dim] where `whole`.
        key: weight [dim], or [kv·dim] where `whole`.
        eps: added under the root.
        whole: over all heads of a token at once (OLMo 2), not over each head (Qwen 3, Gemma 3).
    """

    query: Vector
    key: Vector
    eps: float
    whole: bool = False


class Attending(NamedTuple):
    """How the tokens of one layer attend.

    Attributes:
        scale: factor of q·k.
        window: a token sees this many last ones, itself included; 0: all.
        softcap: scores become softcap · tanh(score / softcap) (Gemma 2); 0: they stay.
        sinks: float [query]: one more score per head, which takes its share of the softmax and adds nothing
            (gpt-oss); None: none.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: Vector | None = None


class Routing(NamedTuple):
    """How a router's scores choose experts.

    Attributes:
        top_k: experts for each token; of equal scores the lower expert goes first.
        normalise: their weights are the softmax over the chosen scores; else their share of the softmax over all.
    """

    top_k: int
    normalise: bool


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_swiglu")
"""silu(x) = x·sigmoid(x); gelu with erf; gelu_tanh its approximation (Hendrycks and Gimpel, 2016). Gated, a layer
computes act(gate) · up; clamped_swiglu, of gpt-oss, is g·sigmoid(1.702·g)·(u + 1) for g = min(gate, 7) and
u = clamp(up, -7, 7)."""


class Rows(NamedTuple):
    """One step's rows.

    Attributes:
        token_ids: all rows' tokens, one after another; T in all.
        starts: position of each row's first token.
        counts: tokens of each row; positive.
        block_tables: KV pages of each row, enough for start + count tokens.
    """

    token_ids: Sequence[int]
    starts: Sequence[int]
    counts: Sequence[int]
    block_tables: Sequence[Sequence[int]]


class Adjustments(NamedTuple):
    """Changes to single logits, entry by entry; an entry is a row and a token, at most once in each of the three.

    Rows that are named nowhere cost nothing.

    Attributes:
        banned: rows and tokens, int64; such a token is not drawn. A row whose every token is banned takes the
            likeliest as if none were.
        bias: rows, tokens, and float64 numbers to add.
        penalties: rows, tokens, float64 divisors of positive and factors of negative logits, and float64 numbers
            to take off then.
    """

    banned: tuple[Tensor, Tensor]
    bias: tuple[Tensor, Tensor, Tensor]
    penalties: tuple[Tensor, Tensor, Tensor, Tensor]


class Sampling(NamedTuple):
    """How to draw one token for each of R rows of logits.

    Attributes:
        temperature: float64 [R]; 0 takes the likeliest token.
        top_k: int64 [R]; 0 keeps all tokens.
        top_p: float64 [R]; 1 keeps all tokens.
        uniform: float64 [R]; the random number in [0, 1) that decides the draw.
        min_p: float64 [R]; tokens less likely than this share of the likeliest are dropped; 0 keeps all.
        adjustments: changes to logits before all this; None when no row has any.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    uniform: Tensor
    min_p: Tensor
    adjustments: Adjustments | None = None


class Draw(NamedTuple):
    """The drawn tokens, and which rows had only finite logits; a row that had not has no meaningful token."""

    token_ids: list[int]
    finite: list[bool]


class Logprobs(NamedTuple):
    """What the model thinks of one token for each of R rows of logits.

    Attributes:
        logprob: natural logarithm of the token's probability.
        rank: 1 for the likeliest; of equal ones the lower id comes first.
        top_ids: the likeliest tokens in that order.
        top_logprobs: of those tokens.
        finite: whether the row had only finite logits; one that had not has no meaningful numbers.
    """

    logprob: list[float]
    rank: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]
    finite: list[bool]


class Backend(Protocol):
    """What a model needs of a device."""

    @property
    def layout_id(self) -> str:
        """All that the layouts of prepared weights follow from; where it is the same, they mean the same.

        Prepared objects are tensors, numbers, texts and None in named tuples, tuples and lists, so that
        engine-prepare can keep them in a file.
        """

    def prepare_linear(self, weights: Sequence[Matrix], biases: Sequence[Tensor] = ()) -> Linear:
        """Stack matrices [out_i, in] into one that maps `in` numbers to sum(out_i); a bias for each, or none."""

    def prepare_experts(
        self,
        gate_up: Sequence[Sequence[Matrix]],
        down: Sequence[Matrix],
        gate_up_biases: Sequence[Sequence[Tensor]] = (),
        down_biases: Sequence[Tensor] = (),
    ) -> Experts:
        """The gated MLPs of a mixture, one entry per expert: its gate and up matrices, and its down matrix."""

    def prepare_vector(self, weight: Tensor, offset: float = 0.0) -> Vector:
        """A vector [n], such as the weight of a norm; an offset (Gemma's 1) is added exactly, in float32."""

    def prepare_table(self, weight: Matrix) -> Table:
        """An embedding table [vocabulary, hidden], plain or quantised; a quantised one has no `order`."""

    def tied_head(self, table: Table) -> Linear:
        """The table as the matrix that makes logits; one copy serves both where its layout lets rows be read."""

    def prepare_rope(self, inv_freq: Sequence[float], max_positions: int, scale: float = 1.0) -> Rope:
        """Rotary tables of positions 0 .. max_positions - 1 for frequencies [n], in radians a token.

        The first 2·n numbers of a head are rotated, number i with number n + i; the rest stay as they are. Cosines
        and sines are multiplied by `scale` (YaRN, LongRoPE).

        An angle is the float32 product of float32 position and frequency, as transformers computes it and models
        are trained: at position 4000 it is off the exact one by up to 1e-4, and so would the logits be.
        """

    def allocate_kv(self, spec: KvSpec) -> KvCache:
        """Zeroed pages for keys and values."""

    def scrub(self, kv: KvCache, blocks: Sequence[int]) -> None:
        """Zero the pages `blocks` in every layer."""

    def begin(self, rows: Rows, kv: KvCache) -> Batch:
        """Prepare a step over `rows`; a page whose first position the step writes is zeroed first.

        So a stale page is never read, not even multiplied by zero.
        """

    def embed(self, batch: Batch, table: Table, scale: float = 1.0) -> Hidden:
        """Embeddings [T, hidden] of the step's tokens, times `scale`.

        Rows of a quantised table are the numbers they stand for, as `kernels.packed.dequantise` makes them in
        float32, rounded to the number type of activations.
        """

    def rms_norm(self, x: Hidden, weight: Vector, eps: float) -> Hidden:
        """x / sqrt(mean(x²) + eps) · weight, over the last dimension."""

    def add_rms_norm(
        self, x: Hidden, residual: Hidden, weight: Vector, eps: float, scale: float = 1.0
    ) -> tuple[Hidden, Hidden]:
        """The norm of x·scale + residual, and x·scale + residual."""

    def add(self, x: Hidden, residual: Hidden, scale: float = 1.0) -> Hidden:
        """x·scale + residual."""

    def linear(self, x: Hidden, weight: Linear) -> Hidden:
        """x · weightᵀ + bias."""

    def rope_and_write_kv(
        self,
        qkv: Hidden,
        heads: Heads,
        rope: Rope,
        kv: KvCache,
        layer: int,
        batch: Batch,
        norms: QkNorm | None = None,
    ) -> Hidden:
        """Norm and rotate queries and keys of [T, (query + 2·kv)·dim], store keys and values; the queries."""

    def paged_attention(
        self, q: Hidden, heads: Heads, attending: Attending, kv: KvCache, layer: int, batch: Batch
    ) -> Hidden:
        """softmax(q·kᵀ · scale) · v of each token over its row's tokens up to itself; [T, query·dim]."""

    def gated(self, gate_up: Hidden, activation: str) -> Hidden:
        """act(gate) · up of [T, 2·n], gate first; [T, n]. One of ACTIVATIONS."""

    def mixture(self, x: Hidden, router: Linear, experts: Experts, routing: Routing, activation: str) -> Hidden:
        """The chosen experts' answers to each token of x [T, hidden], weighted and added in the experts' order."""

    def logits(
        self, x: Hidden, head: Linear, tokens: Sequence[int], scale: float = 1.0, softcap: float = 0.0
    ) -> Tensor:
        """Logits [len(tokens), vocabulary] of some of the step's T tokens, float32 or wider.

        They are multiplied by `scale`, and then softcap · tanh(logit / softcap) where softcap is not 0.
        """

    def sample(self, logits: Tensor, sampling: Sampling) -> Draw:
        """One token for each row of logits, whatever the other rows are."""

    def logprobs(self, logits: Tensor, tokens: Sequence[int], top: int) -> Logprobs:
        """What the model thinks of the token `tokens[i]` for each row i of logits, and of the `top` likeliest.

        Computed in float64, in slices of a bounded size; whatever the other rows are.
        """
