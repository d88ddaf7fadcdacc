"""Bytes that a model takes where Triton's kernels compute, part by part, from its configuration alone.

On a CUDA device weights, pages and activations lie in the device's own memory, and the host holds no more than the
files while they are read. Weights and pages are exact; the rest are upper bounds, each term of which names the
tensor it stands for; `kernels/triton/backend.py` and `kernels/triton/graphs.py` make them. No torch.

Letters: as in `engine.footprint`; B rows of the largest graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from engine.models.encoders.spec import EncoderConfig
from engine.models.spec import Mixture, ModelConfig
from engine.options import EngineOptions
from engine.weights.formats import Shape
from kernels.packed import Layout
from kernels.triton import layout

if TYPE_CHECKING:
    from engine.encoder_footprint import EncoderSizes
    from engine.footprint import Sizes

_FLOAT = 4
_INT = 8
_MIB = 2**20
CONTEXT_BYTES = 640 * _MIB
"""Of a device, for CUDA's context, cuBLAS and its workspaces, and kernels; a bound not confirmed on one yet."""
_GRAPH_NODE = 16 * 2**10  # of a graph, for each kernel it starts; likewise
_LAYER_NODES = 16  # kernels of one layer
_SEGMENT = 2 * _MIB  # torch takes memory of a device in such pieces, and no large tensor shares one
_SHARED_SEGMENT = _MIB  # smaller tensors do
_ALLOCATOR = (5, 4)  # what torch's allocator keeps for activations, over what they need at once
_FIXED = 64 * _MIB  # segments of small tensors, and what is left of larger ones
_STACKED = 3  # matrices of one input, such as queries, keys and values
_UNPACKED = 13  # bytes for each number of a stack while it is unpacked, and brought into the form it is kept in
_CONVERTED = 8  # and of a plain one: as it is stored, in its own number type, and the stack
_SCORED = 64  # tokens of a prompt whose logits are computed at once
_ADJUSTED = 8  # bytes for each logit of rows that have adjustments: in float64
_DRAWING = 2  # bytes for each logit while tokens are drawn: maxima, masses and places of its pieces
_DRAWING_ROW = 64 * 2**10  # and for each row: the tokens it may take
_FEW_BUCKETS, _EVERY = 3, 8  # as `kernels.triton.graphs.buckets` has them
_SHORT_CONTEXT = 4096


class _Matrix(NamedTuple):
    known: Layout | None
    out: int
    inner: int
    copies: int


def prepared_bytes(of: Sizes | EncoderSizes) -> dict[str, int]:
    """Each tensor as the backend keeps it: vectors in float32, matrices in their forms."""
    sizes = {name: _FLOAT * prod(shape) for name, shape in of.shapes.items()}
    return sizes | {
        name: matrix.copies * layout.matrix_bytes(matrix.known, (matrix.out, matrix.inner), of.item)
        for name, matrix in _matrices(of)
    }


def rope_bytes(of: Sizes, rotated: int) -> int:
    """Cosines and sines, float32 [positions, rotated / 2] each."""
    return of.positions * rotated * _FLOAT


def block_bytes(of: Sizes) -> int:
    """One KV page over all layers."""
    config, options = of.config, of.options
    page = layout.kv_page_bytes(options.kv_dtype, options.block_size, config.num_kv_heads, config.head_dim)
    return config.num_layers * page


def context_bytes(options: EngineOptions, config: ModelConfig | EncoderConfig, tensors: int = 0) -> int:
    """Of a device's memory what is in no tensor: CUDA's own, graphs, and the ends of tensors' segments.

    Args:
        options: with every default filled in.
        config: of the model.
        tensors: large ones, that are never freed.
    """
    graphs = _graphs(options) if isinstance(config, ModelConfig) else 0
    return CONTEXT_BYTES + graphs * config.num_layers * _LAYER_NODES * _GRAPH_NODE + tensors * _SEGMENT


def large_tensors(of: Sizes | EncoderSizes) -> int:
    """How many tensors of weights have segments of their own."""
    return sum(size > _SHARED_SEGMENT for size in prepared_bytes(of).values())


def packing_bytes(of: Sizes | EncoderSizes) -> int:
    """Most that is there beside files and prepared tensors while a stack of matrices is prepared.

    Experts that are one tensor are a stack of their own, and so is a matrix of the logits.
    """
    stacks = [
        (1 if matrix.copies > 1 or matrix.out == of.config.vocab_size else _STACKED)
        * matrix.copies
        * matrix.out
        * matrix.inner
        * (_UNPACKED if name in of.formats else _CONVERTED)
        for name, matrix in _matrices(of)
    ]
    return max(stacks, default=0)


def host_loading_bytes(of: Sizes | EncoderSizes, stored: Mapping[str, int]) -> int:
    """Most that the host holds while the files are read and their tensors go to the device, stack by stack.

    Args:
        of: the sizes.
        stored: bytes of each tensor in its file.
    """
    return sum(stored.values()) + packing_bytes(of)


def activation_bytes(of: Sizes) -> int:
    """The largest step, op by op; the graphs' pool, and the tensors they read and write; logits and drawing."""
    options = of.options
    step = _step(of, of.step)
    pool = _step(of, options.max_running)
    of_rows = options.max_running * (of.config.hidden_size * of.item + 2 * _FLOAT * of.config.vocab_size)
    splits = max(_workspace(of, rows, context) for rows in _buckets(options) for context in _tiers(options))
    return allocated_bytes(step + pool + of_rows + scratch_bytes(of) + splits + _numbers(of) + _drawing(of))


def scratch_bytes(of: Sizes | EncoderSizes) -> int:
    """What the products of the largest step need beside inputs and outputs; one product at a time."""
    known = ((matrix.known, (matrix.out, matrix.inner)) for _, matrix in _matrices(of))
    return max(layout.linear_scratch_bytes(*matrix, of.step, of.item) for matrix in known)


def allocated_bytes(needed: int) -> int:
    """What torch's allocator takes of a device for so many bytes of activations."""
    times, by = _ALLOCATOR
    return needed * times // by + _FIXED


def _step(of: Sizes, tokens: int) -> int:
    """The residual stream, an op's input and output, and at one moment attention, an MLP or a mixture."""
    hidden, query, config = of.config.hidden_size, of.query, of.config
    moments = [2 * query + 2 * of.kv + hidden]
    mlps = {layer.mlp for layer in config.layers}
    moments += [3 * mlp.intermediate + hidden for mlp in mlps if not isinstance(mlp, Mixture)]
    numbers = tokens * (4 * hidden + max(moments)) * of.item
    return numbers + max((_mixture(of, mlp, tokens) for mlp in mlps if isinstance(mlp, Mixture)), default=0)


def _mixture(of: Sizes, mlp: Mixture, tokens: int) -> int:
    """Scores, choices, entries sorted by expert, and of each entry what is inside its expert and its answer."""
    entries = tokens * mlp.top_k
    sorted_by = 8 * _INT * (entries + mlp.experts)
    answers = entries * (mlp.intermediate + of.config.hidden_size) * of.item
    return tokens * mlp.experts * 2 * _FLOAT + sorted_by + answers


def _drawing(of: Sizes) -> int:
    """Logits of a step that is no graph's, or of a prompt's tokens; rows that are adjusted; pieces of rows."""
    rows, vocabulary = of.options.max_running, of.config.vocab_size
    logits = max(rows, _SCORED) * vocabulary * _FLOAT
    return logits + rows * (vocabulary * (_ADJUSTED + _DRAWING) + _DRAWING_ROW)


def _numbers(of: Sizes) -> int:
    """A step's rows, those of graphs, and how tokens are drawn."""
    options = of.options
    pages = -(-options.max_context_tokens // options.block_size)
    return 2 * (of.step * 3 * _INT + options.max_running * (pages * _FLOAT + 16 * _INT))


def _workspace(of: Sizes, rows: int, context: int) -> int:
    config = of.config
    return layout.decode_workspace_bytes(rows, context, config.num_heads, config.num_kv_heads, config.head_dim)


def _graphs(options: EngineOptions) -> int:
    return len(_buckets(options)) * len(_tiers(options))


def _buckets(options: EngineOptions) -> list[int]:
    most = options.max_running
    found = {*(2**i for i in range(_FEW_BUCKETS)), *range(_EVERY, most, _EVERY), most}
    return sorted(rows for rows in found if rows <= most)


def _tiers(options: EngineOptions) -> set[int]:
    return {min(_SHORT_CONTEXT, options.max_context_tokens), options.max_context_tokens}


def _matrices(of: Sizes | EncoderSizes) -> Iterator[tuple[str, _Matrix]]:
    """Every matrix by name; of stacked experts one, and how many there are of it."""
    for name, shape in of.shapes.items():
        if len(shape) == 1 or name.endswith("bias"):
            continue
        copies, out, inner = _sizes(shape)
        found = of.formats.get(name)
        yield name, _Matrix(None if found is None else found.layout(shape), out, inner, copies)


def _sizes(shape: Shape) -> tuple[int, int, int]:
    """Matrices of a tensor, and outputs and inputs of each."""
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    experts, inner, out = shape
    return experts, out, inner
