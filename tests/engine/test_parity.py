"""Logits of a Llama equal those of transformers, prompt and answer alike, whatever the engine's options are."""

from pathlib import Path
from typing import Any

import pytest
import torch

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
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "explicit head size": {"head_dim": 20, "num_attention_heads": 6, "num_key_value_heads": 2},
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
    logits = teacher_forced(engine(DEMO, dtype="float32", **OPTIONS[options]), tokens, prompt_length=80)
    torch.testing.assert_close(logits, expected_logits(model, tokens, 80), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("theta", "deterministic"), [(1e4, False), (5e5, True)])
def test_logits_at_position_4000_equal_those_of_transformers_in_float64(
    tmp_path: Path, theta: float, deterministic: bool
) -> None:
    save_llama(tmp_path, max_position_embeddings=4096, head_dim=64, rope_theta=theta)
    tokens = torch.randint(2, VOCAB, (4010,), generator=torch.Generator().manual_seed(4)).tolist()
    with torch.no_grad():
        model = transformers_model(tmp_path, torch.float64)
        oracle = model(torch.tensor([tokens]), logits_to_keep=11).logits[0].float()
    loop = engine(tmp_path, kv_blocks=510, max_step_tokens=256, deterministic=deterministic)
    torch.testing.assert_close(teacher_forced(loop, tokens, 4000), oracle, rtol=0, atol=1e-4)
