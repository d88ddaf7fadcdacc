"""The configuration reader takes both layouts of transformers, and refuses by name what it does not compute."""

import json
import subprocess
import sys
from typing import Any

import pytest

from engine.errors import EngineError
from engine.models.config import parse_config
from engine.models.registry import architecture
from engine.models.spec import ModelConfig, RopeConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "quantization_config": None,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def parse(**changes: Any) -> ModelConfig:
    return parse_config(json.dumps(LLAMA | changes).encode())


def test_absent_fields_take_the_defaults_of_the_family() -> None:
    config = parse(num_key_value_heads=None)
    assert (config.num_kv_heads, config.head_dim, config.ropes) == (4, 12, (RopeConfig(),))
    assert (config.attention_bias, config.mlp_bias, config.tie_word_embeddings) == (False, False, False)


def test_both_layouts_of_transformers_mean_the_same() -> None:
    old = parse(rope_theta=5e5, rope_scaling=LLAMA3 | {"rope_type": "llama3"})
    new = parse(rope_parameters=LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5})
    assert old == new
    assert new.ropes == (RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 8192),)
    assert parse(rope_scaling={"type": "linear", "factor": 2.0}).ropes == (RopeConfig("linear", factor=2.0),)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}, "axial"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "ntk"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 5e5}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "", "type": "linear", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 33.0}, "rope_theta": 5e5}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}}, "low_freq_factor"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": 1}, "add_cross_attention"),
        ({"max_position_embeddings": 10**9}, "max_position_embeddings"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_attention_heads": 10**6, "num_key_value_heads": 1, "head_dim": 2}, "num_attention_heads"),
        ({"hidden_size": 10**6}, "hidden_size"),
        ({"rope_theta": 1e300}, "rope_theta"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_changes_the_mathematics_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(EngineError, match=named) as error:
        parse(**changes)
    assert error.value.code == "CONFIG_UNSUPPORTED"


def test_quantised_weights_of_an_unknown_kind_are_refused_by_name() -> None:
    with pytest.raises(EngineError, match="quantization_config") as error:
        parse(quantization_config={"bits": 4})
    assert error.value.code == "QUANTISATION_UNSUPPORTED"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"eos_token_id": 300}, "eos_token_id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"architectures": []}, "architectures"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": ["linear"]}, "rope"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": 0.5}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"model_type": None}, "model_type"),
        ({"model_type": 7}, "model_type"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "head_dim"),
        (
            {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 64.7}},
            "original_max_position_embeddings",
        ),
        ({"rope_parameters": LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 4.0}}, "high_freq_factor"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_missing_or_of_the_wrong_type_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(EngineError, match=named) as error:
        parse(**changes)
    assert error.value.code == "CONFIG_INVALID"


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{"])
def test_what_is_not_a_json_object_is_refused(content: bytes) -> None:
    with pytest.raises(EngineError, match="CONFIG_INVALID"):
        parse_config(content)


def test_end_tokens_come_from_the_generation_config_where_it_names_any() -> None:
    config_json = json.dumps(LLAMA).encode()
    assert parse_config(config_json).eos_token_ids == (1,)
    assert parse_config(config_json, b'{"eos_token_id": [2, 3]}').eos_token_ids == (2, 3)
    assert parse_config(config_json, b'{"temperature": 1}').eos_token_ids == (1,)


def test_fields_that_change_nothing_are_accepted() -> None:
    no_ops = {
        "partial_rotary_factor": 1.0,
        "is_decoder": False,
        "add_cross_attention": False,
        "hidden_act": "swish",
    }
    assert parse(**no_ops) == parse()


@pytest.mark.parametrize("model_type", ["gemma", "mistral", "qwen2", ""])
def test_a_model_type_of_another_family_is_refused(model_type: str) -> None:
    with pytest.raises(EngineError, match="model_type") as error:
        architecture(parse(model_type=model_type))
    assert error.value.code == "CONFIG_UNSUPPORTED"


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(EngineError, match="MambaForCausalLM") as error:
        architecture(parse(architectures=["MambaForCausalLM"]))
    assert error.value.code == "ARCHITECTURE_UNSUPPORTED"


def test_configuration_and_tensor_shapes_are_judged_without_torch() -> None:
    script = (
        "import json, sys; from engine.models.config import parse_config;"
        "from engine.models.registry import architecture; from engine.weights.safetensors import read_header;"
        "c = parse_config(sys.stdin.buffer.read()); s = architecture(c).tensor_shapes(c);"
        "print(len(s), s['model.layers.1.self_attn.k_proj.weight'], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(LLAMA).encode(), capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == "21 (24, 48) False"
