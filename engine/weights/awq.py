"""AWQ's weights, of the kind "gemm": int4 along the outputs, in an order of its own, with whole zero points.

Of a layer L: `L.qweight` I32 [in, out / 8], in each word the columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits
up; `L.qzeros` I32 [groups, out / 8] likewise; `L.scales` [groups, out].

Source: Lin et al., "AWQ", MLSys 2024; the packing of AutoAWQ's WQLinear_GEMM.
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
    check_scales,
    empty_bias,
    group_label,
    groups,
    prefix,
)
from engine.weights.settings import Settings
from kernels.packed import Layout, Packed

if TYPE_CHECKING:
    from torch import Tensor

_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight columns lies
_HOW_MADE = (
    *("modules_to_not_convert", "backend", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config"),
    *("damp_percent", "true_sequential", "dataset", "tokenizer", "model_seqlen", "batch_size", "pad_token_id"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize"),
    *("max_input_length", "cache_block_outputs", "act_group_aware", "meta", "lm_head"),
)


@dataclass(frozen=True, slots=True)
class Awq:
    """One matrix.

    Attributes:
        group: inputs that share a scale; 0: all.
    """

    group: int

    dimensions: ClassVar[int] = 2

    @property
    def label(self) -> str:
        """See `Format`."""
        return f"int4{group_label(self.group)} (awq)"

    def stored(self, name: str, shape: Shape) -> Mapping[str, Stored]:
        """See `Format`."""
        out, inner = shape
        scales, words = groups(inner, self.group), out // 8
        tensors = {
            "qweight": Stored(("I32",), () if out % 8 else ((inner, words),)),
            "qzeros": Stored(("I32",), ((scales, words),)),
            "scales": Stored(SCALES, ((scales, out),)),
            "bias": Stored(SCALES, ((out,),), optional=True),
        }
        return {f"{prefix(name)}.{key}": value for key, value in tensors.items()}

    def layout(self, shape: Shape) -> Layout:
        """See `Format`."""
        return Layout(1, self.group or shape[1], 4, zeros=True)

    def read(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> list[Packed]:
        """See `Format`."""
        get = {key: tensors[f"{prefix(name)}.{key}"] for key in ("qweight", "qzeros", "scales")}
        empty_bias(name, tensors)
        scales = check_scales(name, get["scales"]).t().contiguous()
        codes, zeros = _unpacked(get["qweight"]), _unpacked(get["qzeros"]).float()
        return [Packed(codes, scales, 1, self.group or shape[1], 4, zeros)]


def _unpacked(words: Tensor) -> Tensor:
    """Codes [columns, rows] of words [rows, columns / 8]."""
    codes = unpack(words, 4).view(*words.shape, 8)[..., list(_COLUMNS)]
    return codes.flatten(1).t().contiguous()


def parse(settings: Settings) -> tuple[Awq]:
    """See `engine.weights.quantisation`."""
    settings.one_of("bits", 4)
    group = settings.one_of("group_size", -1, 32, 64, 128, 256)
    settings.one_of("zero_point", True, default=True)
    for name in ("version", "format", "checkpoint_format"):
        settings.one_of(name, "gemm", "GEMM", default="gemm")
    settings.one_of("pack_dtype", "int32", default="int32")
    settings.one_of("method", "awq", default="awq")
    settings.empty("desc_act", "dynamic")
    settings.one_of("sym", True, False, default=False)
    settings.ignore(*_HOW_MADE)
    return (Awq(max(group, 0)),)
