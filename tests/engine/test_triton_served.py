"""A model served by the Triton backend, in the interpreter: the tokens that the reference backend draws."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.derived import loading
from engine.errors import EngineError
from tests.engine import vector_models
from tests.engine.tiny import engine, request, run, save_llama

LIMITS = {"max_running": 3, "max_step_tokens": 16, "kv_blocks": 24, "max_context_tokens": 32}
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16, 17, 18]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    save_llama(made, num_hidden_layers=1)
    return made


def answers(folder: Path, **options: Any) -> list[Any]:
    """Of a greedy request, a drawn one and one whose logits are adjusted, side by side."""
    loop = engine(folder, **(LIMITS | options))
    asked: list[dict[str, Any]] = [
        {"prompt_logprobs": 1},
        {"temperature": 0.8, "top_k": 20, "seed": 4},
        {"temperature": 0.5, "seed": 5, "repetition_penalty": 1.3, "logprobs": 2},
    ]
    for handle, (prompt, how) in enumerate(zip(PROMPTS, asked, strict=True)):
        loop.submit(request(handle, prompt, 4, ignore_eos=True, **how))
    return [answer for _, answer in sorted(run(loop).items())]


def test_without_its_device_a_worker_is_refused_before_a_weight_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*args: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "load_weights", unread)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="is to run on GPU-a, and CUDA shows 0 devices") as error:
        engine(folder, device="GPU-a")
    assert error.value.code == "DEVICE_UNAVAILABLE"


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_vectors_are_those_of_the_reference(tmp_path: Path, family: str) -> None:
    vector_models.save(tmp_path, family, **({"local_attention": 16} if family == "modernbert" else {}))
    asked = vector_models.texts(2)
    expected = vector_models.vectors(engine(tmp_path, backend="reference", dtype="float32"), asked)
    for deterministic in (False, True):
        loop = engine(tmp_path, backend="triton", dtype="float32", deterministic=deterministic)
        torch.testing.assert_close(vector_models.vectors(loop, asked), expected, rtol=0, atol=1e-5)


def test_the_answers_are_those_of_the_reference(folder: Path) -> None:
    expected = answers(folder, backend="reference", dtype="float32")
    for deterministic in (False, True):
        found = answers(folder, backend="triton", dtype="float32", deterministic=deterministic)
        assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
