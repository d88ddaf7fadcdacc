"""The weights that llm-compressor writes: packed integers, int8 and FP8; scales by tensor, row, group or block.

Of a layer L, by the format of its group:

- pack-quantized: `L.weight_packed` I32 [out, in · bits / 32], successive inputs from the lowest bits up, each more
  by 2 ** (bits - 1) than the number; `L.weight_shape` [2]; `L.weight_zero_point` I32 [out · bits / 32, groups],
  packed along the outputs, unless symmetric.
- int-quantized and naive-quantized: `L.weight` I8; `L.weight_zero_point` I8 beside the scales unless symmetric.
- float-quantized: `L.weight` F8_E4M3.

`L.weight_scale` has one number, or [out, 1], or [out, groups], or one for each block; it multiplies. With
`L.weight_g_idx` I32 [in], each input names its group. `L.input_scale` and `L.input_zero_point`, a calibration of
the inputs, are not needed: inputs stay as they are.

Source: the format as vllm-project/compressed-tensors documents and writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.weights.bits import unpack
from engine.weights.formats import (
    SCALES,
    Shape,
    Stored,
    check_codes,
    check_scales,
    group_label,
    invalid,
    prefix,
    sorted_by_group,
)
from engine.weights.settings import Settings, unsupported
from kernels.packed import Layout, Packed

if TYPE_CHECKING:
    from torch import Tensor

_PACKED, _INT, _FLOAT, _NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
_MAX_GROUPS = 64
_FORMATS = (_PACKED, _INT, _FLOAT, _NAIVE)


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """One matrix.

    Attributes:
        kind: one of pack-quantized, int-quantized and float-quantized.
        bits: of a code.
        rows: rows that share a scale; 0: all.
        columns: columns that share a scale; 0: all.
        symmetric: it has no zero points.
        ordered: inputs name their groups.
    """

    kind: str
    bits: int
    rows: int
    columns: int
    symmetric: bool
    ordered: bool

    dimensions: ClassVar[int] = 2

    @property
    def label(self) -> str:
        """See `Format`."""
        number = "fp" if self.kind == _FLOAT else "int"
        block = f" {self.rows}x{self.columns}" if self.rows > 1 else group_label(self.columns)
        return f"{number}{self.bits}{block} (compressed-tensors)"

    def stored(self, name: str, shape: Shape) -> Mapping[str, Stored]:
        """See `Format`."""
        out, inner = shape
        tensors: dict[str, Stored] = {}
        if self.kind == _PACKED:
            tensors["weight_packed"] = Stored(("I32",), ((out, self._words(inner)),))
            tensors["weight_shape"] = Stored(("I64", "I32"), ((2,),))
        else:
            tensors["weight"] = Stored(("F8_E4M3" if self.kind == _FLOAT else "I8",), (tuple(shape),))
        tensors["weight_scale"] = Stored(SCALES, self._scale_shapes(shape))
        if not self.symmetric:
            packed = (self._words(out), self._scales(shape)[1])
            zero = (
                Stored(("I32",), (packed,)) if self.kind == _PACKED else Stored(("I8",), self._scale_shapes(shape))
            )
            tensors["weight_zero_point"] = zero
        if self.ordered:
            tensors["weight_g_idx"] = Stored(("I32",), ((inner,),))
        tensors["input_scale"] = Stored(SCALES, ((), (1,)), optional=True)
        tensors["input_zero_point"] = Stored(("I8", "F8_E4M3", *SCALES), ((), (1,)), optional=True)
        return {f"{prefix(name)}.{key}": value for key, value in tensors.items()}

    def layout(self, shape: Shape) -> Layout:
        """See `Format`."""
        rows, columns = self._group(shape)
        bits = 4 if self.kind == _PACKED and self.bits == 4 else 8
        kind = "float8" if self.kind == _FLOAT else "int"
        return Layout(rows, columns, bits, kind, not self.symmetric, self._orders(shape))

    def read(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> list[Packed]:
        """See `Format`."""
        get = {key.removeprefix(f"{prefix(name)}."): tensor for key, tensor in tensors.items()}
        scales = check_scales(name, get["weight_scale"]).reshape(self._scales(shape))
        zeros = self._zeros(name, get, shape)
        codes, order = self._codes(name, get, shape), None
        if self.ordered:
            order = sorted_by_group(name, get["weight_g_idx"], self.columns or shape[1])
            if not self._orders(shape):
                order = None
            else:
                codes = codes[:, order]
        layout = self.layout(shape)
        return [Packed(codes, scales, layout.rows, layout.columns, layout.bits, zeros, order=order)]

    def _codes(self, name: str, get: Mapping[str, Tensor], shape: Shape) -> Tensor:
        if self.kind == _FLOAT:
            return check_codes(name, get["weight"])
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        if self.kind == _INT:
            codes = get["weight"]
            if bool(((codes < low) | (codes > high)).any()):
                raise invalid(name, f"has a code beyond {self.bits} bits")
            return codes
        if get["weight_shape"].tolist() != list(shape):
            raise invalid(name, f"says it has the shape {get['weight_shape'].tolist()}, not {list(shape)}")
        found = unpack(get["weight_packed"], self.bits)[:, : shape[1]]
        return _signed(found, self.bits) if self.symmetric else found.contiguous()

    def _zeros(self, name: str, get: Mapping[str, Tensor], shape: Shape) -> Tensor | None:
        """In the numbers that the codes are in."""
        if self.symmetric:
            return None
        stored = get["weight_zero_point"]
        if self.kind == _PACKED:
            return unpack(stored.t(), self.bits)[:, : shape[0]].t().float().contiguous()
        return stored.float().reshape(self._scales(shape))

    def _words(self, count: int) -> int:
        return -(-count * self.bits // 32)

    def _group(self, shape: Shape) -> tuple[int, int]:
        return self.rows or shape[0], self.columns or shape[1]

    def _scales(self, shape: Shape) -> tuple[int, int]:
        rows, columns = self._group(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)

    def _scale_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        one = ((), (1,), (1, 1)) if (self.rows, self.columns) == (0, 0) else ()
        row = ((shape[0],),) if (self.rows, self.columns) == (1, 0) else ()
        return (*one, *row, self._scales(shape))

    def _orders(self, shape: Shape) -> bool:
        return self.ordered and self._scales(shape)[1] > 1


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Codes less the middle, int8."""
    return codes.short().sub_(2 ** (bits - 1)).char()


def parse(settings: Settings) -> tuple[CompressedTensors, ...]:
    """See `engine.weights.quantisation`."""
    kind = settings.one_of("format", *_FORMATS, "mixed-precision")
    settings.one_of(
        "quantization_status", "compressed", "frozen", default="compressed"
    )  # old writers never said more
    settings.empty("kv_cache_scheme", "transform_config", "moe_sparsity_config")
    _check_sparsity(settings)
    settings.ignore("ignore", "global_compression_ratio", "version", "run_compressed", "dequantize")
    settings.ignore("use_optimized_inference")
    groups = settings.take("config_groups")
    if not isinstance(groups, dict) or not 0 < len(groups) <= _MAX_GROUPS:
        raise unsupported(settings.where, f"config_groups = {str(groups)[:60]!r} must say what is quantised")
    return tuple(_group(group, f"{settings.where} {name[:40]}", kind) for name, group in groups.items())


def _check_sparsity(settings: Settings) -> None:
    sparsity = settings.take("sparsity_config", {})
    if sparsity:
        inner = Settings(sparsity, f"{settings.where} sparsity_config")
        inner.one_of("format", "dense")
        inner.ignore("global_sparsity", "sparsity_structure", "registry_requires_subclass", "ignore", "targets")
        inner.finish()


def _group(raw: object, where: str, outer: str) -> CompressedTensors:
    group = Settings(raw, where)
    kind = group.one_of("format", *_FORMATS, default=outer)
    group.ignore("targets")  # the files decide
    group.empty("output_activations")
    _check_inputs(group)
    weights = Settings(group.take("weights"), f"{where} weights")
    group.finish()
    made = _weights(weights, kind)
    weights.finish()
    return made


def _check_inputs(group: Settings) -> None:
    """Inputs of eight bits may stay as they are, which is at least as exact; how the writer rounds them is his."""
    raw = group.take("input_activations")
    if raw is None:
        return
    inputs = Settings(raw, f"{group.where} input_activations")
    inputs.one_of("num_bits", 8, default=8)
    inputs.one_of("type", "int", "float", default="int")
    inputs.one_of("dynamic", True, False, default=False)
    inputs.one_of("strategy", "tensor", "token", "group", "channel", default="tensor")
    inputs.empty("actorder")
    inputs.ignore("symmetric", "group_size", "block_structure", "observer", "observer_kwargs")
    inputs.ignore("scale_dtype", "zp_dtype")
    inputs.finish()


def _weights(weights: Settings, kind: str) -> CompressedTensors:
    number = weights.one_of("type", "int", "float", default="int")
    bits = weights.one_of("num_bits", 4, 8, default=8)
    weights.one_of("dynamic", False, default=False)
    symmetric = weights.flag("symmetric", default=True)
    ordered = weights.one_of("actorder", "group", "dynamic", "weight", "static", True, False, default=False)
    weights.ignore("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    kind = {"int": _INT, "float": _FLOAT}[number] if kind == _NAIVE else kind
    if (number == "float") != (kind == _FLOAT) or (kind == _FLOAT and (bits, symmetric) != (8, True)):
        raise unsupported(
            weights.where, f"type = {number}, num_bits = {bits}, symmetric = {symmetric} in the format {kind}"
        )
    rows, columns = _sides(weights)
    if not symmetric and kind == _PACKED and rows != 1:
        raise unsupported(weights.where, "packed zero points of a whole tensor or of blocks")
    return CompressedTensors(kind, bits, rows, columns, symmetric, ordered in ("group", "dynamic", True))


def _sides(weights: Settings) -> tuple[int, int]:
    """Rows and columns that share a scale; 0 is all."""
    group, block = weights.take("group_size"), weights.take("block_structure")
    implied = "tensor" if group is None else "channel" if group == -1 else "group"
    strategy = weights.one_of("strategy", "tensor", "channel", "group", "block", default=implied)
    if strategy == "group" and type(group) is int and 1 <= group <= 2**16 and block is None:
        return 1, group
    if strategy == "block" and _is_block(block) and group is None:
        return block[0], block[1]
    if strategy in ("tensor", "channel") and group in (None, -1) and block is None:
        return (0, 0) if strategy == "tensor" else (1, 0)
    raise unsupported(weights.where, f"strategy {strategy}, group_size {group}, block_structure {str(block)[:40]}")


def _is_block(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int and 0 < v <= 2**16 for v in value)
