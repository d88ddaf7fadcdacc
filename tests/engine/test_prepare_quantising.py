"""A model's folder quantised: what it computes afterwards, what is reported of it, and what is refused."""

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import EngineError
from engine.prepare import quantising
from engine.prepare.__main__ import refusal as answer_to
from engine.prepare.calibration import count, read_calibration
from engine.prepare.folder import ModelFolder
from engine.prepare.quantising import quantise_folder
from engine.prepare.question import Settings
from engine.prepare.streaming import perplexity, read_plain
from engine.prepare.weights_file import TensorPlan, writing
from tests.engine import families
from tests.engine.tiny import engine, save_llama, teacher_forced
from tests.engine.tiny_models import byte_tokenizer, write_tokenizer

WORDS = ("water", "damage", "claim", "paid", "hour", "ward", "three", "account", "Hartwell", "transfer")
INT8, INT4 = (8, 0, True), (4, 32, False)


def silent(stage: str, done: int, total: int) -> None:
    """Hears nothing."""


def write_texts(path: Path, texts: int = 24) -> Path:
    lines = [{"text": " ".join(WORDS[(i * j + j) % 10] for j in range(1, 30))} for i in range(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def quantise(
    source: Path,
    out: Path,
    way: tuple[int, int, bool],
    calibration: Path | None,
    tokens: int = 2000,
    embeddings: int = 0,
) -> dict[str, Any]:
    out.mkdir()
    return quantise_folder(source, out, Settings(*way, calibration, tokens, 1, embeddings), silent)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    (folder / "LICENSE").write_text("Be good.\n")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture(scope="module")
def int4(llama: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("int4") / "out"
    return out, quantise(llama, out, INT4, texts)


def dequantised(source: Path, quantised: Path, folder: Path) -> Path:
    """A plain model of the numbers that the quantised one stands for."""
    folder.mkdir()
    read = ModelFolder(quantised)
    save_file({name: read_plain(read, name).contiguous() for name in read.shapes}, folder / "model.safetensors")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


@pytest.mark.parametrize("way", [INT8, INT4, (4, 128, False), (4, 32, True)])
def test_a_quantised_model_is_served_as_the_numbers_that_it_stands_for(
    way: tuple[int, int, bool], llama: Path, texts: Path, tmp_path: Path
) -> None:
    quantise(llama, tmp_path / "out", way, texts)
    plain = dequantised(llama, tmp_path / "out", tmp_path / "plain")
    tokens = torch.randint(2, 300, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    for backend in ("cpu", "reference"):
        found = teacher_forced(
            engine(tmp_path / "out", backend=backend, dtype="float32"), tokens, prompt_length=30
        )
        wanted = teacher_forced(engine(plain, backend=backend, dtype="float32"), tokens, prompt_length=30)
        assert float((found - wanted).norm() / wanted.norm()) < 2e-3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("way", "bits", "bound"), [(INT8, 8, 0.006), (INT4, 4, 0.08)])
def test_embeddings_and_heads_are_quantised_where_that_is_asked(
    way: tuple[int, int, bool], bits: int, bound: float, tied: bool, texts: Path, tmp_path: Path
) -> None:
    tmp_path.joinpath("m").mkdir()
    save_llama(tmp_path / "m", tie_word_embeddings=tied)
    source, out = tmp_path / "m", tmp_path / "out"
    report = quantise(source, out, way, texts, embeddings=bits)
    tables = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    stored, stated = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    assert not {name for name in stored if name in tables}
    assert stated["quantization_config"]["embeddings"]["bits"] == bits
    assert sorted(each["name"] for each in report["tables"]) == sorted(tables)
    for each in report["tables"]:
        weight, found = (read_plain(ModelFolder(folder), each["name"]) for folder in (source, out))
        wanted = float((found - weight).norm() / weight.norm())
        assert each["error"] == pytest.approx(wanted, rel=1e-3)
        assert 0 < wanted < bound
    plain = dequantised(source, out, tmp_path / "plain")
    tokens = torch.randint(2, 300, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    for backend in ("cpu", "reference"):
        found, wanted_logits = (
            teacher_forced(engine(folder, backend=backend, dtype="float32"), tokens, prompt_length=30)
            for folder in (out, plain)
        )
        assert float((found - wanted_logits).norm() / wanted_logits.norm()) < 2e-3
    assert report["calibration"]["perplexity_after"] == pytest.approx(
        perplexity(ModelFolder(plain), read_calibration(texts, ModelFolder(plain).text(), 1, 2000).held_out),
        rel=1e-4,
    )


def test_every_linear_layer_is_quantised_and_everything_else_is_what_it_was(
    llama: Path, int4: tuple[Path, dict[str, Any]]
) -> None:
    out, report = int4
    before, after = load_file(llama / "model.safetensors"), load_file(out / "model.safetensors")
    parts = (*(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    matrices = {f"model.layers.{i}.{part}.weight" for i in range(2) for part in parts}
    assert {each["name"] for each in report["matrices"]} == matrices
    assert {name for name in before if name in after} == before.keys() - matrices
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - matrices)
    config = json.loads((out / "config.json").read_text())
    stated = config.pop("quantization_config")
    assert stated == {"quant_method": "cloister", "bits": 4, "group_size": 32, "symmetric": False}
    assert config == json.loads((llama / "config.json").read_text())
    assert (out / "LICENSE").read_bytes() == (llama / "LICENSE").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_the_same_input_gives_the_same_bytes(
    llama: Path, texts: Path, int4: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    report = quantise(llama, tmp_path / "again", INT4, texts)
    assert report == int4[1]
    for path in int4[0].iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_the_errors_reported_are_those_of_the_first_layer_s_outputs_over_the_calibration(
    llama: Path, texts: Path, int4: tuple[Path, dict[str, Any]]
) -> None:
    """Of the first layer, whose inputs no quantised layer has touched, by transformers."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(llama).eval()
    calibration = read_calibration(texts, ModelFolder(llama).text(), 1, 2000)
    seen: list[torch.Tensor] = []
    layer = network.model.layers[0].self_attn.v_proj
    layer.register_forward_hook(lambda module, given, made: seen.append(given[0][0]))
    with torch.no_grad():
        for sample in calibration.texts:
            network(torch.tensor([list(sample.ids)]))
    x = torch.cat(seen)
    name = "model.layers.0.self_attn.v_proj.weight"
    change = layer.weight.detach() - read_plain(ModelFolder(int4[0]), name)
    wanted = float((x @ change.T).norm() / (x @ layer.weight.detach().T).norm())
    (found,) = [each for each in int4[1]["matrices"] if each["name"] == name]
    assert found["error"] == pytest.approx(wanted, rel=1e-3)
    assert found["tokens"] == len(x) == count(calibration.texts)
    assert found["error"] < found["rounded"]


def test_perplexity_is_what_transformers_makes_of_the_texts_that_were_held_out(
    llama: Path, texts: Path, int4: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    told = int4[1]["calibration"]
    held_out = read_calibration(texts, ModelFolder(llama).text(), 1, 2000).held_out
    assert (told["held_out_texts"], told["sha256"]) == (3, hashlib.sha256(texts.read_bytes()).hexdigest())
    plain = dequantised(llama, int4[0], tmp_path / "plain")
    for folder, found in ((llama, told["perplexity_before"]), (plain, told["perplexity_after"])):
        network = AutoModelForCausalLM.from_pretrained(folder).eval()
        lost, foreseen = 0.0, 0
        with torch.no_grad():
            for sample in held_out:
                ids = torch.tensor([list(sample.ids)])
                lost += float(network(ids, labels=ids).loss) * (ids.shape[1] - 1)
                foreseen += ids.shape[1] - 1
        assert found == pytest.approx(math.exp(lost / foreseen), rel=1e-4)


def test_of_a_conversation_only_its_last_answer_is_foreseen_after_the_prompt_as_it_is_served(
    tmp_path: Path,
) -> None:
    save_llama(tmp_path / "m", vocab_size=320)
    write_tokenizer(tmp_path / "m", byte_tokenizer())
    talk = [{"role": "user", "content": "Which claims?"}, {"role": "assistant", "content": "Claim 4711."}]
    (tmp_path / "talk.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 8)
    text = ModelFolder(tmp_path / "m").text()
    (sample,) = read_calibration(tmp_path / "talk.jsonl", text, 1, 4000).held_out
    assert text.detokenize(sample.ids[sample.first :]) == "Claim 4711."
    assert sample.ids[-1] == 1
    asked = "<|begin|><|user|>Which claims?<|end|><|assistant|>"
    assert byte_tokenizer().encode(asked).ids == list(sample.ids[: sample.first])
    assert perplexity(ModelFolder(tmp_path / "m"), [sample]) > 1


@pytest.mark.parametrize("name", ["mixtral", "gemma3_text"])
def test_models_of_other_families_and_their_experts_are_quantised(name: str, texts: Path, tmp_path: Path) -> None:
    tiny = families.make(tmp_path / "m", name, {})
    from tests.engine.tiny import byte_tokenizer as tokenizer

    tokenizer().save(str(tmp_path / "m" / "tokenizer.json"))
    report = quantise(tmp_path / "m", tmp_path / "out", INT4, texts, 300)
    found, plain = ModelFolder(tmp_path / "out"), ModelFolder(tmp_path / "m")
    assert {each["name"] for each in report["matrices"]} == plain.matrices
    for each in report["matrices"]:
        change = read_plain(found, each["name"]) - tiny.tensors[each["name"]].float()
        assert float(change.norm()) < 0.5 * float(tiny.tensors[each["name"]].float().norm())


def test_int8_needs_no_text_and_tells_the_error_of_the_numbers_themselves(llama: Path, tmp_path: Path) -> None:
    report = quantise(llama, tmp_path / "out", INT8, None)
    assert report["calibration"] is None
    assert all(0 < each["error"] < 0.02 and each["tokens"] == 0 for each in report["matrices"])


def refusal(*given: Any) -> EngineError:
    with pytest.raises(EngineError) as refused:
        quantise(*given)
    return refused.value


def test_int4_without_a_text_and_what_is_quantised_already_are_refused(
    llama: Path, texts: Path, int4: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    assert refusal(llama, tmp_path / "a", INT4, None).code == "CALIBRATION_MISSING"
    assert refusal(int4[0], tmp_path / "b", INT4, texts).code == "QUANTISE_UNSUPPORTED"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ('{"text": "a b c"}\n' * 7, "CALIBRATION_TOO_SMALL"),
        ('{"text": "a b c"}\n' * 8 + "[]\n", "CALIBRATION_INVALID"),
        ('{"text": 5}\n', "CALIBRATION_INVALID"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "CALIBRATION_INVALID"),
        ("not JSON\n", "CALIBRATION_INVALID"),
    ],
)
def test_texts_that_are_too_few_or_none_are_refused(content: str, code: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(content)
    assert refusal(llama, tmp_path / "out", INT4, tmp_path / "texts.jsonl").code == code


def test_too_little_memory_and_too_little_disk_are_told_with_numbers_before_anything_is_written(
    llama: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(quantising, "available_bytes", lambda: 1000)
        error = refusal(llama, tmp_path / "a", INT4, texts)
    assert error.code == "OUT_OF_MEMORY"
    assert "1000 are free" in error.message
    state = os.statvfs(tmp_path)
    full = os.statvfs_result((state.f_bsize, state.f_frsize, *([1] * 8)))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    assert refusal(llama, tmp_path / "b", INT4, texts).code == "DISK_FULL"
    assert not [*(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir()]


def test_a_model_whose_answers_are_no_numbers_is_refused_by_name(llama: Path, texts: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1e38)
    save_file(tensors, broken / "model.safetensors")
    assert refusal(broken, tmp_path / "out", INT4, texts).code == "CALIBRATION_INVALID"


def test_a_header_that_claims_to_be_the_whole_of_a_large_file_is_refused_before_it_is_in_memory(
    llama: Path, tmp_path: Path
) -> None:
    huge = tmp_path / "huge"
    shutil.copytree(llama, huge)
    with (huge / "model.safetensors").open("wb") as stream:
        stream.write((1 << 40).to_bytes(8, "little"))
        stream.truncate(1 << 40)
    assert refusal(huge, tmp_path / "out", INT8, None).code == "WEIGHTS_INVALID"


def test_a_disk_that_fills_up_and_a_source_that_fails_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer_to(OSError(errno.ENOSPC, "No space left", "config.json"))["code"] == "DISK_FULL"
    assert answer_to(OSError(errno.EIO, "Input/output error", "weights"))["code"] == "SOURCE_UNREADABLE"

    def fails() -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.EIO, "Input/output error", "weights")

    with pytest.raises(OSError, match="weights"), writing(tmp_path, {"w": TensorPlan("F32", (2,))}) as writer:
        writer.write("w", fails())

    def full(fd: int, data: bytes, position: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(EngineError) as refused, writing(other, {"w": TensorPlan("F32", (2,))}) as writer:
        writer.write("w", [b"12345678"])
    assert refused.value.code == "DISK_FULL"


def test_the_process_tells_how_far_it_is_and_ends_with_its_report(
    llama: Path, texts: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    question = {"do": "quantise", "source": str(llama), "out": str(tmp_path / "out"), "bits": 4, "group": 128,
                "symmetric": False, "calibration": str(texts), "tokens": 900, "threads": 1,
                "embeddings": 8}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-m", "engine.prepare"], input=json.dumps(question).encode(), stdout=-1, check=True
    )
    *progress, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert progress[0]["stage"] == "perplexity before"
    assert {"quantising", "perplexity after"} <= {line["stage"] for line in progress}
    assert last["ok"]
    assert len(last["report"]["matrices"]) == 14
    assert last["report"]["tables"]
    refused = subprocess.run([sys.executable, "-P", "-m", "engine.prepare"], input=b"{}", stdout=-1, check=True)
    assert json.loads(refused.stdout)["code"] == "INVALID_QUESTION"
