"""Quantised tensors as files hold them: read by the engine, and packed from the formats' descriptions alone.

The packers here share nothing with the readers: they go number by number, as the descriptions are written.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.weights.loading import LoadedWeights
from engine.weights.quantisation import assign, parse_quantisation
from kernels.packed import Packed, dequantise

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}


class Found(NamedTuple):
    """A tensor as a header has it."""

    dtype: str
    shape: tuple[int, ...]


def entries(tensors: Mapping[str, Tensor]) -> dict[str, Found]:
    """The header of these tensors."""
    return {name: Found(DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def load(
    config: dict[str, Any], tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> LoadedWeights:
    """These tensors, of which all that are matrices may be quantised."""
    formats = assign(
        shapes,
        [name for name, shape in shapes.items() if len(shape) > 1],
        parse_quantisation({"quantization_config": config}),
        entries(tensors),
    )
    return LoadedWeights(dict(tensors), shapes, formats)


def read(config: dict[str, Any], tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Packed:
    """The one matrix `layer` of these tensors; all are used."""
    weights = load(config, {f"layer.{name}": tensor for name, tensor in tensors.items()}, {"layer.weight": shape})
    found = weights.matrix("layer")
    assert isinstance(found, Packed)
    assert weights.names == []
    assert found.shape == shape
    return found


def plain(config: dict[str, Any], tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """What `read` finds, as a plain matrix."""
    return dequantise(read(config, tensors, shape))


class Quantised(NamedTuple):
    """One matrix in a format: its tensors, and the plain matrix in float32 that they stand for."""

    tensors: dict[str, Tensor]
    plain: Tensor


Packer = Callable[[Tensor], Quantised]


def codes_of(
    weight: Tensor, bits: int, group: int, symmetric: bool, order: list[int] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes from 0 on [out, in], float16 scales and whole zeros [out, groups], and the plain matrix.

    With an order, input i is in group order[i].
    """
    out, inner = weight.shape
    group = group or inner
    which = torch.tensor(order if order is not None else [i // group for i in range(inner)])
    groups, top = int(which.max()) + 1, 2**bits - 1
    scales, zeros = torch.zeros(out, groups), torch.zeros(out, groups)
    for g in range(groups):
        some = weight[:, which == g]
        low, high = some.amin(1).clamp(max=0), some.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales[:, g] = ((high - low) / top).clamp(min=1e-4).half().float()
        zeros[:, g] = (-low / scales[:, g]).round().clamp(1, top)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    codes = (weight / scales[:, which] + zeros[:, which]).round().clamp(0, top)
    return codes.int(), scales, zeros.int(), (codes - zeros[:, which]) * scales[:, which]


def words(codes: Tensor, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """Rows of codes in words of 32 bits: the code at places[i] of every so many has the i-th lowest bits."""
    per_word = 32 // bits
    places = places or tuple(range(per_word))
    rows = []
    for row in codes.tolist():
        row = row + [0] * (-len(row) % per_word)
        packed = []
        for first in range(0, len(row), per_word):
            word = sum(row[first + place] << (bits * i) for i, place in enumerate(places))
            packed.append(word - 2**32 if word >= 2**31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


def awq(group: int) -> Packer:
    def pack(weight: Tensor) -> Quantised:
        codes, scales, zeros, made = codes_of(weight, 4, group, symmetric=False)
        places = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {"qweight": words(codes.T, 4, places), "qzeros": words(zeros.T, 4, places)}
        return Quantised(tensors | {"scales": scales.T.half().contiguous()}, made)

    return pack


def gptq(bits: int, group: int, symmetric: bool, ordered: bool, stored_version: int) -> Packer:
    def pack(weight: Tensor) -> Quantised:
        inner = weight.shape[1]
        which = [i // (group or inner) for i in range(inner)]
        if ordered:
            which = [which[(7 * i + 3) % inner] for i in range(inner)]  # 7 divides no width used here
        codes, scales, zeros, made = codes_of(weight, bits, group, symmetric, which)
        less = 1 if stored_version == 1 else 0
        tensors = {"qweight": words(codes, bits).T.contiguous(), "qzeros": words(zeros.T - less, bits)}
        tensors |= {"scales": scales.T.half().contiguous(), "g_idx": torch.tensor(which, dtype=torch.int32)}
        return Quantised(tensors, made)

    return pack


def ours(bits: int, group: int, symmetric: bool) -> Packer:
    def pack(weight: Tensor) -> Quantised:
        codes, scales, zeros, made = codes_of(weight, bits, group, symmetric)
        if bits == 8:
            stored, zero = (codes - 128).to(torch.int8), zeros - 128
        else:
            even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).byte()
            stored, zero = even[:, 0::2] + 16 * even[:, 1::2], zeros
        tensors = {"codes": stored, "scales": scales.half()}
        return Quantised(tensors if symmetric else tensors | {"zeros": zero.float()}, made)

    return pack


def compressed(bits: int, group: int, symmetric: bool) -> Packer:
    """Packed integers."""

    def pack(weight: Tensor) -> Quantised:
        codes, scales, zeros, made = codes_of(weight, bits, group, symmetric)
        tensors = {"weight_packed": words(codes, bits), "weight_scale": scales.half()}
        tensors["weight_shape"] = torch.tensor(weight.shape)
        if not symmetric:
            tensors["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
        return Quantised(tensors, made)

    return pack


def compressed_int8(weight: Tensor) -> Quantised:
    """One scale for each row, as W8A8 has it."""
    codes, scales, _, made = codes_of(weight, 8, 0, symmetric=True)
    return Quantised({"weight": (codes - 128).to(torch.int8), "weight_scale": scales}, made)


def fp8(block: tuple[int, int] | None, scale: str) -> Packer:
    """A scale for each block, each row (1, 0), or the whole matrix."""

    def pack(weight: Tensor) -> Quantised:
        out, inner = weight.shape
        rows, columns = (out, inner) if block is None else (block[0], block[1] or inner)
        scales = torch.zeros(-(-out // rows), -(-inner // columns))
        codes, made = torch.zeros(out, inner).to(torch.float8_e4m3fn), torch.zeros(out, inner)
        for r in range(0, out, rows):
            for c in range(0, inner, columns):
                some = weight[r : r + rows, c : c + columns]
                factor = some.abs().max() / 448
                scales[r // rows, c // columns] = factor
                codes[r : r + rows, c : c + columns] = (some / factor).to(torch.float8_e4m3fn)
                made[r : r + rows, c : c + columns] = codes[r : r + rows, c : c + columns].float() * factor
        return Quantised({"weight": codes, scale: scales if block is not None else scales.reshape(1)}, made)

    return pack


def config(method: str, **rest: Any) -> dict[str, Any]:
    return {"quant_method": method} | rest


def config_of(bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    """Of our own format, without its name."""
    return {"bits": bits, "group_size": group, "symmetric": symmetric}


def packed_config(
    bits: int, group: int, symmetric: bool, kind: str = "pack-quantized", **rest: Any
) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
    }
    weights |= ({"group_size": group} if group else {}) | rest
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return config("compressed-tensors", format=kind, quantization_status="compressed", config_groups=groups)


def gptq_config(bits: int, group: int, sym: bool, desc_act: bool, kind: str) -> dict[str, Any]:
    return config("gptq", bits=bits, group_size=group, sym=sym, desc_act=desc_act, checkpoint_format=kind)


AWQ = config("awq", bits=4, group_size=32, zero_point=True, version="GEMM")
FP8 = config("fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=None)
FP8_BLOCK = FP8 | {"weight_block_size": [16, 32]}
FORMATS: dict[str, tuple[dict[str, Any], Packer]] = {
    "int8 (ours)": (config("cloister", bits=8, group_size=0, symmetric=True), ours(8, 0, True)),
    "int8 g32, zeros (ours)": (config("cloister", bits=8, group_size=32, symmetric=False), ours(8, 32, False)),
    "int4 g32 (ours)": (config("cloister", bits=4, group_size=32, symmetric=True), ours(4, 32, True)),
    "int8, embeddings too (ours)": (
        config("cloister", bits=8, group_size=0, symmetric=True, embeddings=config_of(8, 0, True)),
        ours(8, 0, True),
    ),
    "int4 g32, embeddings too (ours)": (
        config("cloister", bits=4, group_size=32, symmetric=True, embeddings=config_of(4, 32, True)),
        ours(4, 32, True),
    ),
    "int4 g128, zeros (ours)": (config("cloister", bits=4, group_size=128, symmetric=False), ours(4, 128, False)),
    "awq g32": (AWQ, awq(32)),
    "awq, whole rows": (AWQ | {"group_size": -1}, awq(0)),
    "gptq": (gptq_config(4, 32, True, False, "gptq"), gptq(4, 32, True, False, 1)),
    "gptq that is v2 and says v1": (gptq_config(4, 32, True, False, "gptq"), gptq(4, 32, True, False, 2)),
    "gptq v2, zeros, act-order": (gptq_config(4, 32, False, True, "gptq_v2"), gptq(4, 32, False, True, 2)),
    "gptq act-order": (gptq_config(4, 32, False, True, "gptq"), gptq(4, 32, False, True, 1)),
    "gptq int8": (gptq_config(8, -1, True, False, "gptq"), gptq(8, 0, True, False, 1)),
    "compressed int4": (packed_config(4, 32, True), compressed(4, 32, True)),
    "compressed int4, zeros": (packed_config(4, 64, False), compressed(4, 64, False)),
    "compressed int8, zeros": (packed_config(8, 0, False), compressed(8, 0, False)),
    "compressed w8a8": (packed_config(8, 0, True, "int-quantized"), compressed_int8),
    "compressed fp8": (packed_config(8, 0, True, "float-quantized", type="float"), fp8((1, 0), "weight_scale")),
    "fp8": (FP8, fp8(None, "weight_scale")),
    "fp8, as transformers names it": (FP8, fp8(None, "weight_scale_inv")),
    "fp8 blocks": (FP8_BLOCK, fp8((16, 32), "weight_scale_inv")),
}
