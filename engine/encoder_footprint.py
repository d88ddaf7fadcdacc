"""Bytes that an encoder takes of the memory its worker computes in, part by part, from its configuration alone.

Weights are exact: the sum of the tensors that the backend makes; there are no pages. Activations and loading are
upper bounds, each term of which names the tensors it stands for; `kernels/encoding.py` makes them. Needs no torch.

Letters: T tokens of a step, L tokens of the longest prompt, H hidden, I intermediate, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

from engine import native_footprint, triton_footprint
from engine.footprint import ITEM
from engine.models.encoders.spec import EncoderConfig
from engine.models.tensors import Shapes
from engine.options import EngineOptions
from engine.weights.footprint import multiplying_bytes, prepared_bytes, preparing_bytes
from engine.weights.formats import Format

_FLOAT = 4
_INT = 8
_TILE = 16  # rows of a tile, in both backends
_QUERIES = 128  # tokens of a row whose scores are laid out at once
_STEP_TOKENS = 512
_SCRATCH = 24 * 2**20  # buffers of the BLAS and of the allocator, which do not grow with the model


@dataclass(frozen=True, slots=True)
class EncoderSizes:
    """The sizes that footprints are made of.

    Attributes:
        config: of the model.
        shapes: its tensors.
        options: with every default filled in.
        formats: of the tensors that are quantised.
    """

    config: EncoderConfig
    shapes: Shapes
    options: EngineOptions
    formats: Mapping[str, Format] = field(default_factory=dict)

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return ITEM[self.options.dtype]

    @property
    def is_cpu(self) -> bool:
        """Torch's kernels compute; otherwise the native ones, or the reference."""
        return self.options.backend == "torch"

    @property
    def is_native(self) -> bool:
        """The native kernels compute; all but products is torch's."""
        return self.options.backend == "native"

    @property
    def is_triton(self) -> bool:
        """Triton's kernels compute; all but products, gates and tables is torch's."""
        return self.options.backend == "triton"

    @property
    def wide(self) -> int:
        """Bytes of a number of activations."""
        return _FLOAT if self.is_native else self.item

    @property
    def step(self) -> int:
        """T, whole tiles."""
        return -(-self.options.max_step_tokens // _TILE) * _TILE

    @property
    def inner(self) -> int:
        """Numbers of a token inside the MLP, gate and up."""
        return self.config.intermediate_size * (2 if self.config.is_gated else 1)


def resolve(config: EncoderConfig, options: EngineOptions, cores: int) -> EngineOptions:
    """`options` with every default filled in: no pages, and steps that the longest prompt fits into.

    Where steps are asked for that are smaller, prompts are as short as they; engine-text goes by that, too.

    Raises:
        EngineError: OPTIONS_INVALID names the option.
    """
    context = options.max_context_tokens or config.max_context_tokens
    step = options.max_step_tokens or max(_STEP_TOKENS, context)
    asked = replace(options, max_step_tokens=step, max_context_tokens=min(context, step), kv_blocks=1)
    return replace(asked.resolve(config.max_context_tokens, 0, 0, cores), kv_blocks=0)


def weights_bytes(of: EncoderSizes) -> int:
    """Every prepared tensor: stacked matrices are as large as their parts."""
    return sum(_prepared(of).values()) + _turns_bytes(of)


def _prepared(of: EncoderSizes) -> dict[str, int]:
    """Each tensor as a backend keeps it."""
    if of.is_native:
        return native_footprint.prepared_bytes(of)
    if of.is_triton:
        return triton_footprint.prepared_bytes(of)
    return {name: prod(shape) * of.item for name, shape in of.shapes.items()} | {
        name: prepared_bytes(found, of.shapes[name], of.is_cpu, of.item) for name, found in of.formats.items()
    }


def _turns_bytes(of: EncoderSizes) -> int:
    """Cosines and sines, float32 [L, 2, 1, head_dim / 2], of each base of frequencies."""
    return len(of.config.thetas) * of.options.max_context_tokens * of.config.head_dim * _FLOAT


def loading_peak(of: EncoderSizes, stored: Mapping[str, int]) -> int:
    """Most that is held while tensors are prepared one stack after another; as `engine.footprint.loading_peak`.

    Args:
        of: the sizes.
        stored: bytes of each tensor in its file; of those that are not needed, one at a time is held.
    """
    prepared = _prepared(of)
    if of.options.is_cuda:
        return sum(prepared.values()) + triton_footprint.packing_bytes(of) + _turns_bytes(of)
    between = sum(max(stored.get(name, size), size) for name, size in prepared.items())
    spare = max((size for name, size in stored.items() if name not in prepared), default=0)
    stack = max(3 * of.config.hidden_size, of.inner, of.config.vocab_size) * of.config.hidden_size
    widest = max((-(-stored.get(name, 0) // prod(shape)) for name, shape in of.shapes.items()), default=of.item)
    converts = any(stored.get(name, size) != size for name, size in prepared.items())
    copies = stack * max(of.item, widest) if converts else 0
    moment = max(stack * of.item + copies, preparing_bytes(of.formats, of.shapes, of.is_cpu, of.item))
    if of.is_native:
        moment = native_footprint.packing_bytes(of)
    if of.is_triton:
        moment = triton_footprint.packing_bytes(of)
    angles = of.options.max_context_tokens * of.config.head_dim // 2 * (_FLOAT + 6 * 8)
    return between + spare + moment + _turns_bytes(of) + (angles if of.config.thetas else 0)


def activation_bytes(of: EncoderSizes) -> int:
    """Most that one step takes beside the weights.

    The step's numbers, the layer's input, its half's input and output and their sum are there all along; beside
    them at one moment the attention or the MLP.
    """
    numbers = 3 * of.step * _INT
    stream = 5 * of.step * of.config.hidden_size * of.wide
    needed = numbers + stream + max(_attention(of), _mlp(of)) + _products(of)
    return triton_footprint.allocated_bytes(needed) if of.is_triton else needed + _SCRATCH


def _products(of: EncoderSizes) -> int:
    """Of the cpu backend with quantised matrices: a block of one, an input in its order, and answers in parts.

    Of native products their scratch.
    """
    if of.is_native:
        return native_footprint.products_bytes(of)
    if of.is_triton:
        return triton_footprint.scratch_bytes(of)
    if not of.formats or not of.is_cpu:
        return 0
    longest = max(max(of.shapes[name]) for name in of.formats)
    return multiplying_bytes(of.formats, of.shapes, of.item) + 2 * of.step * longest * of.item


def _attention(of: EncoderSizes) -> int:
    """The projection (twice where its tiles are joined) and the answers of all rows, and what one row makes.

    That is queries, keys and values as they are rotated, laid out, and in float32; the scores of some of its
    tokens, scaled and masked, and their weights; the answers, twice.
    """
    hidden, longest = of.config.hidden_size, of.options.max_context_tokens
    rows = of.step * hidden * 7 * of.wide
    row = longest * hidden * (3 * of.wide + 10 * _FLOAT)
    tokens = min(_QUERIES, longest)
    scores = of.config.num_heads * tokens * longest * 3 * _FLOAT + tokens * longest * (2 * _INT + 1)
    return rows + row + scores


def _mlp(of: EncoderSizes) -> int:
    """What goes in and comes out (twice where tiles are joined), and five of its size in float32 while a function
    is applied."""
    return of.step * of.inner * (4 * of.wide + 5 * _FLOAT)
