"""engine-inspect: the verdict on a model's files, by the process as the importer runs it."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError
from engine.inspect import adapter, verdict
from engine.inspect.folder import Entry, Folder
from tests.engine.tiny_models import CONTEXT, VOCABULARY, byte_tokenizer, write_tokenizer
from tests.engine.vector_models import add_modules, save

PARAMETERS = VOCABULARY * 32 + 32 + 2 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)


@contextmanager
def packed(folder: Path) -> Iterator[tuple[int, list[Entry]]]:
    """All files of a folder in one piece of memory, as the importer hands them over."""
    fd = os.memfd_create("files")
    try:
        entries, position = [], 0
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            size = os.write(fd, path.read_bytes())
            entries.append(Entry(path.relative_to(folder).as_posix(), size, position, size))
            position += size
        yield fd, entries
    finally:
        os.close(fd)


def ask(folder: Path, program: tuple[str, ...] = ("-m", "engine.inspect"), kind: str = "model") -> tuple[int, str]:
    """Run the process on a folder; its exit status and output."""
    with packed(folder) as (fd, entries):
        done = subprocess.run(
            [sys.executable, *program],
            input=json.dumps({"kind": kind, "fd": fd, "files": [e._asdict() for e in entries]}).encode(),
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
            timeout=60,
        )
    return done.returncode, done.stdout.decode()


def refusal(folder: Path, judge: Callable[[Folder], verdict.Verdict] = verdict.judge) -> EngineError:
    """What the judgement of a folder ends with, judged in this process."""
    with packed(folder) as (fd, entries), pytest.raises(EngineError) as refused:
        judge(Folder(fd, entries))
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
        "facts": {
            "layers": "2",
            "hidden size": "32",
            "attention heads": "4",
            "key-value heads": "2",
            "vocabulary": str(VOCABULARY),
            "tokenizer vocabulary": str(VOCABULARY),
        },
        "quantisation": None,
    }


@pytest.mark.parametrize(
    ("family", "kind", "capability", "facts"),
    [
        ("bert", "Model", "embed", {"vectors": "cls pooling, normalised"}),
        ("modernbert", "Model", "embed", {"vectors": "cls pooling, normalised"}),
        ("xlm-roberta", "ForSequenceClassification", "rerank", {"scores": "sigmoid"}),
        ("qwen3", "Model", "embed", {"vectors": "last pooling, normalised", "key-value heads": "2"}),
    ],
)
def test_encoders_and_embedders_are_described_by_what_they_are_for(
    tmp_path: Path, family: str, kind: str, capability: str, facts: dict[str, str]
) -> None:
    fields = {"bert": {}, "modernbert": {}, "xlm-roberta": {"num_labels": 1}, "qwen3": {"num_key_value_heads": 2}}
    save(tmp_path, family, kind, vocab_size=VOCABULARY, num_hidden_layers=1, **fields[family])
    write_tokenizer(tmp_path, byte_tokenizer())
    if kind == "Model":
        mode = "pooling_mode_lasttoken" if family == "qwen3" else "pooling_mode_cls_token"
        add_modules(tmp_path, mode, "Normalize", max_seq_length=50)
    with packed(tmp_path) as (fd, entries):
        found = verdict.judge(Folder(fd, entries))
    assert found.capabilities == (capability,)
    assert found.max_context_tokens == {"embed": 50, "rerank": 94}[capability]
    assert facts.items() <= found.facts.items()


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


def test_a_template_that_is_too_long_or_reaches_for_hidden_names_is_refused_wherever_it_is(copied: Path) -> None:
    (copied / "additional_chat_templates").mkdir()
    extra = copied / "additional_chat_templates" / "tool_use.jinja"
    extra.write_text("{{ 'x' * 3 }}")
    with packed(copied) as (fd, entries):
        verdict.judge(Folder(fd, entries))
    for source, code in (
        ("x" * (2**20 + 1), "TEMPLATE_TOO_LARGE"),
        ("{% if false %}{{ messages.__class__ }}{% endif %}", "TEMPLATE_REFUSED"),
        ("{% if false %}{{ messages['__class__'] }}{% endif %}", "TEMPLATE_REFUSED"),
        ("{% if false %}{{ messages | attr('__class__') }}{% endif %}", "TEMPLATE_REFUSED"),
    ):
        extra.write_text(source)
        assert refusal(copied).code == code
        for given in (source, [{"name": "tool_use", "template": source}]):
            other = copied.with_name(f"{copied.name}-settings")
            shutil.rmtree(other, ignore_errors=True)
            shutil.copytree(copied, other)
            shutil.rmtree(other / "additional_chat_templates")
            (other / "tokenizer_config.json").write_text(json.dumps({"chat_template": given}))
            assert refusal(other).code == code


def test_unknown_quantisation_and_number_types_are_refused_by_name(copied: Path) -> None:
    edit_json(copied / "config.json", lambda config: config.update(quantization_config={"quant_method": "hqq"}))
    error = refusal(copied)
    assert (error.code, "hqq" in error.message) == ("QUANTISATION_UNSUPPORTED", True)
    edit_json(copied / "config.json", lambda config: config.pop("quantization_config"))
    (copied / "quantize_config.json").write_text("{}")
    assert refusal(copied).code == "QUANTISATION_UNSUPPORTED"
    (copied / "quantize_config.json").unlink()

    def pack(header: dict[str, Any]) -> None:
        tensor = header["model.norm.weight"]
        tensor["dtype"], tensor["shape"] = "U8", [tensor["shape"][0] * 4]

    edit_header(copied / "model.safetensors", pack)
    error = refusal(copied)
    assert (error.code, "U8" in error.message) == ("DTYPE_UNSUPPORTED", True)
    edit_header(copied / "model.safetensors", lambda header: header["model.norm.weight"].update(dtype="BOOL"))
    error = refusal(copied)
    assert (error.code, "BOOL" in error.message) == ("DTYPE_UNSUPPORTED", True)


RANK = 4


def make_adapter(folder: Path, tensors: Mapping[str, tuple[int, int]] | None = None, **changes: object) -> Path:
    """A LoRA adapter of the tiny model, as PEFT writes it."""
    folder.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "r": RANK,
        "rank_pattern": {},
        "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    header: dict[str, object] = {}
    position = 0
    for name, shape in (adapter_tensors() if tensors is None else tensors).items():
        end = position + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(position))
    return folder


def adapter_tensors() -> dict[str, tuple[int, int]]:
    sizes = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (64, 32)}
    found = {}
    for layer in range(2):
        for module, (inner, outer) in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            found[f"{prefix}.lora_A.weight"] = (RANK, inner)
            found[f"{prefix}.lora_B.weight"] = (outer, RANK)
    return found


def test_a_sound_adapter_is_described(tmp_path: Path) -> None:
    status, output = ask(make_adapter(tmp_path / "a"), kind="adapter")
    assert status == 0
    assert json.loads(output) == {
        "ok": True,
        "architecture": "LoRA",
        "max_context_tokens": 0,
        "parameters": 2 * (RANK * (32 + 32) + RANK * (64 + 32)),
        "dtype": "float32",
        "capabilities": [],
        "facts": {
            "rank": "4",
            "alpha": "8",
            "scaling": "alpha / rank",
            "targets": "down_proj, q_proj",
            "layers": "2",
        },
        "quantisation": None,
    }


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"peft_type": "IA3"}, "ADAPTER_UNSUPPORTED"),
        ({"auto_mapping": {"parent_library": "evil"}}, "ADAPTER_UNSUPPORTED"),
        ({"modules_to_save": ["lm_head"]}, "ADAPTER_UNSUPPORTED"),
        ({"use_dora": True}, "ADAPTER_UNSUPPORTED"),
        ({"bias": "all"}, "ADAPTER_UNSUPPORTED"),
        ({"rank_pattern": {"q_proj": 8}}, "ADAPTER_UNSUPPORTED"),
        ({"init_lora_weights": "pissa"}, "ADAPTER_UNSUPPORTED"),
        ({"invented": 1}, "ADAPTER_UNSUPPORTED"),
        ({"layers_to_transform": 0}, "ADAPTER_UNSUPPORTED"),
        ({"target_modules": ["q_proj", "lm_head"]}, "ADAPTER_UNSUPPORTED"),
        ({"target_modules": ".*"}, "ADAPTER_INVALID"),
        ({"r": 0}, "ADAPTER_INVALID"),
        ({"r": True}, "ADAPTER_INVALID"),
        ({"lora_alpha": None}, "ADAPTER_INVALID"),
        ({"r": 8}, "ADAPTER_TENSORS"),
        ({"target_modules": ["q_proj"]}, "ADAPTER_TENSORS"),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "ADAPTER_TENSORS"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused(
    tmp_path: Path, change: dict[str, object], code: str
) -> None:
    assert refusal(make_adapter(tmp_path / "a", **change), adapter.judge).code == code


def test_an_adapter_with_a_tensor_missing_surplus_or_misshaped_is_refused(tmp_path: Path) -> None:
    first, *_ = adapter_tensors()
    for change in (
        {first: None},
        {first: (RANK, 16)},
        {first: (32, RANK)},
        {"base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight": (RANK, 32)},
        {"lm_head.weight": (32, 32)},
    ):
        tensors = {name: shape for name, shape in (adapter_tensors() | change).items() if shape}
        assert refusal(make_adapter(tmp_path / "a", tensors), adapter.judge).code == "ADAPTER_TENSORS"


@pytest.mark.parametrize("surplus", ["tokenizer.json", "config.json", "more.safetensors"])
def test_an_adapter_brings_nothing_else_that_a_loader_reads(tmp_path: Path, surplus: str) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / surplus).write_text("{}")
    assert refusal(folder, adapter.judge).code == "ADAPTER_FILES"
    (folder / surplus).unlink()
    (folder / "adapter_config.json").unlink()
    assert refusal(folder, adapter.judge).code == "ADAPTER_FILES"
