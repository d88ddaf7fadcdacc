"""What every format of quantised matrices tells: which tensors hold one, and how they make the matrix.

Formats are declarations without torch: engine-inspect and the memory plan read headers with them, and loading
hands them the tensors. What they make is `kernels.packed.Packed`, one form for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from engine.errors import EngineError
from kernels.packed import Layout, Packed

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
FLOATS = ("F64", "F32", "F16", "BF16")
SCALES = ("F32", "F16", "BF16")


class Stored(NamedTuple):
    """A tensor of a file.

    Attributes:
        dtypes: it has one of these number types, as safetensors calls them.
        shapes: and one of these shapes.
        optional: it may be missing.
    """

    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    optional: bool = False

    def fits(self, dtype: str, shape: Shape) -> bool:
        """A tensor of this number type and shape is one of these."""
        return dtype in self.dtypes and shape in self.shapes


class Format(Protocol):
    """How one kind of quantised matrix is stored."""

    @property
    def dimensions(self) -> int:
        """Of the plain tensor: 2, a matrix [out, in]; 3, a stack of matrices [experts, in, out]."""

    @property
    def label(self) -> str:
        """For people: bits, group and who defined it, "int4 g128 (awq)"."""

    def stored(self, name: str, shape: Shape) -> Mapping[str, Stored]:
        """The tensors, by their full names, in place of the plain tensor `name` of `shape`."""

    def layout(self, shape: Shape) -> Layout:
        """Of each matrix that `read` makes."""

    def read(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> list[Packed]:
        """The matrices: one; of a stack [experts, in, out], one per expert, each [out, in].

        Args:
            name: of the plain tensor.
            shape: of the plain tensor.
            tensors: those of `stored` that are there, by their full names.

        Raises:
            EngineError: WEIGHTS_INVALID; a code or a scale that no sound file has.
        """


def prefix(name: str) -> str:
    """The name of a layer, without its weight's."""
    return name.removesuffix(".weight")


def groups(columns: int, group: int) -> int:
    """Scales in a row of so many numbers; group 0 is the whole row."""
    return 1 if group == 0 else -(-columns // group)


def group_label(group: int) -> str:
    """As people write it."""
    return f" g{group}" if group else ""


def check_scales(name: str, scales: Tensor) -> Tensor:
    """The scales in float32.

    Raises:
        EngineError: WEIGHTS_INVALID; one is not finite.
    """
    wide = scales.float()
    if not bool(wide.isfinite().all()):
        raise invalid(name, "has a scale that is not a finite number")
    return wide


def check_codes(name: str, codes: Tensor) -> Tensor:
    """FP8 numbers, unchanged.

    Raises:
        EngineError: WEIGHTS_INVALID; one is no number.
    """
    at_once = max(1, 2**20 // max(1, codes.shape[1]))  # rows, which are taken to float32
    for first in range(0, len(codes), at_once):
        if bool(codes[first : first + at_once].float().isnan().any()):
            raise invalid(name, "has a code that is no number")
    return codes


def exponents(stored: Tensor) -> Tensor:
    """Powers of two in float32 from their exponents plus 127, bytes; 255 stands for no number (OCP MX, 5.4.1)."""
    powers = [2.0 ** (i - 127) for i in range(255)]
    table = stored.new_empty(0).float().new_tensor([*powers, float("nan")])
    found: Tensor = table[stored.long()]
    return found


def sorted_by_group(name: str, group_of: Tensor, group: int) -> Tensor:
    """The order of inputs in which each `group` of them in turn share a scale.

    Args:
        name: of the plain tensor.
        group_of: the group of each input.
        group: inputs of a group; the last may have fewer.

    Raises:
        EngineError: WEIGHTS_INVALID; a group has more or fewer, or there is no such group.
    """
    order = group_of.long().argsort(stable=True)
    wanted = group_of.new_tensor([i // group for i in range(len(group_of))])
    if not bool((group_of[order] == wanted).all()):
        raise invalid(name, f"does not have {group} inputs in every group")
    return order


def empty_bias(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a bias that the model does not have, unless it is all zero, as old writers add it.

    Raises:
        EngineError: WEIGHTS_INVALID.
    """
    bias = tensors.get(f"{prefix(name)}.bias")
    if bias is not None and bool(bias.any()):
        raise invalid(name, "has a bias, which its model does not have")


def invalid(name: str, what: str) -> EngineError:
    """The refusal of a matrix."""
    return EngineError("WEIGHTS_INVALID", f"the quantised {prefix(name)} {what}")
