"""A GGUF file of a published shape with drawn numbers, as llama.cpp's own `quantize --pure` would store it.

Every matrix, the embeddings included, is of one type: what our engine reads with --quantised-head.

Source: ggml-org/ggml, docs/gguf.md; ggml-common.h, block_q4_0 and block_q8_0 (a float16 scale before 32 codes).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from engine.bench.shapes import SHAPES, read_shape
from engine.models.registry import architecture

KINDS = {
    "Q4_0": GGMLQuantizationType.Q4_0,
    "Q8_0": GGMLQuantizationType.Q8_0,
    "BF16": GGMLQuantizationType.BF16,
}
_BLOCK = 32
_CODE_BYTES = {"Q4_0": 16, "Q8_0": 32}
_SCALES = {"Q4_0": 0.02 / 4.6, "Q8_0": 0.02 / 73}
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(shape: str, kind: str, path: Path) -> Path:
    """The file, written unless it is there.

    Args:
        shape: of `engine.bench.shapes`, a Llama.
        kind: one of KINDS.
        path: of the file.
    """
    if path.exists():
        return path
    unfinished = path.with_suffix(".part")
    writer = GGUFWriter(unfinished, "llama")
    _describe(writer, SHAPES[shape])
    config = read_shape(shape)
    draw = np.random.default_rng(0)
    for name, dims in architecture(config).tensor_shapes(config).items():
        if len(dims) == 1:
            writer.add_tensor(_name(name), np.ones(dims, np.float32))
        else:
            writer.add_tensor(_name(name), _drawn(draw, kind, dims), raw_dtype=KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unfinished.rename(path)


def _describe(writer: GGUFWriter, fields: Mapping[str, Any]) -> None:
    writer.add_vocab_size(fields["vocab_size"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(fields["head_dim"])
    writer.add_value_length(fields["head_dim"])
    writer.add_rope_dimension_count(fields["head_dim"])
    writer.add_rope_freq_base(fields["rope_theta"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")


def _name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def _drawn(draw: np.random.Generator, kind: str, dims: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Blocks of random codes and one scale; of bfloat16, the upper halves of float32 numbers."""
    out, inner = dims
    if kind == "BF16":
        numbers = draw.standard_normal((out, inner), np.float32) * np.float32(0.02)
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    blocks = np.empty((out, inner // _BLOCK, 2 + _CODE_BYTES[kind]), np.uint8)
    blocks[..., :2] = np.array([_SCALES[kind]], np.float16).view(np.uint8)
    blocks[..., 2:] = draw.integers(0, 256, blocks[..., 2:].shape, np.uint8)
    return blocks.reshape(out, -1)
