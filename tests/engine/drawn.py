"""Random configurations of every family, out of a seed that is printed on every run: CLOISTER_SEED repeats one."""

import os
import random
from typing import Any

SEED = int(os.environ.get("CLOISTER_SEED") or random.SystemRandom().randrange(10**6))
"""Of what is drawn in this run."""
_PLAIN_ROPES = ("llama", "mistral", "qwen2", "qwen3", "granite", "olmo2", "mixtral", "qwen3_moe", "gpt_oss")
_KINDS = ("full_attention", "sliding_attention")


def draw(model_type: str, seed: int) -> dict[str, Any]:
    """Fields of a configuration beside those of tests.engine.families.SIZES."""
    of = random.Random(f"{model_type} {seed}")
    heads = of.choice([2, 4, 8])
    layers = of.choice([1, 2, 3])
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": of.choice([n for n in (1, 2, 4, 8) if heads % n == 0]),
        "intermediate_size": of.choice([24, 40, 64]),
        "tie_word_embeddings": of.random() < 0.5,
        "rms_norm_eps": of.choice([1e-6, 1e-5, 1e-3]),
    }
    head_dim = 32 // heads
    if model_type not in ("phi3", "granite", "olmo2") and of.random() < 0.5:
        head_dim = changes["head_dim"] = of.choice([8, 16, 20])
    elif model_type not in ("llama", "mistral", "qwen2", "phi3", "granite", "olmo2"):
        changes["head_dim"] = head_dim
    if model_type in _PLAIN_ROPES:
        changes["rope_parameters"] = _rope(of, head_dim)
    return changes | _OWN[model_type](of, layers, head_dim)


def _rope(of: random.Random, head_dim: int) -> dict[str, Any]:
    kind = of.choice(["default", "linear", "dynamic", "yarn", "longrope", "llama3"])
    original = of.choice([16, 32, 128])
    own: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": of.uniform(1, 8)},
        "dynamic": {"factor": of.uniform(1, 8)},
        "yarn": {
            "factor": of.uniform(1, 40),
            "original_max_position_embeddings": original,
            "truncate": of.random() < 0.5,
            "beta_fast": of.choice([32.0, 8.0]),
        },
        "longrope": _factors(of, head_dim // 2) | {"original_max_position_embeddings": of.choice([16, 128])},
        "llama3": {
            "factor": of.uniform(1, 8),
            "low_freq_factor": of.uniform(0.5, 1),
            "high_freq_factor": of.uniform(2, 4),
            "original_max_position_embeddings": original,
        },
    }
    return own[kind] | {"rope_type": kind, "rope_theta": of.choice([500.0, 1e4, 1e6])}


def _factors(of: random.Random, count: int) -> dict[str, Any]:
    short, long = ([of.uniform(1, most) for _ in range(count)] for most in (2, 20))
    return {"short_factor": short, "long_factor": long}


def _maybe(of: random.Random, value: Any) -> Any:
    return value if of.random() < 0.5 else None


def _types(of: random.Random, layers: int) -> dict[str, Any]:
    return {"layer_types": [of.choice(_KINDS) for _ in range(layers)], "sliding_window": of.randrange(1, 30)}


def _llama(of: random.Random, layers: int, head_dim: int) -> dict[str, Any]:
    return {"attention_bias": of.random() < 0.5, "mlp_bias": of.random() < 0.5}


def _mistral(of: random.Random, layers: int, head_dim: int) -> dict[str, Any]:
    return {"sliding_window": _maybe(of, of.randrange(1, 30))}


def _qwen(of: random.Random, layers: int, head_dim: int) -> dict[str, Any]:
    windows = {"sliding_window": of.randrange(1, 30), "max_window_layers": of.randrange(layers + 1)}
    return windows | {"use_sliding_window": of.random() < 0.7}


def _qwen3(of: random.Random, layers: int, head_dim: int) -> dict[str, Any]:
    return _qwen(of, layers, head_dim) | {"attention_bias": of.random() < 0.5}


def _gemma2(of: random.Random, layers: int, head_dim: int) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": _maybe(of, of.uniform(1, 9)), "final_logit_softcapping": of.uniform(1, 9)}
    return _types(of, layers) | caps | {"query_pre_attn_scalar": of.choice([4, 24, 300])}


def _gemma3(of: random.Random, layers: int, head_dim: int) -> dict[str, Any]:
    full = of.choice([{"rope_type": "default"}, {"rope_type": "linear", "factor": of.uniform(1, 8)}])
    ropes = {
        "full_attention": full | {"rope_theta": of.choice([1e4, 1e6])},
        "sliding_attention": {"rope_type": "default", "rope_theta": of.choice([100.0, 1e4])},
    }
    own = {
        "rope_parameters": ropes,
        "final_logit_softcapping": _maybe(of, 3.0),
        "attention_bias": of.random() < 0.5,
    }
    return _types(of, layers) | own | {"query_pre_attn_scalar": of.choice([4, 24, 300])}


def _phi3(of: random.Random, layers: int, head_dim: int) -> dict[str, Any]:
    partial = of.choice([0.5, 1.0]) if head_dim >= 4 else 1.0
    rope: dict[str, Any] = {"rope_theta": 1e4, "partial_rotary_factor": partial, "rope_type": "default"}
    if of.random() < 0.6:
        rope |= _factors(of, int(head_dim * partial) // 2) | {"rope_type": "longrope"}
    window = _maybe(of, of.randrange(1, 30))
    return {
        "rope_parameters": rope,
        "original_max_position_embeddings": of.choice([16, 128]),
        "sliding_window": window,
    }


def _granite(of: random.Random, layers: int, head_dim: int) -> dict[str, Any]:
    scales = {
        "embedding_multiplier": (0.5, 4),
        "attention_multiplier": (0.05, 0.4),
        "residual_multiplier": (0.2, 1.5),
    }
    drawn = {name: of.uniform(*limits) for name, limits in scales.items()} | {"logits_scaling": of.uniform(1, 4)}
    return drawn | _llama(of, layers, head_dim)


def _olmo2(of: random.Random, layers: int, head_dim: int) -> dict[str, Any]:
    return {"attention_bias": of.random() < 0.5}


def _mixture(of: random.Random) -> dict[str, Any]:
    experts = of.choice([2, 4, 7])
    return {"num_local_experts": experts, "num_experts_per_tok": of.randrange(1, experts + 1)}


def _mixtral(of: random.Random, layers: int, head_dim: int) -> dict[str, Any]:
    return _mixture(of) | _mistral(of, layers, head_dim)


def _qwen3_moe(of: random.Random, layers: int, head_dim: int) -> dict[str, Any]:
    return (
        _mixture(of)
        | {"use_sliding_window": of.random() < 0.5, "sliding_window": of.randrange(1, 30)}
        | {"norm_topk_prob": of.random() < 0.5, "attention_bias": of.random() < 0.5}
        | {"moe_intermediate_size": of.choice([8, 24]), "decoder_sparse_step": of.choice([1, 2])}
        | {"mlp_only_layers": of.choice([[], [0]])}
    )


def _gpt_oss(of: random.Random, layers: int, head_dim: int) -> dict[str, Any]:
    return _mixture(of) | _types(of, layers) | {"attention_bias": of.random() < 0.7}


_OWN = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
    "olmo2": _olmo2,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
}
