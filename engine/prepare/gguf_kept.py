"""Blocks of GGUF that our own format holds exactly: their codes and scales are moved, no number is changed.

Q8_0 is int8 and Q4_0 int4, symmetric, with a scale for each 32 numbers of a row; so is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine.errors import EngineError
from engine.prepare.gguf import BLOCKS, TensorInfo
from engine.prepare.gguf_blocks import Bytes
from engine.prepare.weights_file import TensorPlan
from engine.weights.int_weights import IntWeights

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FORMATS = {"Q8_0": IntWeights(8, 32, True), "Q4_0": IntWeights(4, 32, True)}


class Kept(NamedTuple):
    """What stays quantised.

    Attributes:
        matrices: of all linear layers, by their names on Hugging Face.
        type: theirs.
        tables: embeddings, and the matrix of the logits where there is one.
        table_type: theirs; empty where they do not stay so.
    """

    type: str
    matrices: frozenset[str]
    tables: frozenset[str] = frozenset()
    table_type: str = ""

    @property
    def stated(self) -> dict[str, Any]:
        """As config.json says it."""
        tables = {"embeddings": _stated(self.table_type)} if self.tables else {}
        return {"quant_method": "cloister", **_stated(self.type), **tables}

    def holds(self, name: str) -> bool:
        """The matrix `name` stays quantised."""
        return name in self.matrices or name in self.tables

    def plans(self, name: str, shape: tuple[int, ...]) -> dict[str, TensorPlan]:
        """The tensors in the place of a matrix: its codes, then its scales."""
        stored = _FORMATS[self.type if name in self.matrices else self.table_type].stored(name, shape)
        return {
            key: TensorPlan(value.dtypes[0] if key.endswith(".codes") else "F16", value.shapes[0])
            for key, value in stored.items()
        }


def find_kept(matrices: Mapping[str, TensorInfo]) -> Kept | None:
    """Where all these matrices, by their names on Hugging Face, are of one type that can be kept; else None."""
    kept = _one_type(matrices)
    return Kept(kept, frozenset(matrices)) if kept else None


def keep_tables(kept: Kept | None, tables: Mapping[str, TensorInfo]) -> Kept:
    """With embeddings and the matrix of the logits, too.

    Raises:
        EngineError: GGUF_UNSUPPORTED, they, or the linear layers, are not all of one type that can be kept.
    """
    found = _one_type(tables)
    if kept is None or not found:
        given = ", ".join(sorted({tensor.type for tensor in tables.values()}))
        what = f"embeddings in {given}" if kept is not None else "linear layers of this file"
        raise EngineError(
            "GGUF_UNSUPPORTED",
            f"the {what} cannot be kept as they are; {', '.join(_FORMATS)} can, if all are alike",
        )
    return kept._replace(tables=frozenset(tables), table_type=found)


def _one_type(matrices: Mapping[str, TensorInfo]) -> str:
    types = {tensor.type for tensor in matrices.values()}
    return types.pop() if len(types) == 1 and types <= _FORMATS.keys() else ""


def _stated(kind: str) -> dict[str, Any]:
    found = _FORMATS[kind]
    return {"bits": found.bits, "group_size": found.group, "symmetric": True}


def split_blocks(given: str, tensor: TensorInfo, content: bytes) -> tuple[Bytes, NDArray[np.uint16]]:
    """Codes [rows, in], as bytes, and the bits of scales [rows, in / 32] of whole rows.

    Raises:
        EngineError: GGUF_INVALID, a scale is infinite or none.
    """
    columns, (block, size) = tensor.shape[1], BLOCKS[tensor.type]
    blocks = np.frombuffer(content, np.uint8).reshape(-1, columns // block, size)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view("<u2")[:, :, 0]
    if not np.isfinite(scales.view(np.float16)).all():
        raise EngineError("GGUF_INVALID", f"tensor {given[:80]!a} has a scale that is infinite or none")
    codes: Bytes = blocks[:, :, 2:]
    if tensor.type == "Q4_0":
        codes = np.concatenate([codes & 15, codes >> 4], axis=2, dtype=np.uint8)
    return codes.reshape(-1, columns), scales


def packed(tensor: TensorInfo, codes: Bytes) -> bytes:
    """Codes as our format has them: int4 two in a byte, the lower half first."""
    if tensor.type == "Q4_0":
        codes = codes[:, 0::2] | codes[:, 1::2] * np.uint8(16)
    return codes.tobytes()


def row_pieces(tensor: TensorInfo, most: int) -> Iterator[tuple[int, int]]:
    """Where whole rows of a matrix lie in its bytes: begin and length, of at most `most` numbers if a row is."""
    block, size = BLOCKS[tensor.type]
    row = tensor.shape[1] // block * size
    step = max(1, most // tensor.shape[1]) * row
    for begin in range(0, tensor.length, step):
        yield begin, min(step, tensor.length - begin)
