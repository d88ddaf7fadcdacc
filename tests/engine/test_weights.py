"""Weights are read strictly and hashed before use: a changed byte, wrong shape or crooked header is refused."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.build import build_engine
from engine.errors import EngineError
from engine.models.config import parse_config
from engine.models.registry import architecture
from engine.options import EngineOptions
from engine.weights.files import FileSet, read_verified
from engine.weights.loading import load_weights
from engine.weights.safetensors import read_header
from kernels.cpu import CpuBackend
from kernels.reference import ReferenceBackend
from tests.engine.tiny import engine, file_set, request, run, save_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_llama(tmp_path / "model", hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    return tmp_path / "model"


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def truncate(path: Path, offset: int) -> None:
    path.write_bytes(path.read_bytes()[:offset])


def extend(path: Path, offset: int) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("change", [flip, truncate, extend])
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("model.safetensors", "WEIGHTS_DIGEST_MISMATCH"),
        ("config.json", "FILE_DIGEST_MISMATCH"),
        ("generation_config.json", "FILE_DIGEST_MISMATCH"),
        ("tokenizer.json", "FILE_DIGEST_MISMATCH"),
    ],
)
def test_a_file_changed_after_it_was_approved_is_refused(
    folder: Path, change: Callable[[Path, int], None], name: str, code: str
) -> None:
    files, open_file = file_set(folder)
    change(folder / name, -2)
    with pytest.raises(EngineError) as error:
        build_engine(files, open_file, EngineOptions(kv_blocks=8, threads=1))
    assert error.value.code == code
    assert name in error.value.message


def test_a_missing_file_is_refused_by_name(folder: Path) -> None:
    files, open_file = file_set(folder)
    without = FileSet(files.model_digest, tuple(f for f in files.files if f.path != "tokenizer.json"))
    with pytest.raises(EngineError, match=r"tokenizer\.json") as error:
        build_engine(without, open_file, EngineOptions(kv_blocks=8, threads=1))
    assert error.value.code == "MODEL_FILE_MISSING"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_every_float_type_come_back_as_they_were_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 5).to(dtype), "b": torch.randn(7).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_weights(*file_set(tmp_path), {"a": (3, 5), "b": (7,)})
    assert all(torch.equal(loaded.pop(name), tensor) for name, tensor in tensors.items())
    assert loaded.names == []


def test_weights_in_several_files_make_one_model(folder: Path) -> None:
    whole = engine(folder, kv_blocks=8)
    loaded = load_weights(*file_set(folder), {n: tuple(t.shape) for n, t in shards(folder).items()})
    names = loaded.names
    for i, part in enumerate((names[:4], names[4:])):
        save_file({n: loaded.pop(n).clone() for n in part}, folder / f"model-{i}.safetensors")
    (folder / "model.safetensors").unlink()
    split = engine(folder, kv_blocks=8)
    for loop in (whole, split):
        loop.submit(request(0, [5, 6, 7], max_tokens=10, ignore_eos=True))
    assert run(whole)[0].token_ids == run(split)[0].token_ids


def shards(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({"a": (2, 2)}, "b"),
        ({"a": (2, 2), "b": (4,), "c": (1,)}, "c"),
        ({"a": (4,), "b": (4,)}, "a"),
    ],
)
def test_tensors_other_than_the_model_declares_are_refused_by_name(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], named: str
) -> None:
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(EngineError, match=f"tensor {named} ") as error:
        load_weights(*file_set(tmp_path), shapes)
    assert error.value.code == "TENSORS_MISMATCH"


def test_each_tensor_has_a_buffer_of_its_own_so_that_it_can_go_alone(folder: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in shards(folder).items()}
    loaded = load_weights(*file_set(folder), shapes)
    for name in loaded.names:
        tensor = loaded.pop(name)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_tensor_in_two_files_is_refused_by_name(folder: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(16)}, folder / "more.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in shards(folder).items()}
    with pytest.raises(EngineError, match=r"tensor model\.norm\.weight is in more\.safetensors and in another"):
        load_weights(*file_set(folder), shapes)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.float8_e4m3fn], ids=str
)
def test_numbers_that_are_no_plain_weights_are_never_taken_for_such(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.zeros(2, 2).to(dtype)}, tmp_path / "model.safetensors")
    for matrices in ((), ("a",)):
        with pytest.raises(EngineError, match=r"DTYPE_UNSUPPORTED: tensor a is "):
            load_weights(*file_set(tmp_path), {"a": (2, 2)}, matrices)


def test_building_a_model_takes_every_tensor_and_ties_the_head_to_the_table(tmp_path: Path) -> None:
    save_llama(tmp_path, tie_word_embeddings=True, attention_bias=True)
    config = parse_config((tmp_path / "config.json").read_bytes())
    family = architecture(config)
    for ops in (CpuBackend(), ReferenceBackend()):
        weights = load_weights(*file_set(tmp_path), family.tensor_shapes(config))
        model = family.build(config, weights, ops, max_positions=8, context=8)
        assert weights.names == []
        assert model.head.weight.data_ptr() == model.table.data_ptr()


def container(header: object, data: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(begin: int = 0, end: int = 8, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [begin, end]} | changes


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1\0",
        struct.pack("<Q", 2**40) + b"{}",
        container(b"{"),
        container([]),
        container({"a": entry()}, data=9),
        container({"a": entry()}, data=7),
        container({"a": entry(0, 4)}),
        container({"a": entry(1, 9)}, data=9),
        container({"a": entry(), "b": entry()}),
        container({"a": entry(shape=[3])}),
        container({"a": entry(shape=[-2])}),
        container({"a": entry(shape=[2.0])}),
        container({"a": entry(dtype="I16")}),
        container({"a": entry(extra=1)}),
        container(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
    ],
    ids=lambda content: str(content[8:60]),
)
def test_a_crooked_header_is_refused(content: bytes) -> None:
    with pytest.raises(EngineError, match="WEIGHTS_INVALID"):
        read_header(content, len(content), "model.safetensors")


def test_the_descriptor_is_closed_whether_or_not_the_file_is_sound(folder: Path) -> None:
    import os

    files, open_file = file_set(folder)
    opened: list[int] = []

    def recording(digest: str) -> int:
        opened.append(open_file(digest))
        return opened[-1]

    read_verified(files.get("config.json"), recording)
    flip(folder / "config.json", 3)
    with pytest.raises(EngineError):
        read_verified(files.get("config.json"), recording)
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
