"""Weights that are plain tensors, as a decoder takes them."""

from collections.abc import MutableMapping, Sequence
from typing import Any

from kernels.ops import Matrix


class PlainWeights:
    """Tensors by name, each handed over once and then no longer kept here.

    Args:
        tensors: with the names and shapes that the model declared; it is emptied.
    """

    def __init__(self, tensors: MutableMapping[str, Any]) -> None:
        self._tensors = tensors

    def pop(self, name: str, /) -> Any:
        """The tensor `name`."""
        return self._tensors.pop(name)

    def matrix(self, prefix: str, /) -> Matrix:
        """The matrix [out, in] `{prefix}.weight`."""
        return self._tensors.pop(f"{prefix}.weight")

    def experts(self, name: str, /) -> Sequence[Matrix]:
        """The matrix [out, in] of each expert of `name`, which is [experts, in, out]."""
        return [stacked.T for stacked in self._tensors.pop(name)]
