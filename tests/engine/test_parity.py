"""Logits equal those of transformers, prompt and answer alike, in every variant of the family that is accepted."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from engine.errors import EngineError
from tests.engine.tiny import VOCAB, engine, save_llama, teacher_forced

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one head each": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "explicit head size": {"head_dim": 20, "num_attention_heads": 6, "num_key_value_heads": 2},
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cpu, small chunks": {"max_step_tokens": 13, "max_running": 2, "block_size": 4},
    "cpu, deterministic": {"deterministic": True},
    "cpu, deterministic, small chunks": {"deterministic": True, "max_step_tokens": 20, "max_running": 2},
    "reference": {"backend": "reference"},
}
DEMO = Path(__file__).parents[2] / "demo" / "demo-notes-s"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("models")
    folders = {name: root / str(i) for i, name in enumerate(VARIANTS)}
    for name, folder in folders.items():
        save_llama(folder, **VARIANTS[name])
    return {name: (folder, transformers_model(folder)) for name, folder in folders.items()}


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def expected_logits(model: Any, tokens: list[int], first: int) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0, first - 1 :]
    return logits


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(
    models: dict[str, tuple[Path, Any]], variant: str, options: str
) -> None:
    folder, model = models[variant]
    tokens = torch.randint(2, VOCAB, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    logits = teacher_forced(engine(folder, **OPTIONS[options]), tokens, prompt_length=70)
    torch.testing.assert_close(logits, expected_logits(model, tokens, 70), rtol=0, atol=1e-4)
    assert logits.std() > 0.5  # a flat model would pass any comparison


def test_bfloat16_logits_are_as_close_as_bfloat16_is(models: dict[str, tuple[Path, Any]]) -> None:
    folder, model = models["grouped queries"]
    tokens = torch.randint(2, VOCAB, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = expected_logits(model, tokens, 30)
    for deterministic in (False, True):
        loop = engine(folder, dtype="bfloat16", deterministic=deterministic)
        assert (teacher_forced(loop, tokens, 30) - expected).std() / expected.std() < 0.05


@pytest.mark.parametrize("options", OPTIONS)
def test_logits_of_the_demo_model_equal_those_of_transformers(options: str) -> None:
    model = transformers_model(DEMO)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (100,), generator=torch.Generator().manual_seed(3)).tolist()
    logits = teacher_forced(engine(DEMO, **OPTIONS[options]), tokens, prompt_length=80)
    torch.testing.assert_close(logits, expected_logits(model, tokens, 80), rtol=0, atol=1e-4)


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_logits_at_position_4000_equal_those_of_transformers_in_float64(tmp_path: Path, theta: float) -> None:
    save_llama(tmp_path, max_position_embeddings=4096, head_dim=64, rope_theta=theta)
    tokens = torch.randint(2, VOCAB, (4010,), generator=torch.Generator().manual_seed(4)).tolist()
    with torch.no_grad():
        model = transformers_model(tmp_path, torch.float64)
        oracle = model(torch.tensor([tokens]), logits_to_keep=11).logits[0].float()
    for deterministic in (False, True):
        loop = engine(tmp_path, kv_blocks=510, max_step_tokens=256, deterministic=deterministic)
        torch.testing.assert_close(teacher_forced(loop, tokens, 4000), oracle, rtol=0, atol=1e-4)


ODD: tuple[Any, ...] = (None, 0, -1, 1, 2, 64.7, 1.0, 10**9, 10**400, True, False, "", "gemma", "swish", [], {})
TOP = (
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "hidden_act"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    *("attention_dropout", "pretraining_tp", "partial_rotary_factor", "is_decoder", "add_cross_attention"),
    *("rms_norm_eps", "eos_token_id", "bos_token_id", "dtype", "use_cache", "surplus"),
)


@pytest.mark.parametrize("field", [*TOP, *(f"rope_scaling.{name}" for name in (*LLAMA3_ROPE, "type", "surplus"))])
def test_an_odd_value_in_the_configuration_is_refused_or_gives_the_logits_of_transformers(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, field: str
) -> None:
    source = models["grouped queries"][0]
    for path in source.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    raw = json.loads((source / "config.json").read_text())
    name, _, inner = field.partition(".")
    tokens = torch.randint(2, VOCAB, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    for odd in ODD:
        changed = raw | {name: LLAMA3_ROPE | {inner: odd} if inner else odd}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        logits, code = logits_or_refusal(tmp_path, tokens)
        assert code in ("", "CONFIG_INVALID", "CONFIG_UNSUPPORTED", "TENSORS_MISMATCH", "CONTEXT_OVERFLOW"), odd
        with contextlib.suppress(AttributeError, TypeError, ValueError, StrictDataclassError):
            if logits is not None:  # what transformers cannot read, such as a rope_theta of null, is no oracle
                expected = expected_logits(transformers_model(tmp_path), tokens, 58)
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4, msg=f"{odd!r}")


def logits_or_refusal(folder: Path, tokens: list[int]) -> tuple[torch.Tensor | None, str]:
    try:
        return teacher_forced(engine(folder), tokens, prompt_length=58), ""
    except EngineError as error:
        return None, error.code
