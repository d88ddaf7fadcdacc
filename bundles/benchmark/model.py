"""A model of any size that the importer accepts and nothing can shorten: a Llama of a cipher's stream."""

import json
import secrets
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

_BLOCK = 8 * 1024 * 1024
_VOCABULARY = 256
_HIDDEN = 1024
_INTERMEDIATE = 4096
_CONTEXT = 2048
_HEADS = 8


def write_model(folder: Path, size: int) -> None:
    """Write a model of about `size` bytes, never the same twice, that the engine could run.

    No block of its weights repeats, so that neither chunks nor files are shared with any other model.

    Args:
        folder: made.
        size: bytes of weights, at least those of one layer (32 MiB).
    """
    folder.mkdir()
    per_layer = sum(2 * prod(shape) for shape in _layer_shapes().values())
    layers = max(1, round(size / per_layer))
    (folder / "config.json").write_text(json.dumps(_config(layers)))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    (folder / "LICENSE").write_text("Random numbers; nobody's.\n")
    with (folder / "model.safetensors").open("wb") as stream:
        header, length = _header(layers)
        stream.write(header)
        for block in random_blocks(length):
            stream.write(block)


def random_blocks(length: int) -> Iterator[bytes]:
    """`length` bytes that nobody has seen before, in blocks: AES-128 in counter mode under a fresh key."""
    stream = Cipher(AES(secrets.token_bytes(16)), CTR(bytes(16))).encryptor()
    zeros = bytes(_BLOCK)
    for begin in range(0, length, _BLOCK):
        yield stream.update(zeros[: length - begin])


def _config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _VOCABULARY,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "head_dim": _HIDDEN // _HEADS,
        "max_position_embeddings": _CONTEXT,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _header(layers: int) -> tuple[bytes, int]:
    """The safetensors header with its length, and the bytes of data that it describes."""
    shapes = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN), "model.norm.weight": (_HIDDEN,)}
    for layer in range(layers):
        for name, shape in _layer_shapes().items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


def _layer_shapes() -> dict[str, tuple[int, ...]]:
    square, up, down = (_HIDDEN, _HIDDEN), (_INTERMEDIATE, _HIDDEN), (_HIDDEN, _INTERMEDIATE)
    return {
        "input_layernorm": (_HIDDEN,),
        "post_attention_layernorm": (_HIDDEN,),
        **{f"self_attn.{name}_proj": square for name in "qkvo"},
        "mlp.gate_proj": up,
        "mlp.up_proj": up,
        "mlp.down_proj": down,
    }


def _tokenizer() -> dict[str, object]:
    """A tokenizer of the bytes alone, written as GPT-2 writes them."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + number) for number in range(len(others))]
    form = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": form,
        "post_processor": None,
        "decoder": form,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {letter: number for number, letter in enumerate(letters)},
            "merges": [],
        },
    }
