"""An engine over the files of each family says what transformers says, and takes the memory that was planned."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import EngineError
from engine.footprint import Sizes
from engine.inspect.folder import Folder
from engine.inspect.verdict import judge
from engine.memory_plan import plan_memory, read_model
from engine.native_footprint import arena_bytes, scratch_bytes
from engine.options import EngineOptions
from kernels.native.program import NativeStep
from tests.engine.families import FAMILIES, Tiny, draw_tokens, expected, make
from tests.engine.plan_against_process import held_bytes
from tests.engine.test_inspect import packed
from tests.engine.tiny import byte_tokenizer, engine, file_set, teacher_forced

LAYOUTS: list[dict[str, Any]] = [
    {"backend": "torch", "deterministic": True},
    {"backend": "cpu", "dtype": "bfloat16"},
    {"backend": "reference", "dtype": "bfloat16"},
]
SMALL = {"max_step_tokens": 13, "max_running": 2, "block_size": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tiny]]:
    root = tmp_path_factory.mktemp("families")
    made = {model_type: (root / model_type, make(root / model_type, model_type, {})) for model_type in FAMILIES}
    for folder, _ in made.values():
        byte_tokenizer().save(str(folder / "tokenizer.json"))
    return made


@pytest.mark.parametrize("options", [SMALL, {"backend": "reference"}], ids=["cpu, small chunks", "reference"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_engine_says_what_transformers_says(
    models: dict[str, tuple[Path, Tiny]], model_type: str, options: dict[str, Any]
) -> None:
    folder, tiny = models[model_type]
    tokens = draw_tokens(3, count=50)
    logits = teacher_forced(engine(folder, **options), tokens, prompt_length=35)
    torch.testing.assert_close(logits, expected(tiny, tokens)[34:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_and_pages_of_each_family_are_planned_to_the_byte(
    models: dict[str, tuple[Path, Tiny]], model_type: str
) -> None:
    folder = models[model_type][0]
    for layout in LAYOUTS:
        options = layout | {"kv_blocks": 64, "block_size": 8, "threads": 1}
        loop = engine(folder, **options)
        runner: Any = loop._runner
        plan = plan_memory(read_model(*file_set(folder)), EngineOptions(**options), 1 << 40, cores=3)
        assert (plan.weights, plan.kv) == (held_bytes(runner._model), held_bytes(runner._kv)), layout
        if isinstance(runner._step, NativeStep):
            model = read_model(*file_set(folder))
            config: Any = model.config
            sizes = Sizes(config, model.shapes, plan.options, model.formats, model.layout.embeddings)
            taken = runner._step.arena_bytes + runner._step.scratch_bytes
            assert taken <= arena_bytes(sizes) + scratch_bytes(sizes) <= 2 * taken


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_family_is_judged_sound(models: dict[str, tuple[Path, Tiny]], model_type: str) -> None:
    folder, tiny = models[model_type]
    with packed(folder) as (fd, entries):
        found = judge(Folder(fd, entries))
    assert found.architecture == tiny.config["architectures"][0]
    assert found.parameters == sum(tensor.numel() for tensor in tiny.tensors.values())
    assert found.capabilities == ("generate",)
    assert ("experts" in found.facts) == (model_type in ("mixtral", "qwen3_moe", "gpt_oss"))
    assert ("sliding window" in found.facts) == (model_type in ("gemma2", "gemma3_text", "gpt_oss"))


@pytest.mark.parametrize("held", ["self_attn.rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freqs"])
def test_frequencies_that_older_files_hold_are_left_unread_and_nothing_else(
    models: dict[str, tuple[Path, Tiny]], tmp_path: Path, held: str
) -> None:
    folder = Path(shutil.copytree(models["llama"][0], tmp_path / "model"))
    frequencies = torch.arange(4) + 1.0
    save_file(models["llama"][1].tensors | {f"model.layers.1.{held}": frequencies}, folder / "model.safetensors")
    tokens = draw_tokens(3, count=20)
    if held.endswith("freqs"):
        with pytest.raises(EngineError, match=r"TENSORS_MISMATCH.*inv_freqs"):
            engine(folder)
        return
    logits = teacher_forced(engine(folder), tokens, prompt_length=15)
    torch.testing.assert_close(logits, expected(models["llama"][1], tokens)[14:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_same", [True, False])
def test_a_tied_model_whose_files_hold_a_head_is_read_as_transformers_reads_it(
    tmp_path: Path, is_same: bool
) -> None:
    from transformers import AutoModelForCausalLM

    tiny = make(tmp_path, "llama", {"tie_word_embeddings": True})
    table = tiny.tensors["model.embed_tokens.weight"]
    head = table.clone() if is_same else table.flip(0).contiguous()
    save_file(tiny.tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokens = draw_tokens(3, count=20)
    loop = engine(tmp_path, kv_blocks=64, block_size=8)
    read = tiny._replace(model=AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert torch.equal(expected(read, tokens), expected(tiny, tokens)) == is_same
    runner: Any = loop._runner
    assert plan_memory(read_model(*file_set(tmp_path)), loop.options, 1 << 40).weights == held_bytes(runner._model)
    logits = teacher_forced(loop, tokens, prompt_length=15)
    torch.testing.assert_close(logits, expected(read, tokens)[14:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_bfloat16_is_as_close_as_that_of_transformers(
    models: dict[str, tuple[Path, Tiny]], model_type: str
) -> None:
    folder, tiny = models[model_type]
    tokens = draw_tokens(4, count=30)
    logits = teacher_forced(engine(folder, dtype="bfloat16"), tokens, prompt_length=20)
    oracle = expected(tiny, tokens)[19:]
    rounded = expected(tiny._replace(model=copy.deepcopy(tiny.model).bfloat16()), tokens)[19:].float()
    off, theirs = (logits - oracle).std(-1), (rounded - oracle).std(-1)
    assert (
        off.median() < 2 * theirs.median()
    )  # where a rounding chooses another expert, a token's logits are others
    assert (rounded - oracle).std() < 0.2 * oracle.std()
