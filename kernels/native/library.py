"""The library of CPU kernels, loaded: its structs as ctypes has them, and its functions.

The structs are those of include/cloister_kernels.h field by field, by the same names; a pointer is an address.
What they mean is said there. tests/kernels/test_native_library.py reads the header and compares.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from typing import ClassVar

import torch  # first of all: its libgomp is the one that the library must share, or there are two pools of threads

from kernels.native.location import find_library, missing

ABI = 2
"""CL_ABI of the header that this file mirrors."""

CL_FLOAT32, CL_BFLOAT16, CL_INT8, CL_FLOAT16 = range(4)
CL_F32, CL_BF16, CL_W8A8, CL_W4A8, CL_DECODED = range(5)
CL_GROUP, CL_SCALED, CL_TILE, CL_STRIDE = 32, 128, 16, 64
(
    CL_OP_EMBED,
    CL_OP_NORM,
    CL_OP_LINEAR,
    CL_OP_ROPE,
    CL_OP_ATTENTION,
    CL_OP_GATED,
    CL_OP_ADD,
    CL_OP_MIXTURE,
    CL_OP_PICK,
    CL_OP_CAP,
) = range(10)

_ISA = "CLOISTER_KERNELS_ISA"


class ClMatrix(Structure):
    """A matrix [out, in] as `cl_pack` made it."""

    _fields_: ClassVar = [
        ("kind", c_int32),
        ("group", c_int32),
        ("decoded", c_int32),
        ("bits", c_int32),
        ("offset", c_int32),
        ("scale_type", c_int32),
        ("factor", c_float),
        ("pad", c_int32),
        ("out", c_int64),
        ("in", c_int64),
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("table", c_void_p),
        ("order", c_void_p),
    ]


class ClLinear(Structure):
    """Matrices stacked over one input, and a bias."""

    _fields_: ClassVar = [("parts", c_void_p), ("count", c_int64), ("bias", c_void_p)]


class ClRows(Structure):
    """A step's activations in the forms that somebody reads."""

    _fields_: ClassVar = [
        ("f32", c_void_p),
        ("bf16", c_void_p),
        ("int8", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("width", c_int64),
        ("group", c_int64),
    ]


class ClKv(Structure):
    """KV pages of all layers."""

    _fields_: ClassVar = [
        ("type", c_int32),
        ("pad", c_int32),
        ("layers", c_int64),
        ("blocks", c_int64),
        ("block_size", c_int64),
        ("heads", c_int64),
        ("dim", c_int64),
        ("pages", c_void_p),
    ]


class ClStep(Structure):
    """What all ops of a step share."""

    _fields_: ClassVar = [
        ("tokens", c_int64),
        ("rows", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("row_first", c_void_p),
        ("row_start", c_void_p),
        ("table_first", c_void_p),
        ("tables", c_void_p),
        ("picked", c_void_p),
        ("picks", c_int64),
        ("scratch", c_void_p),
        ("threads", c_int64),
        ("nanoseconds", c_void_p),
    ]


class ClLimits(Structure):
    """The sizes that scratch must do for."""

    _fields_: ClassVar = [
        ("tokens", c_int64),
        ("rows", c_int64),
        ("picks", c_int64),
        ("context", c_int64),
        ("threads", c_int64),
    ]


class ClOp(Structure):
    """One op of a program."""

    _fields_: ClassVar = [("code", c_int64), ("args", c_void_p)]


class ClEmbed(Structure):
    """CL_OP_EMBED."""

    _fields_: ClassVar = [("table", c_void_p), ("out", c_void_p), ("scale", c_float)]


class ClNorm(Structure):
    """CL_OP_NORM."""

    _fields_: ClassVar = [
        ("x", c_void_p),
        ("residual", c_void_p),
        ("weight", c_void_p),
        ("total", c_void_p),
        ("out", c_void_p),
        ("scale", c_float),
        ("eps", c_float),
    ]


class ClLinearOp(Structure):
    """CL_OP_LINEAR."""

    _fields_: ClassVar = [("x", c_void_p), ("weight", c_void_p), ("out", c_void_p), ("picked", c_int64)]


class ClRope(Structure):
    """CL_OP_ROPE."""

    _fields_: ClassVar = [
        ("qkv", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("kv", c_void_p),
        ("layer", c_int64),
        ("heads", c_int64),
        ("rotated", c_int64),
        ("whole", c_int64),
        ("eps", c_float),
    ]


class ClAttention(Structure):
    """CL_OP_ATTENTION."""

    _fields_: ClassVar = [
        ("qkv", c_void_p),
        ("sinks", c_void_p),
        ("kv", c_void_p),
        ("out", c_void_p),
        ("layer", c_int64),
        ("heads", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
    ]


class ClGated(Structure):
    """CL_OP_GATED."""

    _fields_: ClassVar = [("x", c_void_p), ("out", c_void_p), ("activation", c_int64)]


class ClAdd(Structure):
    """CL_OP_ADD."""

    _fields_: ClassVar = [
        ("x", c_void_p),
        ("residual", c_void_p),
        ("out", c_void_p),
        ("width", c_int64),
        ("scale", c_float),
    ]


class ClMixture(Structure):
    """CL_OP_MIXTURE."""

    _fields_: ClassVar = [
        ("x", c_void_p),
        ("router", c_void_p),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("out", c_void_p),
        ("experts", c_int64),
        ("top_k", c_int64),
        ("normalise", c_int64),
        ("activation", c_int64),
        ("intermediate", c_int64),
    ]


class ClPick(Structure):
    """CL_OP_PICK."""

    _fields_: ClassVar = [("x", c_void_p), ("out", c_void_p)]


class ClCap(Structure):
    """CL_OP_CAP."""

    _fields_: ClassVar = [("x", c_void_p), ("width", c_int64), ("scale", c_float), ("softcap", c_float)]


class NativeUnavailable(Exception):  # noqa: N818  # a state of the machine, not a mistake
    """There is no library, or it does not load here; says why."""


class Library:
    """The functions of a loaded library.

    Args:
        path: of the file.

    Raises:
        NativeUnavailable: it does not load, or is of another ABI.
    """

    def __init__(self, path: str) -> None:
        try:
            self._functions = ctypes.CDLL(path)
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self._functions, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise NativeUnavailable(f"{path} does not load: {error}") from error
        if (found := self._functions.cl_abi()) != ABI:
            raise NativeUnavailable(f"{path} has ABI {found}, and this is {ABI}: build it again")
        self.path = path

    @property
    def isas(self) -> tuple[str, ...]:
        """Instruction sets that it was built for and this processor runs, best first."""
        return tuple(self._functions.cl_isas().decode().split())

    @property
    def isa(self) -> str:
        """The one in use."""
        return str(self._functions.cl_isa().decode())

    def select(self, isa: str) -> None:
        """Use another one from now on; "" is the best. Not while a program runs.

        Raises:
            ValueError: it is not among `isas`.
        """
        if self._functions.cl_select(isa.encode()):
            raise ValueError(f"{isa!r} is not an instruction set that runs here: {', '.join(self.isas)} are")

    def run(self, ops: int, count: int, step: int) -> None:
        """Run a program of `count` ClOp at the address `ops` for the ClStep at `step`; other threads go on."""
        self._functions.cl_run(ops, count, step)

    def scratch_bytes(self, ops: int, count: int, limits: ClLimits) -> int:
        """Bytes of scratch that a program needs at most."""
        return int(self._functions.cl_scratch_bytes(ops, count, ctypes.addressof(limits)))

    def kv_page_bytes(self, kv: ClKv) -> int:
        """Bytes of one KV page of one layer."""
        return int(self._functions.cl_kv_page_bytes(ctypes.addressof(kv)))

    def packed_bytes(self, matrix: ClMatrix) -> int:
        """Bytes of the packed weights of a matrix whose kind, group, bits, out and in are set."""
        return int(self._functions.cl_packed_bytes(ctypes.addressof(matrix)))

    def pack(self, matrix: ClMatrix, source: int, first: int, rows: int, packed: int) -> None:
        """Pack rows `first` to `first + rows - 1`, which `source` holds, into `packed`."""
        self._functions.cl_pack(ctypes.addressof(matrix), source, first, rows, packed)

    def pin(self, cores: Sequence[int]) -> bool:
        """Keep this thread on the first core, and each other of the team that its programs and torch's ops run on,
        on one of its own; False when the system refuses one of them.
        """
        numbers = (c_int32 * len(cores))(*cores)
        return not self._functions.cl_pin(ctypes.addressof(numbers), len(cores))


_SIGNATURES = {
    "cl_abi": (c_int, []),
    "cl_isas": (c_char_p, []),
    "cl_select": (c_int, [c_char_p]),
    "cl_isa": (c_char_p, []),
    "cl_run": (None, [c_void_p, c_int64, c_void_p]),
    "cl_scratch_bytes": (c_int64, [c_void_p, c_int64, c_void_p]),
    "cl_kv_page_bytes": (c_int64, [c_void_p]),
    "cl_packed_bytes": (c_int64, [c_void_p]),
    "cl_pack": (None, [c_void_p, c_void_p, c_int64, c_int64, c_void_p]),
    "cl_pin": (c_int, [c_void_p, c_int64]),
}


@functools.cache
def _found() -> Library | NativeUnavailable:
    path = find_library()
    try:
        if path is None:
            raise NativeUnavailable(missing())
        return Library(str(path))
    except NativeUnavailable as unavailable:
        return unavailable


@functools.cache
def load() -> Library:
    """The library of this process, with the instruction set that CLOISTER_KERNELS_ISA names, or else the best.

    Raises:
        NativeUnavailable: there is none, or it does not load; the same each time.
        ValueError: CLOISTER_KERNELS_ISA names none that runs here.
    """
    found = _found()
    if isinstance(found, NativeUnavailable):
        raise found
    found.select(os.environ.get(_ISA, ""))
    return found


def threads() -> int:
    """How many threads a program runs on: as many as torch's ops."""
    return torch.get_num_threads()
