"""Bytes that a model takes where the native kernels compute, part by part, from its configuration alone.

Weights and KV pages are exact. The rest are upper bounds, each term of which names the memory it stands for:
`kernels/native/program.py` plans the arena of a step, and the library says what its ops take beside. No torch.

Letters: as in `engine.footprint`, and N rows of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from engine.models.spec import Mixture, ModelConfig
from engine.weights.formats import Shape
from kernels.native import layout
from kernels.native.layout import Form, RowForm
from kernels.packed import Layout

if TYPE_CHECKING:
    from engine.encoder_footprint import EncoderSizes
    from engine.footprint import Sizes

_FLOAT = 4
_AT_ONCE = 2**22  # numbers of a matrix that are brought at once into the form that is packed
_PACKING = 2 * _FLOAT  # bytes for each of them
_SCALING = 6 * _FLOAT  # bytes for each scale and zero while they are laid out in tiles
_SOURCE = 5  # bytes for each number of a stack while its codes are unpacked, and kept until it is packed
_STACKED = 3  # matrices of one input, such as queries, keys and values
_PANEL = 4 * (1024 * 64 + (256 + 12) * 64)  # bytes of weights that a thread unpacks at once, and of their sums
_QUERIES = 32  # that a thread attends with at once
_KEYS = 256  # whose scores it has then
_SPLIT = 64 * layout.TILE  # tokens of a context between which threads may share a row
_ITEM_ROWS = 96  # of an expert that are answered at once
_PIECES = 8  # for each thread; with more of them rows are not shared


class _Matrix(NamedTuple):
    form: Form
    out: int
    inner: int
    copies: int

    @property
    def nbytes(self) -> int:
        return self.copies * layout.matrix_bytes(self.form, self.out, self.inner)


def prepared_bytes(of: Sizes | EncoderSizes) -> dict[str, int]:
    """Each tensor as the native backend keeps it: vectors in float32, matrices packed."""
    sizes = {name: _FLOAT * prod(shape) for name, shape in of.shapes.items()}
    return sizes | {name: matrix.nbytes for name, matrix in _matrices(of)}


def rope_bytes(of: Sizes, rotated: int) -> int:
    """Cosines and sines, float32 [positions, rotated / 2] each."""
    return of.positions * rotated * _FLOAT


def block_bytes(of: Sizes) -> int:
    """One KV page over all layers."""
    config, options = of.config, of.options
    kv_type = layout.KV_TYPES[options.kv_dtype]
    page = layout.kv_page_bytes(kv_type, options.block_size, config.num_kv_heads, config.head_dim)
    return config.num_layers * page


def packing_bytes(of: Sizes | EncoderSizes) -> int:
    """Most that is there beside files and prepared tensors while a stack of matrices is packed."""
    largest, unpacked, scales = 0, 0, 0
    for name, matrix in _matrices(of):
        stack = 1 if matrix.out == of.config.vocab_size else _STACKED
        largest = max(largest, matrix.out * matrix.inner)
        if name in of.formats:
            unpacked = max(unpacked, stack * _SOURCE * matrix.out * matrix.inner)
            scales = max(scales, stack * matrix.out * -(-matrix.inner // (matrix.form.group or matrix.inner)))
    row = max((matrix.inner for _, matrix in _matrices(of)), default=0)
    at_once = min(largest, max(_AT_ONCE, row * layout.TILE))
    return unpacked + scales * _SCALING + at_once * _PACKING


def arena_bytes(of: Sizes) -> int:
    """The residual stream all along, and at one moment an op's input and output in all forms that are read.

    One value more may lie between holes that are too small for it.
    """
    config = of.config
    hidden, query, inner = config.hidden_size, of.query, of.intermediate
    qkv = _FLOAT * (of.query + 2 * of.kv)
    moments = [_rows(of, hidden) + qkv, qkv + _rows(of, query), 2 * _rows(of, hidden)]
    moments += [_rows(of, query) + _rows(of, hidden)]
    widest = max(qkv, _rows(of, query), _rows(of, hidden))
    if any(not isinstance(layer.mlp, Mixture) for layer in config.layers):
        moments += [2 * _FLOAT * inner + _rows(of, hidden), 2 * _FLOAT * inner + _rows(of, inner)]
        widest = max(widest, 2 * _FLOAT * inner)
    step = of.options.max_step_tokens
    logits = of.options.max_running * (_rows(of, hidden) + _FLOAT * config.vocab_size)
    stream = step * _FLOAT * hidden
    return stream + max(step * (max(moments) + widest), step * 2 * _rows(of, hidden) + logits)


def scratch_bytes(of: Sizes) -> int:
    """What one op takes at most: inputs laid out for the products of a stack, or attention, or a mixture."""
    return max(products_bytes(of), _attention(of), _mixture(of))


def products_bytes(of: Sizes | EncoderSizes, rows: int = 0, threads: int = 0) -> int:
    """Inputs laid out for a stack of matrices, perhaps in an order for each, and what each thread unpacks.

    Args:
        of: the sizes.
        rows: of inputs; 0: the largest step.
        threads: that multiply together; 0: all.
    """
    widest = max(matrix.inner for _, matrix in _matrices(of))
    own = max(_PANEL, 8 * _up(widest, layout.STRIDE))
    return (rows or of.step) * _STACKED * _laid(of, widest) + (threads or of.options.threads) * own


def _attention(of: Sizes) -> int:
    """Each thread's queries, scores and answers; answers of all tokens; and of few tokens those of each split."""
    options, config = of.options, of.config
    dim = _up(config.head_dim, layout.TILE)
    room = _QUERIES + (_QUERIES + 1) * (dim + _KEYS) + layout.TILE * dim + 2 * _QUERIES * dim
    pages = -(-options.max_context_tokens // options.block_size)
    splits = -(-pages * _up(options.block_size, layout.TILE) // _SPLIT)
    heads = min(of.fold, _QUERIES)
    pieces = _PIECES * options.threads // (config.num_kv_heads * -(-of.fold // heads))
    shared = min(pieces * (_QUERIES // heads), options.max_step_tokens)
    divided = shared * config.num_heads * splits * (dim + layout.TILE)
    return _FLOAT * (options.threads * room + options.max_step_tokens * of.query + divided) + 64


def _mixture(of: Sizes) -> int:
    """The largest mixture: scores, choices and answers of all tokens, and its router's or experts' products."""
    return max(
        (_mixture_of(of, layer.mlp) for layer in of.config.layers if isinstance(layer.mlp, Mixture)), default=0
    )


def _mixture_of(of: Sizes, mlp: Mixture) -> int:
    """Some rows of an expert are a thread's item, or the team's where there are few: what it reads and makes."""
    hidden, threads, chosen = of.config.hidden_size, of.options.threads, of.step * mlp.top_k
    shared = _FLOAT * (of.step * mlp.experts + chosen * (3 + hidden) + mlp.experts)
    items = 3 * _FLOAT * (min(chosen, mlp.experts) + chosen // _ITEM_ROWS + 2) + 128 * threads + 1024
    desk = _ITEM_ROWS * (3 * _FLOAT * mlp.intermediate + _FLOAT * hidden + _rows(of, hidden)) + 1024
    experts = threads * (desk + products_bytes(of, _ITEM_ROWS, 1))
    return shared + items + max(experts, products_bytes(of))


def _rows(of: Sizes, width: int) -> int:
    """Bytes of a row of activations in all forms that somebody may read, and float32."""
    return sum(layout.row_bytes(_forms(of) | {RowForm(layout.FLOAT32)}, width).values())


def _laid(of: Sizes | EncoderSizes, width: int) -> int:
    """Bytes of a row that is laid out for products, in whichever form takes most."""
    return max(layout.row_bytes(_forms(of), _up(width, layout.STRIDE)).values()) + 2 * _FLOAT * -(-width // 32)


def _forms(of: Sizes | EncoderSizes) -> set[RowForm]:
    return {layout.needed(matrix.form) for _, matrix in _matrices(of)}


def _matrices(of: Sizes | EncoderSizes) -> Iterator[tuple[str, _Matrix]]:
    """Every matrix by name; of stacked experts one, and how many there are of it."""
    for name, shape in of.shapes.items():
        if len(shape) == 1 or name.endswith("bias"):
            continue
        count, out, inner = _sizes(of, shape)
        found = of.formats.get(name)
        known: Layout | None = None if found is None else found.layout(shape)
        yield name, _Matrix(layout.choose(known, inner, of.item), out, inner, count)


def _sizes(of: Sizes | EncoderSizes, shape: Shape) -> tuple[int, int, int]:
    """Matrices of a tensor, and outputs and inputs of each; gate and up that come in turns are two."""
    if len(shape) == 2:
        return 1, *shape
    experts, inner, out = shape
    is_both = isinstance(of.config, ModelConfig) and out == 2 * of.config.layers[0].mlp.intermediate
    return (2 * experts, out // 2, inner) if is_both else (experts, out, inner)


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
