"""A model's folder of a published shape with drawn weights, to be bundled and served like any other.

The tokenizer and the chat template are those of a demo model, so prompts are as long as its own; answers mean
nothing. Files are written once and kept where the peers are.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.peers.protocol import PLACE, ROOT
from engine.bench.shapes import SHAPES, read_shape
from engine.bench.weights import DrawnWeights, Stored, read_format
from engine.models.registry import architecture
from kernels.packed import Packed

_TOKENIZER = ROOT / "demo" / "demo-notes-s"
_TEXT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def shape_folder(shape: str, weights: str) -> Path:
    """The folder, written unless it is there.

    Args:
        shape: one of `engine.bench.shapes.SHAPES`.
        weights: one of `engine.bench.weights.FORMATS`; embeddings and head are stored alike.
    """
    folder = PLACE / f"{shape}-{weights}"
    if folder.exists():
        return folder
    unfinished = folder.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    form, config = read_format(weights), read_shape(shape)
    shapes = architecture(config).tensor_shapes(config)
    quantised = frozenset(name for name, dims in shapes.items() if len(dims) == 2 and form.bits < 16)
    drawn = DrawnWeights(shapes, quantised, form)
    tensors = {name: tensor for plain in shapes for name, tensor in _stored(plain, drawn.pop(plain)).items()}
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    (unfinished / "config.json").write_text(json.dumps(_fields(shape, form)))
    for path in (*(_TOKENIZER / name for name in _TEXT), ROOT / "LICENSE"):
        shutil.copy(path, unfinished)
    return unfinished.rename(folder)


def _fields(shape: str, form: Stored) -> dict[str, Any]:
    """config.json; the numbers of special tokens are the tokenizer's."""
    fields = SHAPES[shape] | {"bos_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16"}
    if form.bits < 16:
        stored = {"bits": form.bits, "group_size": form.group, "symmetric": True}
        fields["quantization_config"] = {"quant_method": "cloister", **stored, "embeddings": stored}
    return fields


def _stored(name: str, value: Tensor | Packed) -> dict[str, Tensor]:
    """A tensor as `engine.weights.int_weights` reads it: of int4 two codes in a byte, the lower half first."""
    if not isinstance(value, Packed):
        return {name: value.bfloat16()}
    codes, prefix = value.codes, name.removesuffix(".weight")
    if value.bits == 4:
        positive = (codes + 8).to(torch.uint8)
        codes = positive[:, 0::2] | positive[:, 1::2] << 4
    return {f"{prefix}.codes": codes.contiguous(), f"{prefix}.scales": value.scales.half()}
