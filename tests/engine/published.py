"""Configurations as their publishers put them on the Hugging Face hub, and how many numbers their weights have."""

from typing import Any

_COMMON = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
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
            "attention_dropout": 0.0,
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
            "attention_dropout": 0.0,
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
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_act": "silu",
            "max_window_layers": 36,
            "rope_scaling": None,
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
            "attention_dropout": 0.0,
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
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "pad_token_id": 0,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
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
            "attention_dropout": 0.0,
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
            "attention_dropout": 0.0,
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
            "attention_dropout": 0.0,
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 12.0,
            "hidden_act": "silu",
            "logits_scaling": 16.0,
            "mlp_bias": False,
            "residual_multiplier": 0.22,
            "rope_scaling": None,
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
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "rope_scaling": None,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
        },
        7_298_617_344,
    ),
    "Mixtral 8x7B": (
        _sizes(32000, 4096, 14336, 32, 32, 8, 32768, 1e-5)
        | _named("MixtralForCausalLM", "mixtral")
        | {
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "output_router_logits": False,
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
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "output_router_logits": False,
            "rope_scaling": None,
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
            "attention_dropout": 0.0,
            "experts_per_token": 4,
            "head_dim": 64,
            "hidden_act": "silu",
            "initial_context_length": 4096,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "num_experts_per_tok": 4,
            "num_local_experts": 32,
            "output_router_logits": False,
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
