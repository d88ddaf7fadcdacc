"""Configurations as their publishers put them on the Hugging Face hub, and how many numbers their weights have."""

from typing import Any

_COMMON = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "attention_dropout": 0.0,
    "rope_scaling": None,
}
_LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def _sizes(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, context: int, eps: float
) -> dict[str, Any]:
    return _COMMON | {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
        "transformers_version": "4.45.0",
    }


def _named(architecture: str, model_type: str) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type}


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 2 7B": (
        _sizes(32000, 4096, 11008, 32, 32, 32, 4096, 1e-5)
        | _named("LlamaForCausalLM", "llama")
        | {"hidden_act": "silu", "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False},
        6_738_415_616,
    ),
    "Llama 3.1 8B": (
        _sizes(128256, 4096, 14336, 32, 32, 8, 131072, 1e-5)
        | _named("LlamaForCausalLM", "llama")
        | {
            "attention_bias": False,
            "eos_token_id": [128001, 128008, 128009],
            "hidden_act": "silu",
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rope_scaling": _LLAMA3,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
        },
        8_030_261_248,
    ),
    "Mistral 7B": (
        _sizes(32000, 4096, 14336, 32, 32, 8, 32768, 1e-5)
        | _named("MistralForCausalLM", "mistral")
        | {"hidden_act": "silu", "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False},
        7_241_732_096,
    ),
    "Qwen 2.5 7B": (
        _sizes(152064, 3584, 18944, 28, 28, 4, 131072, 1e-6)
        | _named("Qwen2ForCausalLM", "qwen2")
        | {
            "hidden_act": "silu",
            "max_window_layers": 28,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "use_mrope": False,
            "use_sliding_window": False,
        },
        7_615_616_512,
    ),
    "Qwen 3 8B": (
        _sizes(151936, 4096, 12288, 36, 32, 8, 40960, 1e-6)
        | _named("Qwen3ForCausalLM", "qwen3")
        | {
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "max_window_layers": 36,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        },
        8_190_735_360,
    ),
    "Gemma 2 2B": (
        _sizes(256000, 2304, 9216, 26, 8, 4, 8192, 1e-6)
        | _named("Gemma2ForCausalLM", "gemma2")
        | {
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "pad_token_id": 0,
            "query_pre_attn_scalar": 256,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
        },
        2_614_341_888,
    ),
    "Gemma 3 1B": (
        _sizes(262144, 1152, 6912, 26, 4, 1, 32768, 1e-6)
        | _named("Gemma3ForCausalLM", "gemma3_text")
        | {
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "pad_token_id": 0,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        999_885_952,
    ),
    "Phi 3 mini 128k": (
        _sizes(32064, 3072, 8192, 32, 32, 32, 131072, 1e-5)
        | _named("Phi3ForCausalLM", "phi3")
        | {
            "attention_bias": False,
            "embd_pdrop": 0.0,
            "hidden_act": "silu",
            "original_max_position_embeddings": 4096,
            "resid_pdrop": 0.0,
            "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.1] * 48, "type": "longrope"},
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": False,
        },
        3_821_079_552,
    ),
    "Phi 4 mini": (
        _sizes(200064, 3072, 8192, 32, 24, 8, 131072, 1e-5)
        | _named("Phi3ForCausalLM", "phi3")
        | {
            "attention_bias": False,
            "embd_pdrop": 0.0,
            "full_attn_mod": 1,
            "hidden_act": "silu",
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "mlp_bias": False,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "resid_pdrop": 0.0,
            "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
        },
        3_836_021_760,
    ),
    "Granite 3.1 8B": (
        _sizes(49155, 4096, 12800, 40, 32, 8, 131072, 1e-5)
        | _named("GraniteForCausalLM", "granite")
        | {
            "attention_bias": False,
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 12.0,
            "hidden_act": "silu",
            "logits_scaling": 16.0,
            "mlp_bias": False,
            "residual_multiplier": 0.22,
            "rope_theta": 10000000.0,
            "tie_word_embeddings": True,
        },
        8_170_848_256,
    ),
    "OLMo 2 7B": (
        _sizes(100352, 4096, 11008, 32, 32, 32, 4096, 1e-6)
        | _named("Olmo2ForCausalLM", "olmo2")
        | {
            "attention_bias": False,
            "hidden_act": "silu",
            "rope_theta": 500000,
            "tie_word_embeddings": False,
        },
        7_298_617_344,
    ),
    "Mixtral 8x7B": (
        _sizes(32000, 4096, 14336, 32, 32, 8, 32768, 1e-5)
        | _named("MixtralForCausalLM", "mixtral")
        | {
            "hidden_act": "silu",
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        46_702_792_704,
    ),
    "Qwen 3 30B A3B": (
        _sizes(151936, 2048, 6144, 48, 32, 4, 40960, 1e-6)
        | _named("Qwen3MoeForCausalLM", "qwen3_moe")
        | {
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        },
        30_532_122_624,
    ),
    "gpt-oss 20B": (
        _sizes(201088, 2880, 2880, 24, 64, 8, 131072, 1e-5)
        | _named("GptOssForCausalLM", "gpt_oss")
        | {
            "attention_bias": True,
            "experts_per_token": 4,
            "head_dim": 64,
            "hidden_act": "silu",
            "initial_context_length": 4096,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "num_experts_per_tok": 4,
            "num_local_experts": 32,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
        },
        20_914_757_184,
    ),
}


def _other(of: str, count: int, **changes: Any) -> tuple[dict[str, Any], int]:
    """Another model of a family, whose configuration has these fields instead."""
    return PUBLISHED[of][0] | changes, count


PUBLISHED |= {
    "Llama 3.2 1B": _other(
        "Llama 3.1 8B",
        1_235_814_400,
        head_dim=64,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        rope_scaling=_LLAMA3 | {"factor": 32.0},
        tie_word_embeddings=True,
        _attn_implementation_autoset=True,  # as what unsloth publishes has it
        unsloth_fixed=True,
        unsloth_version="2024.11.6",
    ),
    "Vicuna 7B 16k": _other(
        "Llama 2 7B", 6_738_415_616, max_sequence_length=16384, rope_scaling={"factor": 4.0, "type": "linear"}
    ),
    "Mistral Nemo": _other(
        "Mistral 7B",
        12_247_782_400,
        vocab_size=131072,
        hidden_size=5120,
        head_dim=128,
        num_hidden_layers=40,
        max_position_embeddings=1024000,
        rope_theta=1000000.0,
        sliding_window=None,
    ),
    "Qwen 2.5 0.5B": _other(
        "Qwen 2.5 7B",
        494_032_768,
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_window_layers=21,
        tie_word_embeddings=True,
    ),
    "Qwen 2.5 7B, to 128k": _other(
        "Qwen 2.5 7B",
        7_615_616_512,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    ),
    "Qwen 3 Coder 30B A3B": _other(
        "Qwen 3 30B A3B",
        30_532_122_624,
        intermediate_size=5472,
        max_position_embeddings=262144,
        max_window_layers=28,
        qkv_bias=False,
        rope_theta=10000000,
        shared_expert_intermediate_size=0,
        use_qk_norm=True,
    ),
    "Gemma 2 9B": _other(
        "Gemma 2 2B",
        9_241_705_984,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        sliding_window_size=4096,
    ),
    "Gemma 2 27B": _other(
        "Gemma 2 2B",
        27_227_128_320,
        hidden_size=4608,
        intermediate_size=36864,
        num_hidden_layers=46,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
        sliding_window_size=4096,
        _attn_implementation="eager",
    ),
    "Phi 4": _other(
        "Phi 3 mini 128k",
        14_659_507_200,
        vocab_size=100352,
        hidden_size=5120,
        intermediate_size=17920,
        num_attention_heads=40,
        num_hidden_layers=40,
        num_key_value_heads=10,
        max_position_embeddings=16384,
        original_max_position_embeddings=16384,
        rope_scaling=None,
        rope_theta=250000,
        sliding_window=None,
    ),
    "Mixtral 8x22B": _other(
        "Mixtral 8x7B",
        140_620_634_112,
        hidden_size=6144,
        intermediate_size=16384,
        num_hidden_layers=56,
        num_attention_heads=48,
        max_position_embeddings=65536,
        router_jitter_noise=0.0,
    ),
    "gpt-oss 120B": _other(
        "gpt-oss 20B",
        116_829_156_672,
        layer_types=["sliding_attention", "full_attention"] * 18,
        num_hidden_layers=36,
        num_local_experts=128,
    ),
}


def shrunken(name: str) -> dict[str, Any]:
    """A published configuration, as tiny as transformers can compute it in a moment: with its heads, but 8 wide.

    What is not a size stays; windows are as short as a test's prompts.
    """
    fields = dict(PUBLISHED[name][0])
    heads, kv_heads = (fields[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    kv_heads = max(1, min(kv_heads, 8 * kv_heads // heads))
    heads = kv_heads * (heads // fields["num_key_value_heads"])
    layers = 2 * fields.get("sliding_window_pattern", 1)
    small = {
        "vocab_size": 300,
        "hidden_size": 8 * heads,
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_experts": 6,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "experts_per_token": 2,
        "sliding_window": 6,
        "sliding_window_size": 6,
        "eos_token_id": 1,
        "layer_types": fields.get("layer_types", [])[:layers],
    }
    fields |= {key: value for key, value in small.items() if fields.get(key) is not None} | {"pad_token_id": 0}
    rope = fields.get("rope_scaling") or {}
    rotated = int(8 * fields.get("partial_rotary_factor", 1)) // 2
    shorter = {key: value[:rotated] for key, value in rope.items() if isinstance(value, list)}
    return fields | ({"rope_scaling": rope | shorter} if rope else {})
