"""The ops of a decoder's step with sizes of published models, over the op protocol: every backend has the same.

Sizes are of Llama 3.2 1B: 2,048 numbers a token, 8,192 inside the MLP, 32 query and 8 KV heads of 64. What would
stay in a cache here and does not in a model, weights and pages, is there in so many copies that it does not.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from kernels.ops import Attending, Backend, Heads, KvSpec, Matrix, Rows, Sampling
from kernels.packed import Packed

HIDDEN, INNER, VOCABULARY, CONTEXT = 2048, 8192, 128256, 4096
HEADS = Heads(32, 8, 64)
PRODUCT_ROWS = (1, 8, 32, 128, 512)
_BLOCK = 16
_BEYOND_CACHES = 256 * 2**20
_SHAPES = ((INNER, HIDDEN), (HIDDEN, INNER))
_BITS = {"int4": 4, "int8": 8, "bf16": 16, "f32": 32}
_ATTENDED = ((1, 1024), (1, 4096), (8, 1024), (8, 4096))
_PROMPTS = ((512, 0), (512, 1536))


class Case(NamedTuple):
    """One op with one set of sizes.

    Attributes:
        name: for people.
        work: calls the op `calls` times, each over other memory.
        calls: how often.
        read: bytes of weights or pages that a call has to read.
        operations: that a call has to compute, in products.
        arithmetic: of these: int8, bfloat16 or float32; "" where memory alone bounds.
    """

    name: str
    work: Callable[[], object]
    calls: int
    read: int
    operations: int = 0
    arithmetic: str = ""


def products(backend: Backend, dtype: torch.dtype, kinds: Sequence[str]) -> Iterator[Case]:
    """Products with matrices of each kind, int4 in groups of 32, and each number of rows."""
    for kind in kinds:
        for out, inner in _SHAPES:
            matrix = _matrix(kind, out, inner)
            nbytes = out * inner * _BITS[kind] // 8 + (2 * out * inner // 32 if kind == "int4" else 0)
            copies = [backend.prepare_linear([matrix]) for _ in range(-(-_BEYOND_CACHES // nbytes))]
            for rows in PRODUCT_ROWS:
                x = _hidden(backend, rows, inner)
                yield Case(
                    f"{kind} {out} x {inner}, {rows} rows",
                    _each(backend.linear, x, copies),
                    len(copies),
                    nbytes,
                    2 * rows * out * inner,
                    _arithmetic(kind, dtype),
                )


def attention(backend: Backend, item: int) -> Iterator[Case]:
    """Single tokens over contexts of 1,024 and 4,096 in shuffled pages, and prompts in part and whole.

    Args:
        backend: that attends.
        item: bytes of a number in its pages.
    """
    numbers = HEADS.kv * HEADS.dim * 2
    for batch, context in _ATTENDED:
        layers = max(2, _BEYOND_CACHES // (batch * context * numbers * item))
        rows = [(context - 1, 1)] * batch
        read = batch * context * numbers * item
        yield _attended(backend, f"attention, {batch} x 1 token over {context}", rows, layers, read, 0)
    for count, start in _PROMPTS:
        seen = sum(range(start + 1, start + count + 1))
        operations = 4 * HEADS.query * HEADS.dim * seen
        read = (start + count) * numbers * item
        yield _attended(backend, f"attention, {count} tokens after {start}", [(start, count)], 2, read, operations)


def small(backend: Backend) -> Iterator[Case]:
    """What lies between the products: norms, gates, rotation with the writing of keys and values."""
    norm = backend.prepare_vector(torch.ones(HIDDEN))
    for rows in (1, 512):
        x, gate = _hidden(backend, rows, HIDDEN), _hidden(backend, rows, 2 * INNER)
        yield Case(f"add and norm, {rows} rows", _calls(backend.add_rms_norm, x, x, norm, 1e-5), 1, x.nbytes * 2)
        yield Case(f"gate, {rows} rows", _calls(backend.gated, gate, "silu"), 1, gate.nbytes)
        yield _rotated(backend, rows)


def sampling(backend: Backend) -> Iterator[Case]:
    """Draws from logits over 128,256 tokens: the likeliest, and with temperature and top-p."""
    for rows in (1, 32):
        logits = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0))
        for name, temperature, top_p in (("greedy", 0.0, 1.0), ("top-p 0.9", 0.8, 0.9)):
            wide = torch.full((rows,), 1.0, dtype=torch.float64)
            none = torch.zeros(rows, dtype=torch.int64)
            how = Sampling(wide * temperature, none, wide * top_p, wide * 0.5, wide * 0)
            yield Case(f"draw {name}, {rows} rows", _calls(backend.sample, logits, how), 1, logits.nbytes)


def _matrix(kind: str, out: int, inner: int) -> Matrix:
    generator = torch.Generator().manual_seed(0)
    if _BITS[kind] < 16:
        half = 1 << (_BITS[kind] - 1)
        codes = torch.randint(1 - half, half, (out, inner), dtype=torch.int8, generator=generator)
        columns = 32 if kind == "int4" else inner
        return Packed(codes, torch.full((out, inner // columns), 0.01), 1, columns, _BITS[kind])
    drawn = torch.randn(out, inner, generator=generator)
    return drawn.bfloat16() if kind == "bf16" else drawn


def _arithmetic(kind: str, dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "float32"
    return "int8" if _BITS[kind] < 16 else "bfloat16"


def _hidden(backend: Backend, rows: int, width: int) -> Any:
    """Activations as ops hand them on."""
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    return drawn.to(getattr(backend, "dtype", torch.float32))


def _each(op: Callable[..., object], x: Any, weights: Sequence[Any]) -> Callable[[], None]:
    def work() -> None:
        for weight in weights:
            op(x, weight)

    return work


def _calls(op: Callable[..., object], *args: Any) -> Callable[[], object]:
    return lambda: op(*args)


def _step(backend: Backend, rows: Sequence[tuple[int, int]], layers: int) -> tuple[Any, Any]:
    """Pages of `layers` layers, and a step over rows of (start, count); pages lie in no order."""
    pages = [-(-(start + count) // _BLOCK) for start, count in rows]
    kv = backend.allocate_kv(KvSpec(layers, sum(pages), _BLOCK, HEADS.kv, HEADS.dim))
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)).tolist()
    tables = [[order.pop() for _ in range(count)] for count in pages]
    tokens = sum(count for _, count in rows)
    starts, counts = zip(*rows, strict=True)
    return kv, backend.begin(Rows([0] * tokens, starts, counts, tables), kv)


def _attended(
    backend: Backend, name: str, rows: Sequence[tuple[int, int]], layers: int, read: int, operations: int
) -> Case:
    kv, batch = _step(backend, rows, layers)
    q = _hidden(backend, sum(count for _, count in rows), HEADS.query * HEADS.dim)
    attending = Attending(HEADS.dim**-0.5)

    def work() -> None:
        for layer in range(layers):
            backend.paged_attention(q, HEADS, attending, kv, layer, batch)

    return Case(name, work, layers, read, operations, "bfloat16" if operations else "")


def _rotated(backend: Backend, rows: int) -> Case:
    rope = backend.prepare_rope([1 / 10000 ** (i / 32) for i in range(32)], CONTEXT)
    kv, batch = _step(backend, [(0, rows)], 1)
    qkv = _hidden(backend, rows, (HEADS.query + 2 * HEADS.kv) * HEADS.dim)
    work = _calls(backend.rope_and_write_kv, qkv, HEADS, rope, kv, 0, batch)
    return Case(f"rotate and write keys, {rows} rows", work, 1, qkv.nbytes)
