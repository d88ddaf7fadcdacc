"""Content: a signature vouches for bytes, not for what a parser makes of them."""

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundles.content import forbidden, safetensors
from bundles.content.inspector import Inspector
from bundles.content.judge import judge
from bundles.format.errors import BundleError
from tests.bundles.making import INSPECTOR, make_model, with_header
from tests.bundles.making import safetensors as weights

_8 = bytes(8)


def _tensors_of(path: Path, raw: bytes) -> tuple[safetensors.Tensor, ...]:
    path.write_bytes(raw)
    fd = os.open(path, os.O_RDONLY)
    try:
        return safetensors.read_tensors(fd, len(raw), "model.safetensors")
    finally:
        os.close(fd)


def test_a_sound_file_gives_its_tensors_in_the_order_of_their_data(tmp_path: Path) -> None:
    raw = weights({"b": ("F32", [1], [4, 8]), "a": ("U8", [2, 2], [0, 4]), "e": ("F16", [0], [8, 8])}, _8)
    assert [(t.name, t.begin) for t in _tensors_of(tmp_path / "w", raw)] == [("a", 0), ("b", 4), ("e", 8)]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "SAFETENSORS_HEADER"),
        (b"1234567", "SAFETENSORS_HEADER"),
        (struct.pack("<Q", 2**63) + b"{}", "SAFETENSORS_HEADER"),
        (struct.pack("<Q", 100_000_001) + b"{}", "SAFETENSORS_HEADER"),
        (struct.pack("<Q", 3) + b"{}", "SAFETENSORS_HEADER"),
        (with_header(b'{"__metadata__": {"a": 1}}', b""), "SAFETENSORS_HEADER"),
        (with_header(b'{"a": 1, "a": 2}', b""), "JSON_DUPLICATE_KEY"),
        (with_header(b'{"a": 1}', b""), "SAFETENSORS_TENSOR"),
        (weights({"a": ("F7", [8], [0, 8])}, _8), "SAFETENSORS_TENSOR"),
        (weights({"a": ("U8", [-8], [0, 8])}, _8), "SAFETENSORS_TENSOR"),
        (weights({"a": ("U8", [8], [8, 0])}, _8), "SAFETENSORS_TENSOR"),
        (weights({"a": ("F32", [8], [0, 8])}, _8), "SAFETENSORS_SIZE"),
        (weights({"a": ("U8", [2**40, 2**40], [0, 8])}, _8), "SAFETENSORS_SIZE"),
        (weights({"a": ("U8", [9], [0, 9])}, _8), "SAFETENSORS_SIZE"),
        (weights({"a": ("U8", [8], [0, 8]), "b": ("U8", [4], [4, 8])}, _8), "SAFETENSORS_OVERLAP"),
        (weights({"a": ("U8", [4], [0, 4]), "b": ("U8", [2], [6, 8])}, _8), "SAFETENSORS_HOLE"),
        (weights({"a": ("U8", [4], [0, 4])}, _8), "SAFETENSORS_HOLE"),
    ],
)
def test_weights_that_lie_about_themselves_are_refused(tmp_path: Path, raw: bytes, code: str) -> None:
    with pytest.raises(BundleError) as error:
        _tensors_of(tmp_path / "w", raw)
    assert error.value.code == code


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_the_header_reader_do_anything_but_refuse(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    for content in (raw, struct.pack("<Q", len(raw)) + raw):
        try:
            _tensors_of(path, content)
        except BundleError:
            continue


def test_an_index_that_names_an_absent_or_wrong_shard_is_refused() -> None:
    shards = {"x/1.safetensors": frozenset({"a"}), "x/2.safetensors": frozenset({"b"})}
    path = "x/model.safetensors.index.json"
    safetensors.check_index({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}, shards, path)
    for weight_map in ({"a": "3.safetensors"}, {"a": "2.safetensors"}, {"a": "../x/1.safetensors"}):
        with pytest.raises(BundleError, match="INDEX_SHARD_ABSENT"):
            safetensors.check_index({"weight_map": weight_map}, shards, path)
    with pytest.raises(BundleError, match="INDEX_SCHEMA"):
        safetensors.check_index({}, shards, path)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("pytorch_model.bin", "CONTENT_PICKLE"),
        ("a/optimizer.PT", "CONTENT_PICKLE"),
        ("x.ckpt", "CONTENT_PICKLE"),
        ("modeling_evil.py", "CONTENT_CODE"),
        ("lib.so", "CONTENT_CODE"),
        ("lib.so.1.2", "CONTENT_CODE"),
        ("run.SH", "CONTENT_CODE"),
        ("model.gguf", "CONTENT_TYPE"),
        ("archive.tar", "CONTENT_TYPE"),
        ("noextension", "CONTENT_TYPE"),
    ],
)
def test_a_kind_that_can_carry_code_is_refused_by_its_name(name: str, code: str) -> None:
    with pytest.raises(BundleError) as error:
        forbidden.check_names(["config.json", name])
    assert error.value.code == code


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (b"\x80\x02}q\x00(X", "CONTENT_PICKLE"),
        (b"\x80\x04\x95\x10\x00", "CONTENT_PICKLE"),
        (b"PK\x03\x04....", "CONTENT_PICKLE"),
        (b"\x7fELF\x02\x01", "CONTENT_CODE"),
        (b"MZ\x90\x00", "CONTENT_CODE"),
        (b"#!/bin/sh\n", "CONTENT_CODE"),
        (b"GGUF\x03\x00", "CONTENT_TYPE"),
        (b"\x1f\x8b\x08\x00", "CONTENT_TYPE"),
    ],
)
def test_a_forbidden_format_under_another_name_is_refused(tmp_path: Path, first: bytes, code: str) -> None:
    for name in ("tokenizer.model", "README.md", "model.safetensors"):
        with pytest.raises(BundleError) as error:
            forbidden.check_magic(name, first)
        assert error.value.code == code
    # A safetensors file whose header length happens to look like one is judged by its header instead.
    forbidden.check_magic("model.safetensors", b"MZ\0\0\0\0\0\0{")


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        (
            "config.json",
            b'{"architectures": ["LlamaForCausalLM"], "auto_map": {"x": "y.Z"}}',
            "CONTENT_REMOTE_CODE",
        ),
        ("tokenizer_config.json", b'{"a": [{"auto_map": null}]}', "CONTENT_REMOTE_CODE"),
        ("generation_config.json", b'{"trust_remote_code": true}', "CONTENT_REMOTE_CODE"),
        ("config.json", b'{"\\u0061uto_map": {}}', "CONTENT_REMOTE_CODE"),
        ("config.json", b'{"a": 1, "a": 2}', "JSON_DUPLICATE_KEY"),
        ("chat_template.jinja", b"\xff\xfe", "CONTENT_TEXT"),
        ("README.md", b"a\0b", "CONTENT_TEXT"),
        ("config.json", b'{"architectures": ["MysteryModel"]}', "UNSUPPORTED_ARCHITECTURE"),
        ("config.json", b'{"architectures": ["x"], "exit": 3}', "INSPECT_FAILED"),
        ("model.safetensors", weights({"a": ("U8", [4], [0, 4])}, _8), "SAFETENSORS_HOLE"),
    ],
)
def test_a_folder_with_one_bad_file_is_refused(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    model = make_model(tmp_path / "m")
    (model / "canaries.json").unlink()
    (model / name).write_bytes(content)
    with pytest.raises(BundleError) as error:
        _judge(model, INSPECTOR)
    assert error.value.code == code


def _judge(model: Path, inspector: Inspector) -> object:
    opened = {path.name: os.open(path, os.O_RDONLY) for path in model.iterdir()}
    try:
        return judge({name: (fd, os.fstat(fd).st_size) for name, fd in opened.items()}, inspector)
    finally:
        for fd in opened.values():
            os.close(fd)


def test_an_inspector_that_never_answers_is_killed(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    (model / "config.json").write_text('{"architectures": ["x"], "sleep": true}')
    with pytest.raises(BundleError, match="INSPECT_TIMEOUT"):
        _judge(model, Inspector(INSPECTOR.command, timeout=0.3))
    with pytest.raises(BundleError, match="INSPECT_FAILED"):
        _judge(model, Inspector(INSPECTOR.command, cpu_seconds=1))


def test_an_inspector_cannot_write_what_it_judges(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "write": true}')
    with pytest.raises(BundleError, match="INSPECT_FAILED"):
        _judge(model, INSPECTOR)


def test_an_inspector_that_cannot_be_started_or_babbles_is_a_refusal(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    for command in (("/nonexistent",), ("/bin/true",), ("/bin/echo", '{"ok": "yes"}'), ("/bin/echo", "{}{}")):
        with pytest.raises(BundleError, match="INSPECT_FAILED"):
            _judge(model, Inspector(command))


def test_the_real_inspector_understands_the_question(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    (model / "config.json").write_text(
        json.dumps({"architectures": ["MysteryForCausalLM"], "model_type": "mystery"})
    )
    with pytest.raises(BundleError) as error:
        _judge(model, Inspector())
    assert error.value.code not in ("INSPECT_FAILED", "INSPECT_TIMEOUT", "INVALID_QUESTION")
