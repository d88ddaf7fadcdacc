"""GPTQ's weights, both versions: int4 or int8 along the inputs, each input with the group it was quantised in.

Of a layer L: `L.qweight` I32 [in · bits / 32, out], in each word successive inputs from the lowest bits up;
`L.qzeros` I32 [groups, out · bits / 32] likewise along the outputs; `L.scales` [groups, out]; `L.g_idx` I32 [in],
the group of each input. Version 1 ("gptq") stores zero points less one; version 2 ("gptq_v2") as they are.

Two traps. Some writers say version 1 and store version 2: the zero point of a symmetric matrix is 2 ** (bits - 1),
so there the values tell and the label is not believed; other values in a symmetric matrix are refused. And some
make version 1 by taking one off all codes of a word at once, so that a zero point of 0 borrows from its neighbour:
where `meta` says that GPTQModel wrote it, one is added to whole words, as GPTQModel itself does. Elsewhere a zero
point of 0 cannot be told from 16, and AutoGPTQ's own kernels do not agree: it is refused.

Source: Frantar et al., "GPTQ", ICLR 2023; the packing of AutoGPTQ and GPTQModel; vllm-project/vllm#38966.
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
    invalid,
    prefix,
    sorted_by_group,
)
from engine.weights.settings import Settings, unsupported
from kernels.packed import Layout, Packed

if TYPE_CHECKING:
    from torch import Tensor

_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_HOW_MADE = (
    *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "dataset", "tokenizer"),
    *("model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "mse"),
    *("pad_token_id", "use_cuda_fp16", "use_exllama", "disable_exllama", "max_input_length", "exllama_config"),
    *("cache_block_outputs", "modules_in_block_to_quantize", "model_name_or_path", "model_file_base_name"),
    *("act_group_aware", "backend", "lm_head", "modules_to_not_convert", "quantizer", "version"),
)


@dataclass(frozen=True, slots=True)
class Gptq:
    """One matrix.

    Attributes:
        bits: 4 or 8.
        group: inputs that share a scale; 0: all.
        ordered: inputs were quantised in an order of their own (desc_act).
        symmetric: all zero points are the middle.
        version: 1 or 2.
        borrows: one was taken off words, not codes.
    """

    bits: int
    group: int
    ordered: bool
    symmetric: bool
    version: int
    borrows: bool = False

    dimensions: ClassVar[int] = 2

    @property
    def label(self) -> str:
        """See `Format`."""
        return f"int{self.bits}{group_label(self.group)} (gptq)"

    def stored(self, name: str, shape: Shape) -> Mapping[str, Stored]:
        """See `Format`."""
        out, inner = shape
        scales, per_word = groups(inner, self.group), 32 // self.bits
        tensors = {
            "qweight": Stored(("I32",), ((-(-inner // per_word), out),)),
            "qzeros": Stored(("I32",), ((scales, -(-out // per_word)),)),
            "scales": Stored(SCALES, ((scales, out),)),
            "g_idx": Stored(("I32",), ((inner,),), optional=not self.ordered),
            "bias": Stored(SCALES, ((out,),), optional=True),
        }
        return {f"{prefix(name)}.{key}": value for key, value in tensors.items()}

    def layout(self, shape: Shape) -> Layout:
        """See `Format`."""
        return Layout(1, self.group or shape[1], self.bits, zeros=True, order=self._orders(shape))

    def read(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> list[Packed]:
        """See `Format`."""
        out, inner = shape
        get = {key.removeprefix(f"{prefix(name)}."): tensor for key, tensor in tensors.items()}
        empty_bias(name, tensors)
        codes = unpack(get["qweight"].t(), self.bits)[:, :inner].contiguous()
        scales = check_scales(name, get["scales"]).t().contiguous()
        zeros = self._zeros(name, get["qzeros"], out)
        order = self._order(name, get.get("g_idx"), inner)
        if order is not None:
            codes = codes[:, order]
        return [Packed(codes, scales, 1, self.group or inner, self.bits, zeros.t().contiguous(), order=order)]

    def _orders(self, shape: Shape) -> bool:
        """Inputs have an order that matters."""
        return self.ordered and groups(shape[1], self.group) > 1

    def _zeros(self, name: str, words: Tensor, out: int) -> Tensor:
        """Zero points [groups, out]."""
        stored = unpack(words, self.bits)[:, :out]
        if not self.symmetric:
            if self.version == 1 and self.borrows:
                ones = sum(1 << place for place in range(0, 32, self.bits))
                return unpack(words + ones, self.bits)[:, :out].float()  # words of 32 bits, which wrap around
            if self.version == 1 and bool((stored == 2**self.bits - 1).any()):
                raise invalid(name, "has a zero point that loaders of version 1 do not agree on; write gptq_v2")
            return stored.float().add_(2 - self.version)
        middle = 2 ** (self.bits - 1)
        for value in (middle - 1, middle):
            if bool((stored == value).all()):
                return stored.float().fill_(middle)
        raise invalid(name, f"is symmetric by its config, but not all its zero points are {middle}")

    def _order(self, name: str, group_of: Tensor | None, inner: int) -> Tensor | None:
        """Which input each column of codes multiplies once they are sorted by group; None when they are sorted."""
        if group_of is None:
            return None
        order = sorted_by_group(name, group_of, self.group or inner)
        if self._orders((0, inner)):
            return order
        if not bool((group_of[1:] >= group_of[:-1]).all()):
            raise invalid(name, "has inputs out of order, which its config denies (desc_act)")
        return None


def parse(settings: Settings) -> tuple[Gptq]:
    """See `engine.weights.quantisation`."""
    bits = settings.one_of("bits", 4, 8)
    group = settings.take("group_size", 128)
    if type(group) is not int or not (group == -1 or 1 <= group <= 2**16):
        raise unsupported(settings.where, f"group_size = {str(group)[:40]!r}")
    kind = settings.one_of("checkpoint_format", *_VERSIONS, None)
    also = settings.one_of("format", *_VERSIONS, None)
    if kind and also and kind != also:
        raise unsupported(settings.where, f"format = {also} beside checkpoint_format = {kind}")
    version = _VERSIONS[kind or also or "gptq"]
    ordered, symmetric = settings.flag("desc_act", default=False), settings.flag("sym", default=True)
    settings.one_of("pack_dtype", "int32", default="int32")
    settings.one_of("method", "gptq", default="gptq")
    settings.empty("is_marlin_format", "dynamic", "adapter", "rotation", "awq_gemm_checkpoint")
    settings.ignore(*_HOW_MADE)
    borrows = "gptqmodel" in str(settings.take("meta", "")).lower()
    return (Gptq(bits, max(group, 0), ordered, symmetric, version, borrows),)
