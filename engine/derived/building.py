"""A model built while what its backend prepares is put into a file, and built again from that file.

A model is built by preparing its tensors one after another. Each preparation is known by its op, by the tensors
that were taken since the one before, and by the plain arguments of the call; with the same model and the same
program they come in the same order, and where one differs the file is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from engine.derived.files import Content, DerivedWriter
from engine.derived.layout import sources
from engine.derived.objects import Json, decode, encode
from engine.errors import EngineError
from engine.models.tensors import Shapes, Weights
from kernels.encoder_ops import EncoderBackend

PREPARED = ("prepare_linear", "prepare_experts", "prepare_vector", "prepare_table", "tied_head")
"""The ops whose results are kept; rotations are made anew, as they depend on the deployment's context."""

_PLAIN = (bool, int, float, str)


class RecordingWeights:
    """A model's tensors, and in which order they are taken.

    A `engine.models.tensors.Weights`.
    """

    def __init__(self, weights: Weights) -> None:
        self.taken: list[str] = []
        self._weights = weights

    def pop(self, name: str, /) -> Any:
        """The tensor `name`."""
        self.taken.append(name)
        return self._weights.pop(name)

    def matrix(self, prefix: str, /) -> Any:
        """The matrix `{prefix}.weight`."""
        self.taken.append(f"{prefix}.weight")
        return self._weights.matrix(prefix)

    def experts(self, name: str, /) -> Sequence[Any]:
        """The matrices of `name`."""
        self.taken.append(name)
        return self._weights.experts(name)


class AbsentWeights:
    """A model's tensors where nobody needs them, and in which order they are asked for.

    A `engine.models.tensors.Weights`.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.taken: list[str] = []
        self._shapes = shapes

    def pop(self, name: str, /) -> Any:
        """What stands for the tensor `name`."""
        self.taken.append(name)
        return _Absent(self._shapes[name][0])

    def matrix(self, prefix: str, /) -> Any:
        """What stands for the matrix `{prefix}.weight`."""
        return self.pop(f"{prefix}.weight")

    def experts(self, name: str, /) -> Sequence[Any]:
        """What stands for the matrices of `name`."""
        return list(self.pop(name))


class _Absent:
    """Stands for a tensor, or a part of one, on its way to a backend that does not look at it."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __getitem__(self, part: Any) -> _Absent:
        return self

    def __iter__(self) -> Iterator[_Absent]:
        return iter([self] * self._length)


class _PreparingOps:
    """A backend whose preparations go another way.

    Args:
        ops: the backend.
        weights: what is prepared.
    """

    def __init__(self, ops: EncoderBackend, weights: RecordingWeights | AbsentWeights) -> None:
        self._ops = ops
        self._weights = weights

    def __getattr__(self, name: str) -> Any:
        if name not in PREPARED:
            return getattr(self._ops, name)

        def prepare(*given: Any, **named: Any) -> Any:
            values = [*given, *(named[key] for key in sorted(named))]
            taken, self._weights.taken = self._weights.taken, []
            known = {"op": name, "of": taken, "with": [value for value in values if type(value) in _PLAIN]}
            return self._prepare(known, lambda: getattr(self._ops, name)(*given, **named))

        return prepare

    def _prepare(self, known: Json, make: Callable[[], Any]) -> Any:
        raise NotImplementedError


class RecordingOps(_PreparingOps):
    """A backend, and what it prepares goes into a file, too."""

    def __init__(self, ops: EncoderBackend, weights: RecordingWeights, writer: DerivedWriter) -> None:
        super().__init__(ops, weights)
        self._writer = writer
        self._records: list[Json] = []
        self._kept: list[Tensor] = []  # so that no other tensor gets the address of one that is written
        self._numbers: dict[Any, int] = {}

    def finish(self, model_digest: str) -> tuple[str, int]:
        """Complete the file once the model with this digest is built; the file's digest and size."""
        about = {"made_for": _made_for(model_digest, self._ops), "records": self._records}
        return self._writer.finish(about)

    def _prepare(self, known: Json, make: Callable[[], Any]) -> Any:
        value = make()
        self._records.append({**known, "value": encode(value, self._keep)})
        return value

    def _keep(self, tensor: Tensor) -> int:
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place not in self._numbers:
            self._numbers[place] = self._writer.put(tensor)
            self._kept.append(tensor)
        return self._numbers[place]


class ReplayingOps(_PreparingOps):
    """A backend that has been given what it would prepare.

    Raises:
        EngineError: DERIVED_MISMATCH, it was made of another model, for another backend, or by another program.
    """

    def __init__(self, ops: EncoderBackend, weights: AbsentWeights, content: Content, model_digest: str) -> None:
        super().__init__(ops, weights)
        made, own = content.about["made_for"], _made_for(model_digest, ops)
        if made != own:
            raise EngineError("DERIVED_MISMATCH", f"the derived file was made for {made}, and this is {own}")
        self._tensors = content.tensors
        self._records: Sequence[Mapping[str, Any]] = content.about["records"]
        self._next = 0

    def finish(self) -> None:
        """Once the model is built.

        Raises:
            EngineError: DERIVED_MISMATCH, something is left over.
        """
        if self._next != len(self._records):
            raise EngineError("DERIVED_MISMATCH", "the derived file holds more than the model")

    def _prepare(self, known: Json, make: Callable[[], Any]) -> Any:
        record = self._records[self._next] if self._next < len(self._records) else {}
        if any(record.get(name) != value for name, value in known.items()):
            raise EngineError(
                "DERIVED_MISMATCH",
                f"the derived file holds another part where the model has {', '.join(known['of'])[:200]}",
            )
        self._next += 1
        return decode(record["value"], self._tensors)


def _made_for(model_digest: str, ops: EncoderBackend) -> Json:
    """All that must be the same where a file is used."""
    return {"model": model_digest, "backend": ops.layout_id, "sources": sources()}
