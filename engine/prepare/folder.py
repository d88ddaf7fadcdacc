"""A model's folder as engine-prepare reads it: its configuration, and each tensor when it is used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from engine.errors import EngineError
from engine.models.registry import Family, architecture
from engine.models.served import layout, read_served
from engine.models.spec import ModelConfig
from engine.request import Task
from engine.strict_json import load_object
from engine.text.model import MAX_FILE_BYTES, TextModel, load_text_model
from engine.weights.quantisation import assign, stored_names
from engine.weights.safetensors import MAX_HEADER_BYTES, TensorEntry, read_header
from kernels.packed import Packed

if TYPE_CHECKING:
    from torch import Tensor

    from engine.weights.formats import Format

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.uint8}  # fmt: skip
_LENGTH_BYTES = 8
_MAX_CONFIG_BYTES = 1 << 20
_PIECE_BYTES = 16 << 20


class Named(NamedTuple):
    """A matrix that is read when it is used: the name of its plain tensor, and its shape [out, in]."""

    name: str
    shape: tuple[int, ...]


class ModelFolder:
    """A model in files, of which each tensor is what its configuration says, plain or quantised.

    Args:
        path: the folder.

    Attributes:
        path: the folder.
        raw: config.json as an object.
        served: what the model is, and is for.
        shapes: of the plain tensors, by name.
        matrices: those of them that may be quantised as layers are, but for the matrix of the logits.
        tables: embeddings and, where it is not tied, the matrix of the logits.
        embeddings: the former.
        entries: what each tensor of the files is, by name.

    Raises:
        EngineError: as `read_served`, `read_header` and `assign`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.served = read_served(lambda name: self.read(name, _MAX_CONFIG_BYTES))
        content = self.read("config.json", _MAX_CONFIG_BYTES) or b"{}"
        self.raw = load_object(content, "config.json", "CONFIG_INVALID")
        self._files: dict[str, Path] = {}
        self.entries: dict[str, TensorEntry] = {}
        for file in sorted(path.glob("*.safetensors")):
            self._list(file)
        known = layout(self.served, self.entries)
        self.shapes = known.shapes
        self._formats: Mapping[str, Format] = assign(
            known.shapes, known.matrices, self.served.quantisation, self.entries, known.spare, known.tables
        )
        self.tables = known.tables
        self.embeddings = known.tables - known.matrices
        self.matrices = known.matrices - known.tables

    @property
    def decoder(self) -> tuple[ModelConfig, Family]:
        """The configuration and family of a model that generates.

        Raises:
            EngineError: QUANTISE_UNSUPPORTED, it is none.
        """
        config = self.served.config
        if self.served.task is not Task.GENERATE or not isinstance(config, ModelConfig):
            raise EngineError(
                "QUANTISE_UNSUPPORTED", "only a model that generates text is measured with a calibration"
            )
        return config, architecture(config)

    @property
    def quantised(self) -> bool:
        """Some matrix is."""
        return bool(self._formats)

    def read(self, name: str, limit: int) -> bytes | None:
        """A whole file; None where there is none.

        Raises:
            EngineError: FILE_TOO_LARGE, SOURCE_UNREADABLE.
        """
        file = self.path / name
        try:
            with file.open("rb") as stream:
                content = stream.read(limit + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EngineError("SOURCE_UNREADABLE", f"{name} cannot be read: {error.strerror}") from None
        if len(content) > limit:
            raise EngineError("FILE_TOO_LARGE", f"{name} has more than {limit} bytes")
        return content

    def text(self) -> TextModel:
        """Tokenizer and chat template."""
        limit = self.served.config.max_context_tokens
        return load_text_model(lambda name: self.read(name, MAX_FILE_BYTES), limit)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the files, read now."""
        entry = self.entries[name]
        content = bytearray(b"".join(self.pieces(name)))
        return torch.frombuffer(content, dtype=_DTYPES[entry.dtype]).view(entry.shape)

    def pieces(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes, a few at a time.

        Raises:
            EngineError: SOURCE_UNREADABLE, the file has become shorter.
        """
        entry = self.entries[name]
        with self._files[name].open("rb", buffering=0) as stream:
            position = entry.begin
            while position < entry.end:
                piece = os.pread(stream.fileno(), min(_PIECE_BYTES, entry.end - position), position)
                if not piece:
                    raise EngineError("SOURCE_UNREADABLE", f"{self._files[name].name} became shorter")
                position += len(piece)
                yield piece

    def matrix(self, name: str) -> Tensor | Packed:
        """A matrix by the name of its plain tensor, read now."""
        found = self._formats.get(name)
        if found is None:
            return self.tensor(name)
        stored = stored_names(name, found, self.shapes[name], self.shapes)
        tensors = {key: self.tensor(key) for key in stored if key in self.entries}
        return found.read(name, self.shapes[name], tensors)[0]

    def _list(self, file: Path) -> None:
        with file.open("rb") as stream:
            head = stream.read(_LENGTH_BYTES)
            size = os.fstat(stream.fileno()).st_size
            head += stream.read(min(int.from_bytes(head, "little"), MAX_HEADER_BYTES))
        for name, entry in read_header(head, size, file.name).items():
            if name in self.entries:
                raise EngineError("TENSORS_MISMATCH", f"tensor {name} is in {file.name} and in another file")
            self.entries[name] = entry
            self._files[name] = file


class StreamedWeights:
    """What a decoder is built of here: vectors are read at once, matrices are only named.

    A `engine.models.tensors.Weights`.

    Args:
        folder: the model.
        tables: embeddings in the place of the folder's, by name.
    """

    def __init__(self, folder: ModelFolder, tables: Mapping[str, Packed]) -> None:
        self._folder = folder
        self._tables = tables

    def pop(self, name: str, /) -> Any:
        """The tensor `name`."""
        return self._folder.tensor(name)

    def matrix(self, prefix: str, /) -> Any:
        """The name of the matrix; the embeddings, whose rows are read, themselves."""
        name = f"{prefix}.weight"
        if name in self._folder.embeddings:
            return self._tables[name] if name in self._tables else self._folder.matrix(name)
        return Named(name, self._folder.shapes[name])

    def experts(self, name: str, /) -> Sequence[Any]:
        """Refused: such files keep all experts in one tensor."""
        raise EngineError("QUANTISE_UNSUPPORTED", f"{name}: experts in one tensor are not quantised here")
