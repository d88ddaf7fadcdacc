"""In deterministic mode a row's bits on the device do not depend on what shares the step, or where it lies."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.triton.backend import TritonBackend
from tests.engine.families import PAGE, computed, draw_tokens, make

PROMPTS = [draw_tokens(seed, count) for seed, count in ((1, 9), (2, 5), (3, 31), (4, 1), (5, 17))]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_oss"])
def test_a_prompt_has_the_same_bits_alone_and_among_others(family: str, tmp_path: Path) -> None:
    model = make(tmp_path, family, {})
    ops: Any = TritonBackend(torch.bfloat16, deterministic=True, device="cuda")
    with torch.inference_mode():
        together = computed(model.config_json, model.tensors, ops, PROMPTS, chunk=2 * PAGE)
        for prompt, beside in zip(PROMPTS, together, strict=True):
            (alone,) = computed(model.config_json, model.tensors, ops, [prompt], chunk=PAGE)
            assert torch.equal(alone, beside)
