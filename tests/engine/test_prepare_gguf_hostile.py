"""GGUF files that lie: each is refused with a code, without more memory than the file could be about."""

import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Q
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.prepare.converting import convert_gguf
from engine.prepare.gguf import MAX_ELEMENTS, MAX_STRING_BYTES, read_container
from tests.engine.gguf_files import write_llama

U32, STRING, ARRAY = 4, 8, 9
Info = tuple[str, Sequence[int], int, int]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, dims: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def write(
    path: Path,
    infos: Sequence[Info] = (("a", (4,), 0, 0),),
    pairs: Sequence[bytes] = (),
    data: int = 32,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
) -> Path:
    """A container by hand, with F32 [4] in it unless told otherwise."""
    tensors, metadata = counts or (len(infos), len(pairs))
    head = magic + struct.pack("<IQQ", version, tensors, metadata)
    head += b"".join(pairs) + b"".join(info(*given) for given in infos)
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(data))
    return path


def code(path: Path) -> str:
    with pytest.raises(EngineError) as refused:
        read_container(path)
    return refused.value.code


def test_the_file_that_the_others_are_made_from_is_sound(tmp_path: Path) -> None:
    found = read_container(write(tmp_path / "x", (("a", (4,), 0, 0), ("b", (2, 4), 0, 32)), data=64))
    assert found.tensors["b"].shape == (4, 2)
    assert found.tensors["b"].offset == found.tensors["a"].offset + 32


@pytest.mark.parametrize("kind", [Q.F32, Q.Q8_0, Q.Q4_0])
def test_a_matrix_that_is_a_stack_is_refused_in_every_type(kind: Q, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "x.gguf", kind, {"self_attn.o_proj": (1, 64, 64)})
    (tmp_path / "out").mkdir()
    with pytest.raises(EngineError, match=r"attn_output.* has 3 dimensions") as refused:
        convert_gguf(source, tmp_path / "out", lambda stage, done, total: None)
    assert refused.value.code == "GGUF_INVALID"


@pytest.mark.parametrize(
    ("infos", "data"),
    [
        ([("a", (), 0, 0)], 32),
        ([("a", (1, 1, 1, 1, 4), 0, 0)], 32),
        ([("a", (4, 0), 0, 0)], 32),
        ([("a", (2**63, 2), 0, 0)], 32),
        ([("a", (2**32, 2**32, 4), 0, 0)], 32),
        ([("a", (4,), 0, 2**64 - 32)], 32),
        ([("a", (4,), 0, 32)], 64),
        ([("a", (4,), 0, 4)], 32),
        ([("a", (64,), 0, 0)], 32),
        ([("a", (4,), 0, 0)], 96),
        ([("a", (4,), 0, 0), ("b", (4,), 0, 0)], 32),
        ([("a", (4,), 0, 0), ("b", (4,), 0, 16)], 64),
        ([("a", (4,), 0, 0), ("b", (4,), 0, 64)], 96),
        ([("a", (4,), 0, 0), ("a", (4,), 0, 32)], 64),
        ([("a", (31,), 8, 0)], 64),
        ([("a", (32, 2), 12, 0)], 64),
        ([], 32),
    ],
)
def test_tensors_that_overlap_leave_holes_overflow_or_pass_the_end_are_refused(
    infos: Sequence[Info], data: int, tmp_path: Path
) -> None:
    assert code(write(tmp_path / "x", infos, data=data)) == "GGUF_INVALID"


@pytest.mark.parametrize(
    "pairs",
    [
        [pair("k", STRING, struct.pack("<Q", 2**63))],
        [pair("k", STRING, struct.pack("<Q", MAX_STRING_BYTES + 1))],
        [pair("k", STRING, struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe")],
        [pair("k", ARRAY, struct.pack("<IQ", U32, MAX_ELEMENTS + 1))],
        [pair("k", ARRAY, struct.pack("<IQ", STRING, 2**40))],
        [pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", U32, 0))],
        [pair("k", 13, b"")],
        [pair("k", 7, b"\2")],
        [pair("k", U32, b"\1\0\0\0"), pair("k", U32, b"\2\0\0\0")],
        [pair("k" * 5000, U32, b"\1\0\0\0")],
        [pair("general.alignment", U32, struct.pack("<I", 0))],
        [pair("general.alignment", U32, struct.pack("<I", 12))],
        [pair("general.alignment", U32, struct.pack("<I", 2**31))],
    ],
)
def test_metadata_with_false_lengths_kinds_or_repeated_keys_is_refused(
    pairs: Sequence[bytes], tmp_path: Path
) -> None:
    assert code(write(tmp_path / "x", pairs=pairs)) == "GGUF_INVALID"


def test_counts_beyond_reason_other_versions_and_other_files_are_refused(tmp_path: Path) -> None:
    assert code(write(tmp_path / "x", counts=(2**62, 0))) == "GGUF_INVALID"
    assert code(write(tmp_path / "x", counts=(1, 2**62))) == "GGUF_INVALID"
    assert code(write(tmp_path / "x", counts=(1, 1000))) == "GGUF_INVALID"
    assert code(write(tmp_path / "x", version=2)) == "GGUF_UNSUPPORTED"
    assert code(write(tmp_path / "x", magic=b"GGML")) == "GGUF_INVALID"
    assert code(write(tmp_path / "x", [("a", (4,), 99, 0)])) == "GGUF_UNSUPPORTED"
    (tmp_path / "x").write_bytes(b"GGUF")
    assert code(tmp_path / "x") == "GGUF_INVALID"


def test_a_false_length_is_refused_before_memory_for_it_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "x", pairs=[pair("k", ARRAY, struct.pack("<IQ", 12, MAX_ELEMENTS))])
    tracemalloc.start()
    assert code(path) == "GGUF_INVALID"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_llama(tmp_path_factory.mktemp("gguf") / "x.gguf").read_bytes()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_sound_file_with_some_bytes_changed_is_converted_or_refused_with_a_code_and_never_fails_otherwise(
    data: st.DataObject, sound: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    content = bytearray(sound)
    header = sound.index(b"output_norm.weight")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header + 200))
        change = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(change)] = change
    cut = data.draw(st.integers(0, 3))
    (folder / "x.gguf").write_bytes(content[: len(content) // (1 + cut)])
    (folder / "out").mkdir()
    assert outcome(folder) in ("converted", "GGUF_INVALID", "GGUF_UNSUPPORTED", "GGUF_TOKENIZER")


def outcome(folder: Path) -> str:
    try:
        convert_gguf(folder / "x.gguf", folder / "out", lambda stage, done, total: None)
    except EngineError as error:
        return error.code
    return "converted"
