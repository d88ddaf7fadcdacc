"""Bytes of quantised matrices, prepared and while they are prepared and multiplied with; needs no torch.

Prepared bytes are exact; what the rest stands for, `kernels/packed_cpu.py` and `kernels/packed.py` make.
"""

from collections.abc import Collection, Iterator, Mapping
from math import prod

from engine.weights.formats import Format, Shape
from kernels.packed import Layout, cpu_block_rows, cpu_bytes, cpu_kernel, cpu_table_bytes

_UNPACKED = (
    5  # bytes for each number while one matrix is unpacked: bytes of words, halves, and their copies in order
)
_PLAIN = 8  # and while it is prepared: float32 or int32, twice
_KEPT = 2  # of each of a stack that is not prepared yet: its code, and its share of scales and zero points
_STACKED = 3  # matrices, as large as the largest: queries, keys and values
_BLOCK = 24  # of each number of a block that is made plain: its code as an index, float32 thrice, and its own type


def prepared_bytes(found: Format, shape: Shape, is_cpu: bool, item: int, is_tied: bool | None = None) -> int:
    """The matrices that `found` makes of the tensor of `shape`, as a backend keeps them.

    Args:
        found: how it is stored.
        shape: of the plain tensor.
        is_cpu: the cpu backend computes; otherwise the reference, which makes them plain.
        item: bytes of the backend's number type.
        is_tied: of a table of embeddings, whether it is the matrix of the logits as well; None of any other.
    """
    if not is_cpu:
        return prod(shape) * item
    if is_tied is not None:
        return cpu_table_bytes(found.layout(shape), (shape[0], shape[1]), item, is_tied)
    count, each = _matrices(shape)
    return count * cpu_bytes(found.layout(shape), each, item)


def preparing_bytes(
    formats: Mapping[str, Format],
    shapes: Mapping[str, Shape],
    is_cpu: bool,
    item: int,
    alone: Collection[str] = (),
) -> int:
    """Most that is there beside what the files hold while a stack of matrices is prepared.

    A stack is of at most three; each of `alone` is one. The cpu backend prepares it matrix by matrix, the
    reference all together.
    """
    sizes = {name: prod(_matrices(shapes[name])[1]) for name in formats}
    largest = max((size for name, size in sizes.items() if name not in alone), default=0)
    stack = _STACKED * largest
    matrices = stack * (_KEPT + item) + (largest if is_cpu else stack) * (_UNPACKED + _PLAIN)
    single = max((size for name, size in sizes.items() if name in alone), default=0)
    return max(matrices, single * (_KEPT + _UNPACKED + (0 if is_cpu else _PLAIN + item)))


def multiplying_bytes(
    formats: Mapping[str, Format], shapes: Mapping[str, Shape], item: int, tables: Collection[str] = ()
) -> int:
    """Most that one block takes of a matrix that the cpu backend makes plain at each product, or reads rows of."""
    rows = (
        min(out, cpu_block_rows(inner)) * inner
        for name, layout, (out, inner) in _layouts(formats, shapes)
        if name in tables or cpu_kernel(layout, (out, inner), item) == "codes"
    )
    return _BLOCK * max(rows, default=0)


def _layouts(
    formats: Mapping[str, Format], shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Layout, tuple[int, int]]]:
    for name, found in formats.items():
        yield name, found.layout(shapes[name]), _matrices(shapes[name])[1]


def _matrices(shape: Shape) -> tuple[int, tuple[int, int]]:
    """How many matrices a tensor is, and [out, in] of each."""
    if len(shape) == 3:
        return shape[0], (shape[2], shape[1])
    return 1, (shape[0], shape[1])
