"""Bytes that a model takes of the memory its worker computes in, part by part, from its configuration alone.

Weights and KV pages are exact: the sum of the tensors that the backend makes. Activations and loading are upper
bounds, each term of which names the tensor it stands for; `kernels/cpu.py` and `kernels/reference.py` make those
tensors. Needs no torch, and no weight is read.

Letters: T tokens of a step, L tokens of a context, H hidden, I intermediate, Q query numbers of a token, K key
numbers of a token, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from engine import native_footprint, triton_footprint
from engine.models.spec import Mixture, ModelConfig
from engine.models.tensors import Shapes
from engine.options import EngineOptions
from engine.weights.footprint import multiplying_bytes, prepared_bytes, preparing_bytes
from engine.weights.formats import Format

ITEM = {"float32": 4, "bfloat16": 2}
_FLOAT = 4
_INT = 8
_TILE = 16  # rows of a tile, in both backends
_SPLIT = 64  # tokens of a KV split of the cpu backend, in deterministic mode
_MAX_COPY = 2**22  # numbers of keys it lays out at once there, and
_MAX_CONTEXT = 2**25  # numbers of keys and values of the single tokens that it attends together
_MAX_SCORES = 2**20  # scores it has at once where softmax is written out
_DRAWN_WIDE = 2**18  # logits that are taken to float64 at once while tokens are drawn
_DRAWING = 9 * 8 + 1  # bytes for each of these: float64 copies, order, one mask
_ADJUSTED = 2 * 8  # and for each number of all logits: the rows that have adjustments, as they are and in float64
_SCORED = 64  # tokens of a prompt whose logits are computed at once
_SCORED_WIDE = 2**21  # numbers of them that are taken to float64 at once
_SCORING = 5 * 8 + 4  # bytes for each of these: the logits, their log probabilities, order, masks
_SCRATCH = 24 * 2**20  # buffers of the BLAS and of the allocator, which do not grow with the model
_MULTIPLYING = 3 * 4  # bytes for each input of a quantised matrix in bfloat16: in float32, in steps, and as bytes
_COMPILED = 12 * 2**20  # products in bfloat16 of the last few shapes, as `kernels/cpu.py` bounds them


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that footprints are made of.

    Attributes:
        config: of the model.
        shapes: its tensors.
        options: with every default filled in.
        formats: of the tensors that are quantised.
        embeddings: the table of embeddings, by name: whether it is the matrix of the logits as well.
    """

    config: ModelConfig
    shapes: Shapes
    options: EngineOptions
    formats: Mapping[str, Format] = field(default_factory=dict)
    embeddings: Mapping[str, bool] = field(default_factory=dict)

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return ITEM[self.options.dtype]

    @property
    def query(self) -> int:
        """Q."""
        return self.config.num_heads * self.config.head_dim

    @property
    def kv(self) -> int:
        """K."""
        return self.config.num_kv_heads * self.config.head_dim

    @property
    def fold(self) -> int:
        """Query heads of one KV head."""
        return self.config.num_heads // self.config.num_kv_heads

    @property
    def intermediate(self) -> int:
        """I, of the widest MLP."""
        return max(layer.mlp.intermediate for layer in self.config.layers)

    @property
    def step(self) -> int:
        """T, whole tiles."""
        return _up(self.options.max_step_tokens, _TILE)

    @property
    def context(self) -> int:
        """L, whole pages, and whole splits where there are any."""
        return _up(self.options.max_context_tokens, self.unit)

    @property
    def unit(self) -> int:
        """Tokens that contexts are multiples of when they are attended to: a page, or a split."""
        block = self.options.block_size
        return block * (max(1, _SPLIT // block) if self.options.deterministic else 1)

    @property
    def is_cpu(self) -> bool:
        """Torch's kernels compute; otherwise the native ones, or the reference."""
        return self.options.backend == "torch"

    @property
    def is_native(self) -> bool:
        """The native kernels compute."""
        return self.options.backend == "native"

    @property
    def is_triton(self) -> bool:
        """Triton's kernels compute."""
        return self.options.backend == "triton"

    @property
    def positions(self) -> int:
        """Positions that the rotary tables hold."""
        return positions(self.options)


def positions(options: EngineOptions) -> int:
    """Positions that a request can reach: the context, or less where all KV pages together hold less."""
    return min(options.max_context_tokens, options.kv_blocks * options.block_size)


def parameters(shapes: Shapes) -> int:
    """Numbers in the model's files."""
    return sum(map(prod, shapes.values()))


def weights_bytes(of: Sizes) -> int:
    """Every prepared tensor: stacked matrices are as large as their parts, a tied head costs nothing."""
    return sum(_prepared(of).values()) + _rope_bytes(of)


def _prepared(of: Sizes) -> dict[str, int]:
    """Each tensor as a backend keeps it; a norm whose weight has an offset stays in float32."""
    if of.is_native:
        return native_footprint.prepared_bytes(of)
    if of.is_triton:
        return triton_footprint.prepared_bytes(of)
    wide = max(of.item, _FLOAT) if of.config.norm_offset else of.item
    plain = {
        name: prod(shape) * (wide if len(shape) == 1 and name.endswith(".weight") else of.item)
        for name, shape in of.shapes.items()
    }
    return plain | {
        name: prepared_bytes(found, of.shapes[name], of.is_cpu, of.item, of.embeddings.get(name))
        for name, found in of.formats.items()
    }


def _rope_bytes(of: Sizes) -> int:
    """cpu: float32 [positions, 2, 1, rotated]; reference: two [positions, rotated / 2]; of each embedding."""
    if of.is_native:
        return native_footprint.rope_bytes(of, _rotated(of))
    if of.is_triton:
        return triton_footprint.rope_bytes(of, _rotated(of))
    return of.positions * _rotated(of) * (2 * _FLOAT if of.is_cpu else of.item)


def _rotated(of: Sizes) -> int:
    """Rotated numbers of a head, over all rotary embeddings."""
    return sum(rope.rotated(of.config.head_dim) for rope in of.config.ropes)


def block_bytes(of: Sizes) -> int:
    """One KV page over all layers."""
    if of.is_native:
        return native_footprint.block_bytes(of)
    if of.is_triton:
        return triton_footprint.block_bytes(of)
    return of.config.num_layers * 2 * of.kv * of.options.block_size * of.item


def kv_bytes(of: Sizes) -> int:
    """All KV pages; the cpu backend has one more, which stays zero."""
    return (of.options.kv_blocks + of.is_cpu) * block_bytes(of)


def loading_peak(of: Sizes, stored: Mapping[str, int]) -> int:
    """Most that is held while tensors are prepared one stack after another.

    What the files hold is read whole, then goes stack by stack as its prepared form takes its place; at one moment
    there are the parts of a stack, their copies in another number type, and the stack.

    Args:
        of: the sizes.
        stored: bytes of each tensor in its file; those that are missing count as they will be prepared.
    """
    prepared = _prepared(of)
    if of.options.is_cuda:
        return sum(prepared.values()) + triton_footprint.packing_bytes(of) + _rope_bytes(of)
    held = {name: stored.get(name, size) for name, size in prepared.items()}
    between = sum(max(held[name], size) for name, size in prepared.items())
    rest = _experts(of, held) + _rope_bytes(of) + _rope_angles(of)
    if of.is_native:
        return between + native_footprint.packing_bytes(of) + rest
    if of.is_triton:
        return between + triton_footprint.packing_bytes(of) + rest
    config = of.config
    is_table_plain = any(of.shapes[name][0] == config.vocab_size for name in of.shapes.keys() - of.formats.keys())
    stacks = [2 * of.intermediate, of.query + 2 * of.kv, config.vocab_size * is_table_plain]
    stack = max(stacks) * config.hidden_size
    converts = any(held[name] != size for name, size in prepared.items())
    widest = max((held[name] // prod(shape) for name, shape in of.shapes.items()), default=of.item)
    copies = stack * max(of.item, widest) if converts else 0
    alone = [name for name in of.formats if of.shapes[name][0] == config.vocab_size]  # in no stack
    preparing = preparing_bytes(of.formats, of.shapes, of.is_cpu, of.item, alone)
    moment = max(stack * of.item + copies, preparing)
    return between + moment + rest


def _experts(of: Sizes, held: Mapping[str, int]) -> int:
    """The experts of one layer, whose parts are all there until the last is prepared."""
    numbers = [
        3 * layer.mlp.experts * layer.mlp.intermediate * of.config.hidden_size
        for layer in of.config.layers
        if isinstance(layer.mlp, Mixture)
    ]
    widest = max((-(-held[name] // prod(shape)) for name, shape in of.shapes.items()), default=of.item)
    return max(numbers, default=0) * widest


def _rope_angles(of: Sizes) -> int:
    """Angles in float32 and float64, their cosines and sines, and the joined tables before they are rounded."""
    return of.positions * _rotated(of) // 2 * (_FLOAT + 8 * 8)


def activation_bytes(of: Sizes) -> int:
    """Most that one step takes beside weights and pages.

    The residual stream, the layer's input and its output are there all along, with the masks of all groups; beside
    them at one moment either the rotation, the attention, the MLP, or logits and drawing.
    """
    if of.is_native:
        return _native_activations(of)
    if of.is_triton:
        return triton_footprint.activation_bytes(of)
    stream = 4 * of.step * of.config.hidden_size * of.item
    rows = of.step * 4 * _INT + of.options.max_running * (of.context // of.options.block_size + 1) * _INT
    masks = _masks(of) if of.is_cpu else of.options.max_running * of.context * _INT
    attention = _cpu_attention(of) if of.is_cpu else _reference_attention(of)
    moments = max(_rotation(of), attention, _mlp(of), _logits(of)) + _products(of)
    fixed = _SCRATCH + (_COMPILED if of.item < _FLOAT else 0)
    return stream + rows + masks + moments + fixed


def _native_activations(of: Sizes) -> int:
    """A step's rows, its arena and scratch, and drawing out of its logits; or the scoring of a prompt's."""
    options = of.options
    rows = of.step * 4 * _INT + options.max_running * (of.context // options.block_size + 1) * _INT
    step = native_footprint.arena_bytes(of) + native_footprint.scratch_bytes(of)
    return rows + step + _logits(of) + _SCRATCH


def _products(of: Sizes) -> int:
    """Of the cpu backend with quantised matrices: a block of one, an input in its order, and answers in parts.

    Answers of the matrix of the logits are counted with the logits.
    """
    if not of.formats or not of.is_cpu:
        return 0
    logits = of.config.vocab_size
    longest = max(size for name in of.formats for size in of.shapes[name][-2:] if size != logits)
    blocks = multiplying_bytes(of.formats, of.shapes, of.item, of.embeddings)
    return blocks + of.step * longest * (2 * of.item if of.item == _FLOAT else _MULTIPLYING)


def _masks(of: Sizes) -> int:
    """Of the cpu backend: what each token must not see, for each window, and once more while one is made."""
    windows = {layer.window for layer in of.config.layers}
    longest = [min(of.context, window + of.step + 2 * of.unit) if window else of.context for window in windows]
    return of.step * (sum(longest) + max(longest) * (windows != {0}))


def _rotation(of: Sizes) -> int:
    """The projection (twice where its tiles are joined), and queries and keys in float32, four times.

    Where they are normed, they are there twice more in float32 and once in the number type.
    """
    turned = 4 * _FLOAT + 2 * of.item + (2 * _FLOAT + of.item if of.config.qk_norm else 0)
    return of.step * ((of.query + 2 * of.kv) * of.item * 2 + (of.query + of.kv) * turned)


def _mlp(of: Sizes) -> int:
    """Gate and up (twice where tiles are joined), and four of the gate's size in float32 while it is applied.

    A mixture has one expert's at a time, for at most all tokens; beside it the sum of answers in float32, the rows
    of an expert and its answers (each twice), and the scores of all experts.
    """
    gated = of.step * of.intermediate * (4 * of.item + 4 * _FLOAT)
    experts = max((layer.mlp.experts for layer in of.config.layers if isinstance(layer.mlp, Mixture)), default=0)
    if not experts:
        return gated
    return gated + of.step * (of.config.hidden_size * (4 * of.item + 4 * _FLOAT) + experts * (4 * _FLOAT + _INT))


def _logits(of: Sizes) -> int:
    """Logits (in tiles: twice) and in float32, with what drawing makes of them, or the scoring of a prompt."""
    vocabulary, own = of.config.vocab_size, 2 * of.item + _FLOAT
    drawn = _up(of.options.max_running, _TILE) * vocabulary
    drawing = drawn * (own + _ADJUSTED) + max(vocabulary, min(drawn, _DRAWN_WIDE)) * _DRAWING
    scored = max(drawn, _SCORED * vocabulary)
    return max(drawing, scored * own + max(vocabulary, min(scored, _SCORED_WIDE)) * _SCORING)


def _reference_attention(of: Sizes) -> int:
    """Each token alone: its keys and values and their transposed copies, scores and weights of all heads."""
    one = of.context * (2 * 2 * of.kv + 3 * of.config.num_heads) * of.item
    return one + 3 * of.step * of.query * of.item + of.context * 5 * _INT


def _cpu_attention(of: Sizes) -> int:
    """Queries and their answers, the keys and values of one group copied out of the pages, and its masks."""
    tokens = 4 * of.step * of.query * (_FLOAT if of.options.deterministic else of.item)
    longest = 2 * of.context * of.kv
    group = max(longest, min(of.options.max_running * longest, _MAX_CONTEXT))
    copied = group * of.item
    if of.options.deterministic:
        return tokens + copied + group * _FLOAT + _tiles(of, group)
    masks = of.step * of.context * (1 + of.fold * (1 + of.item))
    return tokens + copied + max(masks, _blocks(of, group))


def _blocks(of: Sizes, group: int) -> int:
    """With softcap or sinks: keys, values and queries in float32, and as many scores three times."""
    if not of.config.attention_softcap and not any(layer.has_sinks for layer in of.config.layers):
        return 0
    alone = group // 2 // of.config.head_dim * of.fold  # the scores of single tokens over the whole group
    scores = max(alone, _MAX_SCORES, of.context * of.config.num_heads)
    return group * _FLOAT + 3 * scores * _FLOAT + 4 * of.step * of.query * _FLOAT


def _tiles(of: Sizes, group: int) -> int:
    """Splits of one group laid out for products: keys, values, queries, scores, weights and answers, and masks."""
    tiles = -(-of.step // -(-_TILE // of.fold))
    keys = max(group // 2, min(_MAX_COPY, tiles * of.context * of.kv))
    rows = max(_TILE, of.fold) + of.fold
    split = of.options.block_size * max(1, _SPLIT // of.options.block_size)
    products = 2 * keys + 3 * keys * rows // split + 4 * keys * rows // of.config.head_dim
    return products * _FLOAT + 2 * (of.step + _TILE) * of.context


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
