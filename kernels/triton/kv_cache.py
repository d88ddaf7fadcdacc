"""KV pages on a device: keys and values of all layers by page and head, as numbers or as codes with scales.

A page of a head is `block_size` vectors one after another, so that a tile of keys is read in long pieces. The slot
of a token is page · block_size + its place there; slot -1 is nowhere.

Source: Kwon et al., "PagedAttention", SOSP 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import KvSpec
from kernels.triton.case import MODEL, Case, Draw, Expected
from kernels.triton.configs import config
from kernels.triton.launch import Unsupported, launch
from kernels.triton.quantise import has_float8

KV_TYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
}
"""Number types of pages by name; int8 and float8 have one scale for each token and head."""


class KvPages(NamedTuple):
    """Keys and values of all layers.

    Attributes:
        keys: [layers, pages, KV heads, block_size, head_dim].
        values: as keys.
        key_scales: float32 [layers, pages, KV heads, block_size] where numbers are codes, else None.
        value_scales: as key_scales.
        spec: the sizes.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    spec: KvSpec


def allocate(spec: KvSpec, kv_dtype: str, device: torch.device | str) -> KvPages:
    """Zeroed pages of a type of KV_TYPES.

    Raises:
        Unsupported: the device has no numbers of this type.
    """
    dtype = KV_TYPES[kv_dtype]
    check_type(dtype)
    shape = (spec.num_layers, spec.num_blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
    coded = dtype.itemsize == 1
    scales = [torch.zeros(shape[:-1], device=device) if coded else None for _ in range(2)]
    # zeros of every type are zero bytes; not every type can be filled on every device
    keys, values = (torch.zeros(shape, dtype=_bits(dtype), device=device).view(dtype) for _ in range(2))
    return KvPages(keys, values, scales[0], scales[1], spec)


def check_type(dtype: torch.dtype) -> None:
    """What every kernel that reads or writes codes asks first.

    Raises:
        Unsupported: the device has no numbers of this type.
    """
    if dtype is torch.float8_e4m3fn and not has_float8():
        raise Unsupported("float8 pages want compute capability 8.9; int8 pages go everywhere")


def pointers(kv: KvPages, layer: int) -> tuple[Tensor | None, ...]:
    """Keys, values and their scales of a layer."""
    return tuple(None if pages is None else pages[layer] for pages in kv[:4])


def scrub(kv: KvPages, blocks: Sequence[int]) -> None:
    """Zero the pages `blocks` in every layer."""
    if blocks:
        zero_fresh(kv, torch.tensor(blocks, device=kv.keys.device) * kv.spec.block_size)


@triton.jit(do_not_specialize=["tokens", "num_blocks"])
def _zero_fresh(
    slots_ptr,  # int64 [T]
    pages_ptr,  # [layers, pages, PAGE] of any integers
    tokens,
    num_blocks,
    PAGE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One layer and TOKENS slots a program: zero the pages that one of these is the first of."""
    first = tl.program_id(0) * TOKENS
    layer = tl.program_id(1).to(tl.int64)
    offs = first + tl.arange(0, TOKENS)
    slots = tl.load(slots_ptr + offs, mask=offs < tokens, other=-1)
    if tl.max(((slots >= 0) & (slots % BLOCK_SIZE == 0)).to(tl.int32), axis=0) == 0:
        return
    zeros = tl.zeros([BLOCK], dtype=pages_ptr.dtype.element_ty)
    for t in range(first, tl.minimum(first + TOKENS, tokens)):
        slot = tl.load(slots_ptr + t)
        if (slot >= 0) & (slot % BLOCK_SIZE == 0):
            page = pages_ptr + (layer * num_blocks + slot // BLOCK_SIZE) * PAGE
            for at in range(0, PAGE, BLOCK):
                place = at + tl.arange(0, BLOCK)
                tl.store(page + place, zeros, mask=place < PAGE)


def zero_fresh(kv: KvPages, slots: Tensor) -> None:
    """Zero, in every layer, each page of which a slot is the first.

    Args:
        kv: the pages.
        slots: int64 [T]; -1 is no page.
    """
    spec = kv.spec
    for pages in (kv.keys, kv.values, kv.key_scales, kv.value_scales):
        if pages is None:
            continue
        words = pages.view(_bits(pages.dtype))
        chosen = config("zero_fresh", spec.block_size)
        launch(
            _zero_fresh,
            (triton.cdiv(len(slots), chosen["TOKENS"]), spec.num_layers),
            slots,
            words,
            len(slots),
            spec.num_blocks,
            PAGE=words[0, 0].numel(),
            BLOCK_SIZE=spec.block_size,
            **chosen,
        )


def _bits(dtype: torch.dtype) -> torch.dtype:
    """Integers as wide as a number."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]


def random_pages(draw: Draw, spec: KvSpec, kv_dtype: str) -> KvPages:
    """Pages full of normal numbers, for cases."""
    dtype = KV_TYPES[kv_dtype]
    shape = (spec.num_layers, spec.num_blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
    if dtype.itemsize > 1:
        keys, values = draw.normal(2, *shape, dtype=dtype)
        return KvPages(keys, values, None, None, spec)
    keys, values = draw.integers(-127, 128, 2, *shape, dtype=torch.int8)
    if dtype is not torch.int8:  # all but the codes of NaN
        keys, values = (
            keys.where(keys & 127 != 127, 0).view(dtype),
            values.where(values & 127 != 127, 0).view(dtype),
        )
    scales = draw.uniform(0.5, 1.5, 2, *shape[:-1]) / (64.0 if dtype is torch.int8 else 100.0)
    return KvPages(keys, values, scales[0], scales[1], spec)


def exact_rows(kv: KvPages, layer: int, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [length, KV heads, head_dim] of a row in float64."""
    places = torch.arange(length, device=table.device)
    pages, offsets = table[places // kv.spec.block_size].long(), places % kv.spec.block_size
    found = []
    for codes, scales in ((kv.keys, kv.key_scales), (kv.values, kv.value_scales)):
        numbers = codes[layer][pages, :, offsets].double()
        found.append(numbers if scales is None else numbers * scales[layer][pages, :, offsets].double()[..., None])
    return found[0], found[1]


def cases(draw: Draw, scale: str) -> Iterator[Case]:
    """Pages zeroed by slots of a step."""
    for kv_dtype in ("bfloat16", "int8"):
        size = KvSpec(32, 4096, 16, 8, 128) if scale == MODEL else KvSpec(2, 5, 3, 1, 7)
        yield _zeroed(draw, size, kv_dtype)


def _zeroed(draw: Draw, spec: KvSpec, kv_dtype: str) -> Case:
    slots = draw.given(torch.tensor([3, 4, -1, 0, 11, 12, 7]))

    def run() -> tuple[Tensor, ...]:
        kv = random_pages(draw, spec, kv_dtype)
        zero_fresh(kv, slots)
        return tuple(pages.view(_bits(pages.dtype)) for pages in kv[:4] if pages is not None)

    def expected() -> tuple[Expected, ...]:
        kv = random_pages(draw, spec, kv_dtype)
        found = [pages.view(_bits(pages.dtype)) for pages in kv[:4] if pages is not None]
        for pages in found:
            pages[:, [slot // spec.block_size for slot in (3, 0, 12)]] = 0
        return tuple(Expected(pages, None) for pages in found)

    page = spec.num_kv_heads * spec.block_size * spec.head_dim * 2
    return Case(f"zero_fresh {kv_dtype} {spec.head_dim}", run, expected, 3 * page * spec.num_layers)
