"""From the keys and tensor names of GGUF to config.json and the names that Hugging Face publishes; a family each.

Source: ggml, docs/gguf.md; gguf-py, tensor_mapping.py (names); llama.cpp, convert_hf_to_gguf.py (what it permutes
and adds) and llama-model.cpp (constants that no key states).
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from engine.errors import EngineError
from engine.models.spec import RopeConfig
from engine.prepare.gguf_metadata import Metadata

ROPE_FACTORS = "rope_freqs.weight"
_LAYER = re.compile(r"blk\.([0-9]{1,4})\.([a-z_]+)\.(weight|bias)")
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE_NORM = {**_LINEARS, "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    **_LINEARS,
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA3_LOCAL_THETA, _GEMMA3_PATTERN = 10000.0, 6
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192  # of every published Llama 3.1, 3.2 and 3.3
_CLOSE = 1e-4
_MOST_LAYERS = 4096


class Family(NamedTuple):
    """How one architecture is converted.

    Attributes:
        architecture: class name of config.json.
        model_type: its other name.
        parts: a layer's tensors, their names in GGUF and on Hugging Face.
        permuted: rows of queries and keys are in pairs (i, i + 1), which Hugging Face has as (i, i + n/2).
        norm_offset: what the converter added to the weights of norms.
        more: fields of config.json that are the family's own.
    """

    architecture: str
    model_type: str
    parts: Mapping[str, str]
    permuted: bool = False
    norm_offset: float = 0.0
    more: Callable[["Reading"], dict[str, Any]] = lambda reading: {}


class Reading(NamedTuple):
    """A file being read: its metadata, the prefix of its keys, the names of its tensors, and the common fields."""

    metadata: Metadata
    prefix: str
    tensors: frozenset[str]
    common: dict[str, Any]

    def key(self, name: str) -> str:
        """The full key."""
        return f"{self.prefix}.{name}"


class Converted(NamedTuple):
    """A model's family and what it becomes.

    Attributes:
        family: of the model.
        config: config.json, without what the tokenizer says.
        names: tensor names on Hugging Face by those in the file.
    """

    family: Family
    config: dict[str, Any]
    names: dict[str, str]


def convert_model(
    metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], rope_factors: list[float]
) -> Converted:
    """What a file's model is called on Hugging Face.

    Args:
        metadata: its keys.
        shapes: of its tensors, by name.
        rope_factors: the numbers of `ROPE_FACTORS`; empty where it has none.

    Raises:
        EngineError: GGUF_UNSUPPORTED, an architecture, a key or a tensor that is not known, by name; GGUF_INVALID.
    """
    name = metadata.text("general.architecture")
    family = FAMILIES.get(name)
    if family is None:
        raise EngineError(
            "GGUF_UNSUPPORTED", f"the architecture {name[:40]!a}; converted are {', '.join(FAMILIES)}"
        )
    names = {tensor: _name(tensor, family) for tensor in shapes if tensor != ROPE_FACTORS}
    if "token_embd.weight" not in shapes or len(shapes["token_embd.weight"]) != 2:
        raise EngineError("GGUF_INVALID", "the tensor token_embd.weight is missing")
    reading = Reading(metadata, name, frozenset(shapes), {})
    config = _common(reading, shapes["token_embd.weight"][0])
    reading.common.update(config)
    config |= {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {"rope_parameters": _rope(reading, rope_factors)}
    config |= family.more(reading)
    metadata.refuse_unread(f"{name}.")
    return Converted(family, config, names)


def _name(tensor: str, family: Family) -> str:
    if tensor in _WHOLE:
        return _WHOLE[tensor]
    match = _LAYER.fullmatch(tensor)
    if match is None or match[2] not in family.parts:
        raise EngineError(
            "GGUF_UNSUPPORTED",
            f"the tensor {tensor[:80]!a} is not part of a {family.architecture} as it is converted",
        )
    return f"model.layers.{int(match[1])}.{family.parts[match[2]]}.{match[3]}"


def _common(reading: Reading, rows: int) -> dict[str, Any]:
    """The fields that all families have."""
    data, key = reading.metadata, reading.key
    hidden = data.integer(key("embedding_length"))
    heads = data.integer(key("attention.head_count"))
    if not heads:
        raise EngineError("GGUF_INVALID", f"the key {key('attention.head_count')} is 0")
    head_dim = data.integer(key("attention.key_length"), hidden // heads)
    if not head_dim or head_dim % 2:
        raise EngineError("GGUF_INVALID", f"heads of {head_dim} numbers")
    data.integer(key("vocab_size"), rows)  # llama.cpp goes by the tensor, too
    for name in ("attention.value_length", "rope.dimension_count"):
        if data.integer(key(name), head_dim) != head_dim:
            raise EngineError("GGUF_UNSUPPORTED", f"{key(name)} is not the {head_dim} numbers of a head")
    for name in ("expert_count", "expert_used_count"):
        if data.integer(key(name), 0):
            raise EngineError("GGUF_UNSUPPORTED", f"a mixture of experts ({key(name)}) is not converted")
    return {
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": data.integer(key("feed_forward_length")),
        "num_hidden_layers": data.integer(key("block_count"), most=_MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": data.integer(key("attention.head_count_kv"), heads),
        "head_dim": head_dim,
        "max_position_embeddings": data.integer(key("context_length")),
        "rms_norm_eps": data.number(key("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in reading.tensors,
        "hidden_act": "silu",
    }


def _rope(reading: Reading, factors: list[float]) -> dict[str, Any]:
    """Rotary positions in the layout of transformers 5."""
    data, key = reading.metadata, reading.key
    theta = data.number(key("rope.freq_base"), 10000.0)
    kind = data.text(key("rope.scaling.type"), "none")
    rope: dict[str, Any] = {"rope_theta": theta}
    if factors:
        if kind != "none":
            raise EngineError("GGUF_UNSUPPORTED", f"both {ROPE_FACTORS} and {key('rope.scaling.type')}")
        return rope | _llama3(theta, factors)
    data.flag(key("rope.scaling.finetuned"), False)
    if kind == "none":
        return rope | {"rope_type": "default"}
    rope |= {"rope_type": kind, "factor": data.number(key("rope.scaling.factor"))}
    if kind == "yarn":
        original = data.integer(key("rope.scaling.original_context_length"))
        return rope | {"original_max_position_embeddings": original}
    if kind == "linear":
        return rope
    raise EngineError(
        "GGUF_UNSUPPORTED", f"{key('rope.scaling.type')} {kind[:40]!a}; converted are linear and yarn"
    )


def _llama3(theta: float, factors: list[float]) -> dict[str, Any]:
    """The parameters of Llama 3's scaling, where they make just these divisors of the frequencies.

    The file has the divisors alone; all published models have one set of the other parameters.
    """
    if not all(1 <= factor < math.inf for factor in factors):
        raise EngineError("GGUF_INVALID", f"{ROPE_FACTORS} has a number below 1, or that is none")
    head_dim, factor = 2 * len(factors), float(f"{max(factors):.6g}")
    scaled = RopeConfig("llama3", theta, factor, _LOW, _HIGH, _ORIGINAL).inv_freq(head_dim, _ORIGINAL)
    plain = RopeConfig("default", theta).inv_freq(head_dim, _ORIGINAL)
    for divisor, before, after in zip(factors, plain, scaled, strict=True):
        if not abs(divisor - before / after) <= _CLOSE * divisor:
            raise EngineError("GGUF_UNSUPPORTED", f"{ROPE_FACTORS} is not Llama 3's scaling of the frequencies")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _ORIGINAL,
    }


def _biases(reading: Reading, *parts: str) -> bool:
    """Whether the first layer has the biases of `parts`: all of them, or none.

    Raises:
        EngineError: GGUF_UNSUPPORTED, some.
    """
    found = {f"blk.0.{part}.bias" in reading.tensors for part in parts}
    if len(found) > 1:
        raise EngineError("GGUF_UNSUPPORTED", f"biases of some of {', '.join(parts)}")
    return found.pop()


def _llama(reading: Reading) -> dict[str, Any]:
    return {
        "attention_bias": _biases(reading, "attn_q", "attn_k", "attn_v", "attn_output"),
        "mlp_bias": _biases(reading, "ffn_gate", "ffn_up", "ffn_down"),
    }


def _qwen2(reading: Reading) -> dict[str, Any]:
    if not _biases(reading, "attn_q", "attn_k", "attn_v"):
        raise EngineError("GGUF_INVALID", "a qwen2 without the biases of its queries, keys and values")
    return {"use_sliding_window": False}


def _qwen3(reading: Reading) -> dict[str, Any]:
    return {"attention_bias": _biases(reading, "attn_q", "attn_k", "attn_v", "attn_output"),
            "use_sliding_window": False}  # fmt: skip


def _gemma(reading: Reading, pattern: int) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common; every `pattern`-th layer sees everything."""
    common, layers = reading.common, reading.common["num_hidden_layers"]
    large = layers == _GEMMA_27B_LAYERS[reading.prefix]
    scalar = common["hidden_size"] // common["num_attention_heads"] if large else common["head_dim"]
    window = reading.metadata.integer(reading.key("attention.sliding_window"))
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": scalar,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)],
    }


def _gemma2(reading: Reading) -> dict[str, Any]:
    data, key = reading.metadata, reading.key
    return _gemma(reading, 2) | {
        "attn_logit_softcapping": data.number(key("attn_logit_softcapping"), 50.0),
        "final_logit_softcapping": data.number(key("final_logit_softcapping"), 30.0),
    }


def _gemma3(reading: Reading) -> dict[str, Any]:
    data, key = reading.metadata, reading.key
    if data.has(key("rope.scaling.type")) and data.text(key("rope.scaling.type")) not in ("none", "linear"):
        raise EngineError("GGUF_UNSUPPORTED", f"{key('rope.scaling.type')} of a gemma3 that is not linear")
    factor = {"rope_type": "default"}
    if data.text(key("rope.scaling.type"), "none") == "linear":
        factor = {"rope_type": "linear", "factor": data.number(key("rope.scaling.factor"))}  # type: ignore[dict-item]  # a field is a text or a number
    theta, local = (
        data.number(key("rope.freq_base"), 1e6),
        data.number(key("rope.freq_base_swa"), _GEMMA3_LOCAL_THETA),
    )
    return _gemma(reading, _GEMMA3_PATTERN) | {
        "rope_parameters": {
            "full_attention": {"rope_theta": theta, **factor},
            "sliding_attention": {"rope_theta": local, "rope_type": "default"},
        },
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", "llama", _PRE_NORM, permuted=True, more=_llama),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", _PRE_NORM, more=_qwen2),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", {**_PRE_NORM, **_QK_NORM}, more=_qwen3),
    "gemma2": Family("Gemma2ForCausalLM", "gemma2", _SANDWICH, norm_offset=1.0, more=_gemma2),
    "gemma3": Family("Gemma3ForCausalLM", "gemma3_text", {**_SANDWICH, **_QK_NORM}, norm_offset=1.0, more=_gemma3),
}
"""The architectures that are converted, by the name GGUF has for them."""
