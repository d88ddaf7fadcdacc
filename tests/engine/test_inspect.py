"""engine-inspect: the verdict on a model's files, by the process as the importer runs it."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError
from engine.inspect.folder import Folder
from engine.inspect.verdict import judge
from tests.engine.tiny_models import CONTEXT, VOCABULARY

PARAMETERS = VOCABULARY * 32 + 32 + 2 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)


def ask(folder: Path, program: tuple[str, ...] = ("-m", "engine.inspect")) -> tuple[int, str]:
    """Run the process on a folder; its exit status and output."""
    descriptors = {path.name: os.open(path, os.O_RDONLY) for path in folder.iterdir()}
    try:
        done = subprocess.run(
            [sys.executable, *program, "--folder-json", "-"],
            input=json.dumps({"files": [{"path": path, "fd": fd} for path, fd in descriptors.items()]}).encode(),
            stdout=subprocess.PIPE,
            pass_fds=tuple(descriptors.values()),
            timeout=60,
        )
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return done.returncode, done.stdout.decode()


def refusal(folder: Path) -> EngineError:
    """What the judgement of a folder ends with, judged in this process."""
    descriptors = {path.name: os.open(path, os.O_RDONLY) for path in folder.iterdir()}
    try:
        with pytest.raises(EngineError) as refused:
            judge(Folder(descriptors))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return refused.value


@pytest.fixture
def copied(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a safetensors header, keeping the data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


def test_a_sound_model_is_described(tiny_llama: Path) -> None:
    status, output = ask(tiny_llama)
    assert status == 0
    assert json.loads(output) == {
        "ok": True,
        "architecture": "LlamaForCausalLM",
        "max_context_tokens": CONTEXT,
        "parameters": PARAMETERS,
        "dtype": "float32",
        "capabilities": ["generate", "chat"],
    }


def test_the_process_never_loads_torch_and_lowers_its_limits(tiny_llama: Path) -> None:
    program = (
        "import resource, sys; from engine.inspect.__main__ import main; sys.argv[0] = 'inspect'; main();"
        "print('torch' in sys.modules, resource.RLIM_INFINITY in (resource.getrlimit(resource.RLIMIT_AS) + "
        "resource.getrlimit(resource.RLIMIT_CPU)))"
    )
    _, output = ask(tiny_llama, ("-c", program))
    verdict, facts = output.splitlines()
    assert json.loads(verdict)["ok"]
    assert facts == "False False"


def test_a_refusal_is_an_answer_with_status_0(copied: Path) -> None:
    edit_json(copied / "config.json", lambda config: config.update(auto_map={"AutoModel": "evil.Model"}))
    status, output = ask(copied)
    assert status == 0
    answer = json.loads(output)
    assert (answer["ok"], answer["code"]) == (False, "AUTO_MAP_REFUSED")


def test_a_tensor_missing_surplus_or_misshaped_is_refused_by_name(copied: Path) -> None:
    weights = copied / "model.safetensors"
    original = weights.read_bytes()
    norm = "model.layers.0.input_layernorm.weight"
    changes: list[tuple[Callable[[dict[str, Any]], None], str]] = [
        (lambda header: header.update({"other.weight": header.pop(norm)}), f"tensor {norm} is missing"),
        (lambda header: header[norm].update(shape=[4, 8]), f"tensor {norm} has shape [4, 8], not [32]"),
    ]
    for change, said in changes:
        weights.write_bytes(original)
        edit_header(weights, change)
        error = refusal(copied)
        assert error.code == "TENSORS_MISMATCH"
        assert said in error.message
    weights.write_bytes(original)
    edit_json(copied / "config.json", lambda config: config.update(num_hidden_layers=1))
    error = refusal(copied)
    assert "tensor model.layers.1." in error.message
    assert "is not part of" in error.message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}surplus",
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}         ' + b"x" * 12,
    ],
    ids=["empty", "huge-header", "no-object", "surplus", "hole"],
)
def test_an_unsound_safetensors_file_is_refused(copied: Path, content: bytes) -> None:
    (copied / "model.safetensors").write_bytes(content)
    assert refusal(copied).code == "WEIGHTS_INVALID"


def test_a_tensor_in_two_files_is_refused(copied: Path) -> None:
    shutil.copy(copied / "model.safetensors", copied / "more.safetensors")
    assert refusal(copied).code == "TENSORS_MISMATCH"


def test_an_unknown_configuration_field_is_refused_by_name(copied: Path) -> None:
    edit_json(copied / "config.json", lambda config: config.update(attention_sinks=4))
    error = refusal(copied)
    assert error.code == "CONFIG_UNSUPPORTED"
    assert "attention_sinks" in error.message


def test_a_tokenizer_larger_than_the_model_is_refused(copied: Path) -> None:
    def add_token(tokenizer: dict[str, Any]) -> None:
        token = {**tokenizer["added_tokens"][0], "id": VOCABULARY, "content": "<|extra|>"}
        tokenizer["added_tokens"].append(token)

    edit_json(copied / "tokenizer.json", add_token)
    assert refusal(copied).code == "TOKENIZER_TOO_LARGE"


@pytest.mark.parametrize(
    ("template", "code"),
    [
        ("{% for m in messages %}", "TEMPLATE_INVALID"),
        ("{{ messages[0].__class__.__base__.__subclasses__() }}", "TEMPLATE_REFUSED"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "TEMPLATE_REFUSED"),
    ],
    ids=["broken", "escapes", "endless"],
)
def test_a_template_that_is_broken_escapes_or_does_not_end_is_refused(
    copied: Path, template: str, code: str
) -> None:
    (copied / "chat_template.jinja").write_text(template)
    assert refusal(copied).code == code


def test_loading_the_tokenizer_and_the_template_is_bounded_too(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.inspect.verdict.LOAD_CPU_S", 0.02)
    (copied / "chat_template.jinja").write_text("{% if messages %}{{ messages }}{% endif %}" * 20_000)
    assert refusal(copied).code == "TEXT_TOO_COSTLY"


@pytest.mark.parametrize("name", ["modeling.py", "pytorch_model.bin", "optimizer.PT"])
def test_a_file_that_may_hold_code_is_refused(copied: Path, name: str) -> None:
    (copied / name).write_bytes(b"x")
    assert refusal(copied).code == "CODE_REFUSED"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("config.json", "MODEL_FILE_MISSING"),
        ("model.safetensors", "MODEL_FILE_MISSING"),
        ("tokenizer.json", "TOKENIZER_MISSING"),
    ],
)
def test_a_missing_file_is_refused(copied: Path, name: str, code: str) -> None:
    (copied / name).unlink()
    assert refusal(copied).code == code


def test_a_model_without_a_template_can_generate_only(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    status, output = ask(copied)
    assert status == 0
    assert json.loads(output)["capabilities"] == ["generate"]
