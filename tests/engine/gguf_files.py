"""GGUF files of tiny random models, written by the `gguf` package as llama.cpp's converter would."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Q = gguf.GGMLQuantizationType
SIZE = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}  # fmt: skip
_GEMMA_SIZE = {"sliding_window": 16, "query_pre_attn_scalar": 16}
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {  # model type and fields, by the name GGUF has
    "llama": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", _GEMMA_SIZE),
    "gemma3": ("gemma3_text", _GEMMA_SIZE),
}
_PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_GEMMA = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
          "post_feedforward_layernorm": "post_ffw_norm"}  # fmt: skip
CORPUS = ("Claim 4711 of Maria Hartwell: water damage, 1,250.00 EUR.", "Three transfers within one hour, 2026.")
CONTROLS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = "{%- for m in messages -%}<|user|>{{ m.content }}<|end|>{%- endfor -%}<|assistant|>"


def make_network(name: str, seed: int = 0) -> Any:
    """A tiny random model of a family; norms are moved off one, or an offset would not show."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    model_type, fields = FAMILIES[name]
    network = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SIZE, **fields)).eval()
    with torch.no_grad():
        for key, value in network.named_parameters():
            if key.endswith(("norm.weight", ".bias")):
                value.add_(0.1 * torch.randn_like(value))
    return network


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE as GPT-2 splits text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(CONTROLS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_gguf(
    path: Path,
    name: str,
    network: Any,
    kind: Q = Q.F32,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    rope_factors: "np.ndarray[Any, Any] | None" = None,
) -> Path:
    """Write a network of transformers as GGUF."""
    tensors = {key: value.float().numpy() for key, value in network.state_dict().items()}
    return write_tensors(path, name, network.config, tensors, kind, change, rope_factors)


def write_llama(path: Path, kind: Q = Q.F32, changed: Mapping[str, tuple[int, ...]] | None = None) -> Path:
    """A Llama of one layer and random numbers, without any network's help; `changed` parts have other shapes."""
    random, fields = np.random.default_rng(0), {**SIZE, "num_hidden_layers": 1, "rms_norm_eps": 1e-6}
    shapes = {f"self_attn.{x}_proj": (n, 64) for x, n in zip("qkvo", (64, 32, 32, 64), strict=True)}
    shapes |= {"mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}
    shapes |= {"input_layernorm": (64,), "post_attention_layernorm": (64,), **(changed or {})}
    named = {f"model.layers.0.{part}.weight": shape for part, shape in shapes.items()}
    named |= {"model.embed_tokens.weight": (320, 64), "model.norm.weight": (64,)}
    tensors = {key: random.standard_normal(shape, np.float32) for key, shape in named.items()}
    config = SimpleNamespace(**fields, tie_word_embeddings=True, rope_parameters={"rope_theta": 10000.0})
    return write_tensors(path, "llama", config, tensors, kind)


def write_tensors(
    path: Path,
    name: str,
    config: Any,
    tensors: Mapping[str, Any],
    kind: Q = Q.F32,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    rope_factors: "np.ndarray[Any, Any] | None" = None,
) -> Path:
    """Write a model as GGUF; matrices as `kind`, `change` adds keys and tensors of its own."""
    writer = gguf.GGUFWriter(path, name)
    _write_keys(writer, name, config)
    _write_tokenizer(writer)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    change(writer)
    for key, value in tensors.items():
        if not (config.tie_word_embeddings and key == "lm_head.weight"):
            _write_tensor(writer, _gguf_name(key, name), _turned(key, value, name, config), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_keys(writer: gguf.GGUFWriter, name: str, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    writer.add_license("apache-2.0")
    parameters = config.rope_parameters
    if name == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if name == "gemma3":
        parameters = parameters["full_attention"]
    if name.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_rope_freq_base(parameters["rope_theta"])


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = json.loads(make_tokenizer().to_str())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    padding = [f"[PAD{i}]" for i in range(len(vocabulary), SIZE["vocab_size"] or 0)]
    kinds = [3 if text in CONTROLS else 1 for text in vocabulary] + [5] * len(padding)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary + padding)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)


def _gguf_name(key: str, name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}  # fmt: skip
    if key in whole:
        return whole[key]
    _, _, layer, rest = key.split(".", 3)
    part, _, last = rest.rpartition(".")
    parts = {**_PARTS, **_GEMMA} if name.startswith("gemma") else _PARTS
    return f"blk.{layer}.{parts[part]}.{last}"


def _turned(key: str, numbers: Any, name: str, config: Any) -> Any:
    """What the converter changes: rows of Llama's queries and keys in pairs, one added to Gemma's norms."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if name == "llama" and heads:
        halves = numbers.reshape(heads, 2, numbers.shape[0] // heads // 2, *numbers.shape[1:])
        return halves.swapaxes(1, 2).reshape(numbers.shape)
    return numbers + 1 if name.startswith("gemma") and key.endswith("norm.weight") else numbers


def _write_tensor(writer: gguf.GGUFWriter, name: str, numbers: Any, kind: Q) -> None:
    if numbers.ndim == 1:
        kind = Q.F32
    if kind in (Q.Q4_K, Q.Q6_K):  # the package cannot make these; any blocks with small scales are some
        raw = any_blocks(kind, numbers.size // 256, np.random.default_rng(len(name)))
        writer.add_tensor(name, raw.reshape(numbers.shape[0], -1), raw_dtype=kind)
        return
    if kind == Q.F32:
        writer.add_tensor(name, np.ascontiguousarray(numbers))
        return
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(numbers), kind), raw_dtype=kind)


def any_blocks(kind: Q, count: int, random: np.random.Generator) -> Any:
    """Blocks of arbitrary bits, but for scales, which are finite and small."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
    places = {Q.Q8_0: (0,), Q.Q4_0: (0,), Q.Q4_K: (0, 2), Q.Q6_K: (208,)}[kind]
    for at in places:
        scales = (random.standard_normal(count) * 0.01).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks


def load_converted(folder: Path) -> Any:
    """A folder as transformers reads it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
