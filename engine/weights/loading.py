"""Weights as a model takes them: one after another, by name, plain or quantised, each once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.weights.files import FileSet, OpenFile
from engine.weights.formats import Format, Shape
from engine.weights.quantisation import Quantisation, assign, stored_names
from engine.weights.safetensors import TensorEntry, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.packed import Packed


class LoadedWeights:
    """The tensors of a model's files; what is taken is no longer kept here.

    A quantised matrix is unpacked when it is taken, so that no two are unpacked at once unless whoever takes them
    keeps both.

    Args:
        tensors: by their names in the files; it is emptied.
        shapes: the plain tensors that the model declares.
        formats: of those that are quantised.
    """

    def __init__(
        self, tensors: dict[str, Tensor], shapes: Mapping[str, Shape], formats: Mapping[str, Format]
    ) -> None:
        self._tensors = tensors
        self._shapes = shapes
        self._formats = formats

    @property
    def names(self) -> list[str]:
        """The tensors that nobody has taken, by their names in the files."""
        return sorted(self._tensors)

    def pop(self, name: str, /) -> Tensor:
        """The plain tensor `name`."""
        return self._tensors.pop(name)

    def matrix(self, prefix: str, /) -> Tensor | Packed:
        """The matrix [out, in] `{prefix}.weight`.

        Raises:
            EngineError: WEIGHTS_INVALID; it is quantised, and no sound file has such codes or scales.
        """
        name = f"{prefix}.weight"
        return self._read(name)[0] if name in self._formats else self._tensors.pop(name)

    def experts(self, name: str, /) -> Sequence[Tensor | Packed]:
        """The matrix [out, in] of each expert of `name`, which is [experts, in, out].

        Raises:
            EngineError: as `matrix`.
        """
        return self._read(name) if name in self._formats else [stack.T for stack in self._tensors.pop(name)]

    def _read(self, name: str) -> list[Packed]:
        found, shape = self._formats[name], self._shapes[name]
        stored = stored_names(name, found, shape, self._shapes)
        return found.read(name, shape, {key: self._tensors.pop(key) for key in stored if key in self._tensors})


def load_weights(
    files: FileSet,
    open_file: OpenFile,
    shapes: Mapping[str, Shape],
    matrices: Collection[str] = (),
    quantisation: Quantisation | None = None,
    spare: Collection[str] = (),
    tables: Collection[str] = (),
) -> LoadedWeights:
    """The tensors of the file set's safetensors files, every byte hashed before use.

    Each tensor has a buffer of its own, which goes when the tensor goes: whoever prepares the model takes them out
    one by one, so that the weights are not in memory twice.

    Args:
        files: of the model.
        open_file: opens them.
        shapes: the plain tensors that the model declares.
        matrices: those of them that may be quantised as layers are.
        quantisation: what config.json says.
        spare: tensors that may be there and that nobody takes.
        tables: those of the model's with a row for each token.

    Raises:
        EngineError: WEIGHTS_DIGEST_MISMATCH, WEIGHTS_INVALID, DTYPE_UNSUPPORTED, or TENSORS_MISMATCH (a tensor
            missing, surplus or of another shape than the model's configuration implies; the message names it).
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, TensorEntry] = {}
    for file in files.matching(".safetensors"):
        for name, (entry, tensor) in read_tensors(file, open_file).items():
            if name in entries:
                raise EngineError("TENSORS_MISMATCH", f"tensor {name} is in {file.path} and in another file")
            entries[name] = entry
            if name not in spare:
                tensors[name] = tensor
    return LoadedWeights(tensors, shapes, assign(shapes, matrices, quantisation, entries, spare, tables))
