"""Content: a signature vouches for bytes, not for what a parser makes of them."""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from bundles.content import forbidden, safetensors
from bundles.content.files import FolderFiles
from bundles.content.inspector import Inspector, Verdict
from bundles.content.judge import check_listing, judge
from bundles.format.errors import BundleError
from bundles.format.manifest import Kind
from bundles.verify import verify
from tests.bundles.hostile import make_model as make_sound_model
from tests.bundles.making import CHUNK, INSPECTOR, Trust, forge_manifest, make_model, with_header
from tests.bundles.making import safetensors as weights

_8 = bytes(8)


def _tensors_of(path: Path, raw: bytes) -> tuple[safetensors.Tensor, ...]:
    path.write_bytes(raw)
    with path.open("rb") as stream:
        return safetensors.read_tensors(
            lambda offset, length: os.pread(stream.fileno(), length, offset), len(raw), "model.safetensors"
        )


def test_a_sound_file_gives_its_tensors_in_the_order_of_their_data(tmp_path: Path) -> None:
    raw = weights({"b": ("F32", [1], [4, 8]), "a": ("U8", [2, 2], [0, 4]), "e": ("F16", [0], [8, 8])}, _8)
    assert [(t.name, t.begin) for t in _tensors_of(tmp_path / "w", raw)] == [("a", 0), ("b", 4), ("e", 8)]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "SAFETENSORS_HEADER"),
        (b"1234567", "SAFETENSORS_HEADER"),
        (struct.pack("<Q", 16 * 2**20 + 8) + b"{}".ljust(16 * 2**20 + 8), "SAFETENSORS_HEADER"),
        (with_header(b" {}", b""), "SAFETENSORS_HEADER"),
        (with_header(b"[]", b""), "SAFETENSORS_HEADER"),
        (with_header(b'{"a": [' + b"[]," * 600_000 + b"[]]}", b""), "CONTENT_TOO_LARGE"),
        (struct.pack("<Q", 3) + b"{}", "SAFETENSORS_HEADER"),
        (with_header(b'{"__metadata__": {"a": 1}}', b""), "SAFETENSORS_HEADER"),
        (with_header(b'{"a": 1}', b""), "SAFETENSORS_TENSOR"),
        (weights({"a": ("F7", [8], [0, 8])}, _8), "SAFETENSORS_TENSOR"),
        (weights({"a": ("U8", [-8], [0, 8])}, _8), "SAFETENSORS_TENSOR"),
        (weights({"a": ("U8", [8], [8, 0])}, _8), "SAFETENSORS_TENSOR"),
        (weights({"a": ("U8", [9], [0, 9])}, _8), "SAFETENSORS_SIZE"),
        (weights({"a": ("U8", [2**53] * 200_000, [0, 8])}, _8), "SAFETENSORS_SIZE"),  # a product of a megabyte
        (weights({"a": ("U8", [2**53, 2**53, 0], [0, 8])}, _8), "SAFETENSORS_SIZE"),
        (
            with_header(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [false, true]}}', b"1"),
            "SAFETENSORS_TENSOR",
        ),
        (weights({"a": ("U8", [4], [0, 4])}, _8), "SAFETENSORS_HOLE"),
    ],
)
def test_weights_that_lie_about_themselves_are_refused(tmp_path: Path, raw: bytes, code: str) -> None:
    with pytest.raises(BundleError) as error:
        _tensors_of(tmp_path / "w", raw)
    assert error.value.code == code


def test_an_index_that_names_an_absent_or_wrong_shard_or_leaves_a_tensor_out_is_refused() -> None:
    shards = {"x/1.safetensors": frozenset({"a"}), "x/2.safetensors": frozenset({"b", "c"})}
    path = "x/model.safetensors.index.json"
    whole = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    safetensors.check_index(whole, shards, path)
    for weight_map in ({"a": "3.safetensors"}, {"a": "2.safetensors"}, {"a": "../x/1.safetensors"}):
        with pytest.raises(BundleError, match="INDEX_SHARD_ABSENT"):
            safetensors.check_index(whole | weight_map, shards, path)
    with pytest.raises(BundleError, match="INDEX_INCOMPLETE"):
        safetensors.check_index({"a": "1.safetensors", "b": "2.safetensors"}, shards, path)
    for raw in (b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"[]"):
        with pytest.raises(BundleError, match="INDEX_SCHEMA"):
            safetensors.read_index(raw, path)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("a/optimizer.PT", "CONTENT_PICKLE"),
        ("lib.so.1.2", "CONTENT_CODE"),
        ("run.SH", "CONTENT_CODE"),
        ("license.bat", "CONTENT_CODE"),
        ("archive.tar", "CONTENT_ARCHIVE"),
        ("weights.zip", "CONTENT_ARCHIVE"),
        ("events.tfevents", "CONTENT_TYPE"),
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
        (b"GGUF\x03\x00", "CONTENT_GGUF"),
        (b"\x1f\x8b\x08\x00", "CONTENT_ARCHIVE"),
        (b"7z\xbc\xaf\x27\x1c", "CONTENT_ARCHIVE"),
        (b"\x00asm\x01", "CONTENT_CODE"),
        (b"weights".ljust(257, b"\0") + b"ustar\x0000", "CONTENT_ARCHIVE"),
        (struct.pack("<Q", 640) + b"{".ljust(249) + b"ustar 00", "CONTENT_ARCHIVE"),
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
        ("tokenizer_config.json", b'{"a": [{"auto_map": null}]}', "CONTENT_REMOTE_CODE"),
        ("adapter_config.json", b'{"auto_mapping": {"parent_library": "evil"}}', "CONTENT_REMOTE_CODE"),
        ("notes.txt", b"cos\nsystem\n(S'id'\ntR.", "CONTENT_PICKLE"),
        ("notes.txt", b"\x80\x04N.", "CONTENT_PICKLE"),
        ("tokenizer.model", b"cos\nsystem\n(S'id'\ntR.", "CONTENT_TYPE"),
        ("tokenizer.model", b"\x0a\x05abc", "CONTENT_TYPE"),
        ("tokenizer.model", b"\x0a\x03abc\x3a\x01x", "CONTENT_TYPE"),
        ("tokenizer.model", b"", "CONTENT_TYPE"),
        ("x.txt", b"a" * 70_000 + b"PK\x05\x06" + b"b" * 30, "CONTENT_ARCHIVE"),
        ("config.json", b'{"a": [' + b"[]," * 600_000 + b"[]]}", "CONTENT_TOO_LARGE"),
        ("config.json", b'{"a": "' + b"x" * 2**24 + b'"}', "CONTENT_TOO_LARGE"),
        ("chat_template.jinja", b"\xe2\x82", "CONTENT_TEXT"),
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


def test_a_file_that_is_too_large_for_its_kind_is_refused_before_it_is_read(bundle: Path, trust: Trust) -> None:
    limits = {
        "config.json": 16,
        "a/tokenizer.json": 64,
        "x.model": 64,
        "w.safetensors.index.json": 32,
        "x.md": 256,
    }
    for path, mebibytes in limits.items():
        check_listing({path: mebibytes * 2**20, "w.safetensors": 2**50})
        with pytest.raises(BundleError, match="CONTENT_TOO_LARGE"):
            check_listing({path: mebibytes * 2**20 + 1})

    def grow(fields: dict[str, Any]) -> None:
        file = next(file for file in fields["files"] if file["path"] == "config.json")
        fields["total_size"] += 2**24 + 1 - file["size"]
        file.update(size=2**24 + 1, chunks=["0" * 64] * (2**24 // CHUNK + 1))

    forge_manifest(bundle, trust, grow)
    with pytest.raises(BundleError, match="CONTENT_TOO_LARGE"):
        verify(bundle, trust.root, inspector=INSPECTOR)


def test_a_template_is_judged_however_its_name_is_written(tmp_path: Path) -> None:
    model = make_sound_model(tmp_path / "m")
    _judge(model, Inspector())
    (model / "other.JINJA").write_text("{{ messages.__class__ }}")
    with pytest.raises(BundleError, match="TEMPLATE_REFUSED"):
        _judge(model, Inspector())


def _judge(model: Path, inspector: Inspector, kind: Kind = "model") -> object:
    files = folder_files(model)
    try:
        return judge(files, inspector, kind)
    finally:
        files.close()


def folder_files(model: Path) -> FolderFiles:
    paths = [path.relative_to(model).as_posix() for path in sorted(model.rglob("*")) if path.is_file()]
    sizes = {path: (model / path).stat().st_size for path in paths}
    return FolderFiles(os.open(model, os.O_RDONLY), {path: path for path in paths}, sizes)


def _archive(comment: bytes = b"") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("__main__.py", "print('run')")
        archive.comment = comment
    return packed.getvalue()


def test_weights_that_are_an_archive_as_well_are_refused_and_stray_signatures_are_not(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    (model / "canaries.json").unlink()

    def put(tail: bytes, size: int = 100_000) -> Path:
        data = tail.rjust(size, b"\x01")
        path = model / "model.safetensors"
        path.write_bytes(weights({"w": ("U8", [len(data)], [0, len(data)])}, data))
        return path

    for tail in (_archive(), _archive(b"c" * 60_000), _archive() + bytes(1000)):
        assert zipfile.is_zipfile(put(tail))
        with pytest.raises(BundleError, match="CONTENT_ARCHIVE"):
            _judge(model, INSPECTOR)
    put(b"PK\x05\x06" + bytes(18))  # an empty archive
    with pytest.raises(BundleError, match="CONTENT_ARCHIVE"):
        _judge(model, INSPECTOR)
    put(b"PK\x06\x07" + bytes(16) + b"PK\x05\x06" + b"\xff" * 18)  # a large one
    with pytest.raises(BundleError, match="CONTENT_ARCHIVE"):
        _judge(model, INSPECTOR)
    for stray in (b"PK\x05\x06", b"PK\x05\x06" + b"\x01" * 40, b"PK\x05\x06" + bytes(30)):
        put(stray)
        _judge(model, INSPECTOR)


def test_many_archive_ends_among_weights_are_refused_before_one_is_looked_behind() -> None:
    """Whoever keeps little reads a chunk again for each: a bundle must not make that hours."""
    size, reads = 200_000, 0
    end = b"PK\x05\x06" + struct.pack("<4xHHIIH", 1, 1, 100_000, 50_000, 0)

    def read(offset: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        return content[offset : offset + length]

    for count, refused in ((8, False), (9, True), (2000, True)):
        content, reads = (count * end).rjust(size, b"\x01"), 0
        with pytest.raises(BundleError, match="CONTENT_ARCHIVE") if refused else nullcontext():
            forbidden.check_end("w.safetensors", size, read)
        assert reads <= (1 if refused else 1 + 3 * count)


def test_both_kinds_of_model_files_of_tokenizers_are_accepted(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    (model / "canaries.json").unlink()
    for content in (b"aGk= 0\ndGhl 1\n", b"\x0a\x03abc\x12\x00\x0a\x80\x01" + bytes(128)):
        (model / "tokenizer.model").write_bytes(content)
        _judge(model, INSPECTOR)


def test_a_hundred_thousand_files_are_judged_without_a_descriptor_each(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    (model / "canaries.json").unlink()
    for i in range(1200):  # more than a process may have open, by the usual limit of 1024
        (model / f"{i}.txt").write_text(str(i))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 200, hard))
    try:
        _judge(model, INSPECTOR)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_adapter_is_judged_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8, "auto_mapping": null}')
    (folder / "adapter_model.safetensors").write_bytes(weights({"a": ("F32", [1], [0, 4])}, bytes(4)))
    assert isinstance(verdict := _judge(folder, INSPECTOR, "adapter"), Verdict)
    assert (verdict.architecture, verdict.facts) == ("LoRA", {"rank": "8"})
    with pytest.raises(BundleError) as error:
        _judge(folder, Inspector(), "adapter")
    assert error.value.code == "ADAPTER_UNSUPPORTED"  # of the real inspector, which found no peft_type


def test_the_inspector_gets_no_descriptor_of_the_folder(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    program = (
        "import os, json; links = ['/proc/self/fd/' + name for name in os.listdir('/proc/self/fd')];"
        "print(json.dumps([os.readlink(link) for link in links if os.path.lexists(link)]))"
    )
    seen: list[bytes] = []

    class Watching(Inspector):
        def _ask(self, process: "subprocess.Popen[bytes]", question: bytes) -> tuple[int, bytes]:
            seen.append(process.communicate(question)[0])
            return 0, b"{}"

    with pytest.raises(BundleError, match="INSPECT_FAILED"):
        _judge(model, Watching((sys.executable, "-c", program)))
    targets = json.loads(seen[0])
    assert [target for target in targets if "memfd:" in target] == ["/memfd:model-files (deleted)"]
    assert not [target for target in targets if target.startswith(str(tmp_path))]


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


def test_no_more_of_an_inspector_s_answer_is_taken_than_an_answer_has(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for endless in (("/usr/bin/yes",), (sys.executable, "-c", "while True: print('x' * 1_000_000)")):
        with pytest.raises(BundleError, match="INSPECT_FAILED"):
            _judge(model, Inspector(endless, timeout=60))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 64 * 1024


def test_the_real_inspector_understands_the_question(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    (model / "config.json").write_text(
        json.dumps({"architectures": ["MysteryForCausalLM"], "model_type": "mystery"})
    )
    with pytest.raises(BundleError) as error:
        _judge(model, Inspector())
    assert error.value.code not in ("INSPECT_FAILED", "INSPECT_TIMEOUT", "INVALID_QUESTION")
