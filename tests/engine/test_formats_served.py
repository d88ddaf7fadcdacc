"""Models with quantised matrices say what models of their dequantised matrices say, however they are computed."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import EngineError
from engine.inspect import verdict
from engine.inspect.folder import Folder
from engine.memory_plan import plan_memory, read_model
from engine.models.config import parse_config
from engine.models.registry import architecture
from engine.options import EngineOptions
from kernels.cpu import CpuBackend
from kernels.native.backend import NativeBackend
from kernels.native.location import find_library
from kernels.packed import dequantise
from kernels.reference import ReferenceBackend
from tests.engine.families import Tiny, computed, draw_tokens, make
from tests.engine.plan_against_process import held_bytes
from tests.engine.quantised import FORMATS, Packer, load
from tests.engine.test_inspect import packed
from tests.engine.tiny import byte_tokenizer, engine, file_set, request, run, teacher_forced

SIZES = {"vocab_size": 304, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
BYTES = ("int8 (ours)", "int8, embeddings too (ours)", "compressed w8a8")  # their inputs may be rounded, too
LAYOUTS: list[dict[str, Any]] = [
    {"backend": "cpu", "dtype": "float32"},
    {"backend": "cpu", "dtype": "bfloat16"},
    {"backend": "torch", "dtype": "bfloat16"},
    {"backend": "reference", "dtype": "bfloat16"},
    {"backend": "triton", "dtype": "bfloat16"},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make(tmp_path_factory.mktemp("llama"), "llama", SIZES)


class Pair:
    """A model whose matrices are quantised, and the one of the numbers they then stand for."""

    def __init__(
        self, config: Mapping[str, Any], plain: Mapping[str, torch.Tensor], method: Any, pack: Packer
    ) -> None:
        self.quantised, self.plain = dict(plain), dict(plain)
        self.config, self.quantised_config = dict(config), {**config, "quantization_config": method}
        known = parse_config(json.dumps(config).encode())
        family = architecture(known)
        tables = family.tables(known) if "embeddings" in method else frozenset()
        for name in family.matrices(known) | tables:
            made = pack(plain[name])
            del self.quantised[name]
            self.quantised |= {
                f"{name.removesuffix('weight')}{key}": tensor for key, tensor in made.tensors.items()
            }
            self.plain[name] = made.plain

    def logits(self, ops: Any, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all tokens, the first half in chunks and the rest one by one: quantised, and plain."""
        (found,) = computed(json.dumps(self.quantised_config).encode(), self.quantised, ops, [tokens])
        (wanted,) = computed(json.dumps(self.config).encode(), self.plain, ops, [tokens])
        return found, wanted

    def save(self, folder: Path) -> Path:
        """The quantised model as files, in two shards."""
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.quantised_config))
        names = sorted(self.quantised)
        for i, part in enumerate((names[::2], names[1::2])):
            save_file({n: self.quantised[n].contiguous() for n in part}, folder / f"model-{i}.safetensors")
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        return folder


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_model_says_what_its_dequantised_matrices_say(llama: Tiny, name: str, tmp_path: Path) -> None:
    method, packer = FORMATS[name]
    pair, tokens = Pair(llama.config, llama.tensors, method, packer), draw_tokens(5, count=14)
    exact, wanted = pair.logits(ReferenceBackend(), tokens)
    torch.testing.assert_close(exact, wanted, rtol=0, atol=1e-5)
    for exactly in (CpuBackend(), *([NativeBackend()] if find_library() else [])):
        torch.testing.assert_close(pair.logits(exactly, tokens)[0], wanted, rtol=0, atol=1e-4)
    for deterministic in (False, True):
        found, plain = pair.logits(CpuBackend(torch.bfloat16, deterministic), tokens)
        bound = 3 if name in BYTES else 1.5
        assert distance(found, wanted) < bound * distance(plain, wanted) + 0.002
    folder = pair.save(tmp_path)
    torch.testing.assert_close(
        teacher_forced(engine(folder, dtype="float32"), tokens, 8), wanted[7:], rtol=0, atol=1e-4
    )
    for layout in LAYOUTS:
        options = layout | {"kv_blocks": 16, "block_size": 8, "threads": 1}
        loop: Any = engine(folder, **options)
        plan = plan_memory(read_model(*file_set(folder)), EngineOptions(**options), 1 << 40, cores=3)
        assert plan.weights == held_bytes(loop._runner._model), layout


@pytest.mark.parametrize("model_type", ["phi3", "mixtral", "qwen3_moe", "gemma2"])
def test_matrices_are_quantised_in_every_kind_of_layer(model_type: str, tmp_path: Path) -> None:
    tiny = make(tmp_path, model_type, SIZES | ({"moe_intermediate_size": 64} if "moe" in model_type else {}))
    for name in ("gptq act-order", "int4 g32, embeddings too (ours)"):
        pair, tokens = Pair(tiny.config, tiny.tensors, *FORMATS[name]), draw_tokens(6, count=16)
        for ops in (ReferenceBackend(), CpuBackend()):
            torch.testing.assert_close(*pair.logits(ops, tokens), rtol=0, atol=1e-4)


def test_experts_in_mxfp4_say_what_their_plain_numbers_say(tmp_path: Path) -> None:
    tiny = make(tmp_path, "gpt_oss", SIZES)
    quantised, plain = dict(tiny.tensors), dict(tiny.tensors)
    method, generator = {"quant_method": "mxfp4"}, torch.Generator().manual_seed(2)
    stacks = [name for name in tiny.tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert stacks
    for name in stacks:
        experts, inner, out = quantised.pop(name).shape
        shape = (experts, out, inner // 32)
        packed_stack = {
            f"{name}_blocks": torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8),
            f"{name}_scales": torch.randint(122, 125, shape, generator=generator, dtype=torch.uint8),
        }
        quantised |= packed_stack
        matrices = load(method, packed_stack, {name: (experts, inner, out)}).experts(name)
        plain[name] = torch.stack([dequantise(matrix).T for matrix in matrices]).contiguous()
    with_method, tokens = (
        json.dumps(tiny.config | {"quantization_config": method}).encode(),
        draw_tokens(7, count=16),
    )
    native = [(NativeBackend(), 1e-4)] if find_library() else []
    for ops, bound in ((ReferenceBackend(), 1e-5), (CpuBackend(), 1e-4), *native):
        (found,) = computed(with_method, quantised, ops, [tokens])
        (wanted,) = computed(json.dumps(tiny.config).encode(), plain, ops, [tokens])
        torch.testing.assert_close(found, wanted, rtol=0, atol=bound)
    (tmp_path / "config.json").write_bytes(with_method)
    save_file(quantised, tmp_path / "model.safetensors")
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    for layout in LAYOUTS:
        options = layout | {"kv_blocks": 16, "block_size": 8, "threads": 1}
        loop: Any = engine(tmp_path, **options)
        plan = plan_memory(read_model(*file_set(tmp_path)), EngineOptions(**options), 1 << 40, cores=3)
        assert plan.weights == held_bytes(loop._runner._model), layout


@pytest.mark.parametrize(
    "name", ["int8 (ours)", "int4 g32 (ours)", "int8, embeddings too (ours)", "gptq act-order", "fp8 blocks"]
)
def test_a_deterministic_answer_has_the_same_bits_whatever_shares_its_steps(
    llama: Tiny, name: str, tmp_path: Path
) -> None:
    folder = Pair(llama.config, llama.tensors, *FORMATS[name]).save(tmp_path)
    options = {"dtype": "bfloat16", "deterministic": True}
    prompt = draw_tokens(8, count=11)
    alone, together = engine(folder, **options), engine(folder, **options)
    for loop, mates in ((alone, 0), (together, 5)):
        loop.submit(request(0, prompt, max_tokens=12, ignore_eos=True, logprobs=3))
        for mate in range(1, mates + 1):
            loop.submit(request(mate, draw_tokens(mate, count=3 * mate), max_tokens=9, ignore_eos=True))
    first, second = run(alone)[0], run(together)[0]
    assert first.token_ids == second.token_ids
    assert first.logprobs == second.logprobs


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("int8 (ours)", "int8"),
        ("int4 g32 (ours)", "int4 g32"),
        ("int4 g32, embeddings too (ours)", "int4 g32"),
        ("awq g32", "int4 g32 (awq)"),
        ("gptq act-order", "int4 g32 (gptq)"),
        ("compressed w8a8", "int8 (compressed-tensors)"),
        ("compressed fp8", "fp8 (compressed-tensors)"),
        ("fp8 blocks", "fp8 16x32"),
    ],
)
def test_a_quantised_model_is_sound_and_described_by_how_it_is_stored(
    tiny_llama: Path, tmp_path: Path, name: str, label: str
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    with packed(folder) as (fd, entries):
        before = verdict.judge(Folder(fd, entries))
    pair = Pair(config, tensors, *FORMATS[name])
    (folder / "config.json").write_text(json.dumps(pair.quantised_config))
    (folder / "quantize_config.json").write_text(json.dumps(pair.quantised_config["quantization_config"]))
    save_file(pair.quantised, folder / "model.safetensors")
    with packed(folder) as (fd, entries):
        found = verdict.judge(Folder(fd, entries))
    assert (found.dtype, found.quantisation, found.parameters) == (label, label, before.parameters)
    assert before.quantisation is None
    facts = {"quantised matrices": "14 of 14"} | ({"quantised embeddings": label} if "embeddings" in name else {})
    assert found.facts == {**before.facts, **facts}
    save_file(
        {n: t for n, t in pair.quantised.items() if "layers.1.mlp.up" not in n}, folder / "model.safetensors"
    )
    with (
        packed(folder) as (fd, entries),
        pytest.raises(EngineError, match=r"layers\.1\.mlp\.up_proj.*is missing") as error,
    ):
        verdict.judge(Folder(fd, entries))
    assert error.value.code == "TENSORS_MISMATCH"


def test_the_memory_of_a_quantised_model_is_a_fraction_of_its_plain_numbers(llama: Tiny, tmp_path: Path) -> None:
    options = EngineOptions(kv_blocks=16, dtype="bfloat16")
    weights = {}
    for name in ("int8 (ours)", "int4 g32 (ours)", "int4 g32, embeddings too (ours)"):
        folder = Pair(llama.config, llama.tensors, *FORMATS[name]).save(tmp_path / name)
        weights[name] = plan_memory(read_model(*file_set(folder)), options, 1 << 40, cores=3).weights
    plain = sum(tensor.numel() * 2 for tensor in llama.tensors.values())
    assert weights["int4 g32 (ours)"] < weights["int8 (ours)"] < plain
    assert weights["int4 g32, embeddings too (ours)"] < weights["int4 g32 (ours)"]
