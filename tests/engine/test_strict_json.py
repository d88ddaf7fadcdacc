"""JSON from outside: an object that every reader sees alike, or a refusal; in each place that reads one."""

import struct
from collections.abc import Callable

import pytest

from engine.errors import EngineError
from engine.models.config import parse_config
from engine.strict_json import load_object
from engine.text.model import load_text_model
from engine.text.tokens import ControlTokenizer
from engine.weights.safetensors import read_header

BAD = {
    "deep": b"[" * 200_000,
    "deep-object": b'{"a":' * 200_000,
    "twice": b'{"a": 1, "a": 2}',
    "twice-inside": b'{"a": [{"b": 1, "b": 1}]}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "list": b"[]",
    "cut": b'{"a": ',
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
}


def in_tokenizer_settings(content: bytes) -> object:
    tokenizer = b'{"added_tokens": [], "model": {}}'
    return load_text_model({"tokenizer.json": tokenizer, "tokenizer_config.json": content}.get, 64)


def in_safetensors(content: bytes) -> object:
    file = struct.pack("<Q", len(content)) + content
    return read_header(file, len(file), "model.safetensors")


READERS: dict[str, Callable[[bytes], object]] = {
    "CODE": lambda content: load_object(content, "a.json", "CODE"),
    "CONFIG_INVALID": parse_config,
    "TOKENIZER_INVALID": ControlTokenizer,
    "WEIGHTS_INVALID": in_safetensors,
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("code", READERS)
def test_what_readers_could_disagree_about_is_refused_with_the_code_of_its_place(
    code: str, content: bytes
) -> None:
    with pytest.raises(EngineError) as refused:
        READERS[code](content)
    assert refused.value.code == code


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_the_settings_of_a_tokenizer_are_read_as_strictly(content: bytes) -> None:
    with pytest.raises(EngineError, match=r"tokenizer_config\.json"):
        in_tokenizer_settings(content)


def test_an_object_is_read() -> None:
    assert load_object('{"a": [1, {"b": "é"}], "c": null}'.encode(), "a.json", "CODE") == {
        "a": [1, {"b": "é"}],
        "c": None,
    }
