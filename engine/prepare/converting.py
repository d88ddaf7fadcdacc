"""A GGUF file made into the folder that Hugging Face would publish: config.json, tokenizer.json, safetensors.

Tensors are read, turned and written one by one. F16, BF16 and F32 keep their numbers, and so do Q8_0 and Q4_0
where all linear layers are of that type; other blocks of quantised numbers become bfloat16, rounded to nearest,
which is finer than the blocks were.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import EngineError
from engine.prepare.gguf import BLOCKS, Container, TensorInfo, read_container
from engine.prepare.gguf_blocks import Floats, dequantise
from engine.prepare.gguf_kept import Kept, find_kept, keep_tables, packed, row_pieces, split_blocks
from engine.prepare.gguf_metadata import Metadata
from engine.prepare.gguf_models import ROPE_FACTORS, Converted, convert_model
from engine.prepare.gguf_tokenizer import TokenizerFiles, read_tokenizer
from engine.prepare.question import Told
from engine.prepare.weights_file import TensorPlan, WeightsWriter, writing

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_LINEAR = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_PIECE = 1 << 22  # numbers turned at once; a multiple of every block


def convert_gguf(
    source: Path, folder: Path, told: Told, keep: bool = True, keep_embeddings: bool = False
) -> dict[str, Any]:
    """Write the folder; what was done, for the record.

    Args:
        source: the GGUF file.
        folder: an empty folder.
        told: hears of the bytes.
        keep: quantised numbers may stay so.
        keep_embeddings: those of embeddings and of the matrix of the logits must; else they become plain.

    Raises:
        EngineError: GGUF_INVALID, GGUF_UNSUPPORTED, GGUF_TOKENIZER, SOURCE_UNREADABLE, DISK_FULL.
    """
    container = read_container(source)
    metadata = Metadata(container.metadata)
    with source.open("rb") as stream:
        factors = _rope_factors(container, stream.fileno())
        model = convert_model(metadata, {n: t.shape for n, t in container.tensors.items()}, factors)
        tokenizer = read_tokenizer(metadata)
        _check(model, container, tokenizer)
        kept = _kept(model, container, keep_embeddings) if keep else None
        _write_weights(folder, stream.fileno(), container, model, kept, told)
    if kept is not None:
        model.config["quantization_config"] = kept.stated
    _write_texts(folder, metadata, model, tokenizer)
    kinds = sorted({tensor.type for tensor in container.tensors.values()})
    return {
        "from": "gguf",
        "architecture": model.family.architecture,
        "types": kinds,
        "kept": kept.type if kept else "",
        "kept_embeddings": kept.table_type if kept else "",
    }


def _kept(model: Converted, container: Container, embeddings: bool) -> Kept | None:
    tensors = {name: container.tensors[given] for given, name in model.names.items()}
    kept = find_kept({name: tensor for name, tensor in tensors.items() if _LINEAR.search(name)})
    if not embeddings:
        return kept
    return keep_tables(kept, {name: tensors[name] for name in _TABLES if name in tensors})


def _write_weights(
    folder: Path, fd: int, container: Container, model: Converted, kept: Kept | None, told: Told
) -> None:
    plans: dict[str, TensorPlan] = {}
    for given, name in model.names.items():
        tensor = container.tensors[given]
        held = kept is not None and kept.holds(name)
        plans |= kept.plans(name, tensor.shape) if kept and held else {name: _plan(tensor)}
    total, done = sum(plan.size for plan in plans.values()), 0
    with writing(folder, plans) as writer:
        for given, name in model.names.items():
            tensor = container.tensors[given]
            if kept is not None and kept.holds(name):
                written = kept.plans(name, tensor.shape)
                _write_kept(writer, [*written], given, tensor, model, fd)
            else:
                written = {name: plans[name]}
                writer.write(name, _turned(given, tensor, model, fd))
            done += sum(plan.size for plan in written.values())
            told("converting", done, total)


def _write_kept(
    writer: WeightsWriter, keys: list[str], given: str, tensor: TensorInfo, model: Converted, fd: int
) -> None:
    """A matrix whose blocks stay what they are; its scales, few beside its codes, are written after them."""
    heads = _permuted_heads(model, model.names[given])
    most = _PIECE if heads is None else math.prod(tensor.shape)
    scales: list[bytes] = []

    def pieces() -> Iterator[bytes]:
        for begin, length in row_pieces(tensor, most):
            codes, some = split_blocks(given, tensor, _read(fd, tensor.offset + begin, length))
            scales.append(_in_halves(some, heads).tobytes())
            yield packed(tensor, _in_halves(codes, heads))

    writer.write(keys[0], pieces())
    writer.write(keys[1], scales)


def _permuted_heads(model: Converted, name: str) -> int | None:
    """Heads of a matrix whose rows are in pairs; None of any other."""
    heads = _HEADS.get(name.split(".")[-2])
    return int(model.config[heads]) if model.family.permuted and heads is not None else None


def _in_halves(rows: NDArray[Any], heads: int | None) -> NDArray[Any]:
    """Rows of heads in pairs (i, i + 1), as (i, i + n/2); other rows as they are."""
    if heads is None:
        return rows
    paired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def _rope_factors(container: Container, fd: int) -> list[float]:
    tensor = container.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return []
    if tensor.type != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 1024:
        raise EngineError("GGUF_INVALID", f"{ROPE_FACTORS} is no short list of F32")
    return [float(value) for value in dequantise(tensor.type, _read(fd, tensor.offset, tensor.length))]


def _check(model: Converted, container: Container, tokenizer: TokenizerFiles) -> None:
    """Refuse tensors that the steps below could not turn, and a tokenizer of another model."""
    config = model.config
    if tokenizer.size > config["vocab_size"]:
        raise EngineError("GGUF_INVALID", f"{tokenizer.size} tokens, and a table for {config['vocab_size']}")
    for given, name in model.names.items():
        heads = _HEADS.get(name.split(".")[-2])
        shape = container.tensors[given].shape
        if _LINEAR.search(name) and len(shape) != 2:
            raise EngineError("GGUF_INVALID", f"{given[:80]!a} has {len(shape)} dimensions, a matrix has 2")
        rows, count = shape[0], config[heads] if heads else 0
        if model.family.permuted and heads and (not count or rows != count * config["head_dim"]):
            raise EngineError("GGUF_INVALID", f"{given[:80]!a} has {rows} rows, not {count} heads of them")


def _plan(tensor: TensorInfo) -> TensorPlan:
    return TensorPlan(tensor.type if tensor.type in ("F32", "F16", "BF16") else "BF16", tensor.shape)


def _turned(given: str, tensor: TensorInfo, model: Converted, fd: int) -> Iterator[bytes]:
    """A tensor's bytes as they are written: of the plan's type, its rows in Hugging Face's order."""
    name = model.names[given]
    pieces = _numbers(given, tensor, fd)
    if model.family.norm_offset and name.endswith("norm.weight"):
        pieces = (_less(given, tensor, piece, model.family.norm_offset) for piece in pieces)
    heads = _permuted_heads(model, name)
    if heads is not None:
        pieces = iter([_in_halves(np.concatenate(list(pieces)).reshape(tensor.shape), heads)])
    return (piece.tobytes() for piece in pieces)


def _numbers(given: str, tensor: TensorInfo, fd: int) -> Iterator[NDArray[Any]]:
    """The tensor's numbers one after another, in the type they are written in.

    Raises:
        EngineError: GGUF_INVALID, a number is infinite or none.
    """
    block, size = BLOCKS[tensor.type]
    plan = _plan(tensor)
    step = _PIECE // block * size
    for begin in range(0, tensor.length, step):
        content = _read(fd, tensor.offset + begin, min(step, tensor.length - begin))
        with np.errstate(all="ignore"):
            values = dequantise(tensor.type, content)
        if not np.isfinite(values).all():
            raise EngineError("GGUF_INVALID", f"tensor {given[:80]!a} has a number that is infinite or none")
        yield _as(plan.dtype, values, content)


def _as(dtype: str, values: Floats, content: bytes) -> NDArray[Any]:
    """Numbers in the type they are written in; those that are in it are taken over bit for bit."""
    if dtype == "F32":
        return values.astype("<f4")
    if dtype == "F16":
        return np.frombuffer(content, "<u2")
    return _bfloat16(values)


def _bfloat16(values: Floats) -> NDArray[np.uint16]:
    """Rounded to the nearest, ties to even; exact for what was one."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return rounded.astype("<u2")


def _less(given: str, tensor: TensorInfo, plain: NDArray[Any], offset: float) -> NDArray[Any]:
    """The weight of a norm without what the converter added; in float32, as the converter computed."""
    if tensor.type != "F32":
        raise EngineError("GGUF_UNSUPPORTED", f"{given[:80]!a} is {tensor.type}; norms are F32")
    less: NDArray[Any] = plain - np.float32(offset)
    return less


def _read(fd: int, offset: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.pread(fd, length, offset)
        if not part:
            raise EngineError("SOURCE_UNREADABLE", "the file became shorter while it was read")
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)


def _write_texts(folder: Path, metadata: Metadata, model: Converted, tokenizer: TokenizerFiles) -> None:
    """config.json, the tokenizer's files, the chat template, and a model card of what the file says of itself."""
    ends = {"eos_token_id": list(tokenizer.eos)}
    begins = {"bos_token_id": tokenizer.bos} if tokenizer.bos is not None else {}
    _write_json(folder / "config.json", {**model.config, **begins, **ends})
    _write_json(folder / "generation_config.json", {**begins, **ends})
    _write_json(folder / "tokenizer.json", tokenizer.document)
    _write_json(folder / "tokenizer_config.json", tokenizer.settings)
    if tokenizer.template:
        (folder / "chat_template.jinja").write_text(tokenizer.template, encoding="utf-8")
    (folder / "README.md").write_text(_card(metadata), encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(metadata: Metadata) -> str:
    """A model card with the facts of the file that are plain words."""
    name = _plain(metadata.text("general.name", "")) or "A model"
    licence = _plain(metadata.text("general.license", ""))
    lines = ["---", *([f"license: {licence}"] if licence else []), "---", ""]
    made = _plain(metadata.text("general.organization", "") or metadata.text("general.author", ""))
    return "\n".join(
        [*lines, f"# {name}", "", *([f"By {made}.", ""] if made else []), "Converted from a GGUF file.", ""]
    )


def _plain(text: str) -> str:
    """A text that is one line of ordinary characters, or nothing."""
    return text if text.isprintable() and len(text) <= 100 else ""
