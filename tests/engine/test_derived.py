"""Derived files: what a backend prepared comes back bit for bit, and what is not that file never does."""

import dataclasses
import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from engine.build import build_engine, make_backend
from engine.derived import building, files, layout
from engine.derived.files import read_derived
from engine.derived.layout import layout_name, pays, sources
from engine.derived.loading import build_model, derive, load_model
from engine.derived.location import UNFINISHED, Derived, Location
from engine.derived.objects import decode, encode
from engine.errors import EngineError
from engine.memory_plan import Model, plan_memory, read_model
from engine.options import EngineOptions
from kernels.cpu import CpuBackend
from kernels.native.location import find_library
from tests.engine.families import FAMILIES, Tiny, draw_tokens, make
from tests.engine.quantised import FORMATS
from tests.engine.test_formats_served import SIZES, Pair
from tests.engine.tiny import file_set, request, run
from tests.engine.vector_models import save as save_encoder

LAYOUT = "cpu-bfloat16-0123456789abcdef"
OPTIONS: dict[str, Any] = {"kv_blocks": 16, "block_size": 8, "threads": 1, "dtype": "bfloat16"}
BACKENDS: list[Any] = [
    CpuBackend(torch.float32),
    CpuBackend(torch.bfloat16),
    make_backend(EngineOptions(backend="cpu", dtype="bfloat16")),
]


def same(found: Any, wanted: Any, where: str = "model") -> None:
    """Both have the same structure, and their tensors the same bits and strides."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, Tensor):
        assert (found.dtype, found.shape, found.stride()) == (wanted.dtype, wanted.shape, wanted.stride()), where
        first, second = (tensor.flatten().view(torch.uint8) for tensor in (found, wanted))
        assert torch.equal(first, second), where
    elif dataclasses.is_dataclass(wanted):
        for field in dataclasses.fields(wanted):
            same(getattr(found, field.name), getattr(wanted, field.name), f"{where}.{field.name}")
    elif isinstance(wanted, (tuple, list)):
        assert len(found) == len(wanted), where
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            same(one, other, f"{where}[{i}]")
    else:
        assert found == wanted, where


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


class Case(NamedTuple):
    """A model's folder, and how it is built."""

    folder: Path
    known: Model

    def build(self, weights: Any, ops: Any) -> Any:
        return build_model(self.known, weights, ops, max_positions=32, context=32)

    def derive(self, ops: Any, out: Path, model_digest: str = "0" * 64) -> Location:
        out.mkdir(exist_ok=True)
        model_files, open_file = file_set(self.folder)
        of_model = dataclasses.replace(model_files, model_digest=model_digest)
        return Location(out, derive(self.known, of_model, open_file, self.build, ops, out, LAYOUT))

    def load(self, ops: Any, location: Location | None = None) -> tuple[Any, list[str]]:
        """The model, and why the derived file was refused, if it was."""
        refused: list[str] = []
        model = load_model(
            self.known, *file_set(self.folder), self.build, ops, location, lambda e: refused.append(e.code)
        )
        return model, refused


def case(folder: Path) -> Case:
    return Case(folder, read_model(*file_set(folder)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make(tmp_path_factory.mktemp("llama"), "llama", SIZES)


@pytest.fixture(scope="module")
def int4(llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("int4")
    return case(Pair(llama.config, llama.tensors, *FORMATS["int4 g32 (ours)"]).save(folder))


@pytest.fixture
def made(int4: Case, tmp_path: Path) -> Location:
    return int4.derive(BACKENDS[1], tmp_path / "derived")


def check(model: Case, backends: Sequence[Any], folder: Path) -> None:
    folder.mkdir()
    for number, ops in enumerate(backends):
        wanted, _ = model.load(ops)
        out = folder / str(number)
        if any(tensor.layout != torch.strided for tensor in tensors_in(wanted)):
            with pytest.raises(EngineError) as error:
                model.derive(ops, out)
            assert error.value.code == "DERIVED_UNSUPPORTED"
            assert list(out.iterdir()) == []
            continue
        location = model.derive(ops, out)
        assert sorted(path.name for path in out.iterdir()) == [location.derived.name]
        found, refused = model.load(ops, location)
        assert refused == []
        same(found, wanted)
        assert len({t.data_ptr() for t in tensors_in(found)}) == len({t.data_ptr() for t in tensors_in(wanted)})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_comes_back_bit_for_bit(model_type: str, tmp_path: Path) -> None:
    make(tmp_path / "model", model_type, {})
    check(case(tmp_path / "model"), BACKENDS[:2], tmp_path / "derived")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_comes_back_bit_for_bit(llama: Tiny, name: str, tmp_path: Path) -> None:
    folder = Pair(llama.config, llama.tensors, *FORMATS[name]).save(tmp_path / "model")
    check(case(folder), BACKENDS, tmp_path / "derived")


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_encoders_come_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    save_encoder(tmp_path / "model", family)
    check(case(tmp_path / "model"), BACKENDS[:1], tmp_path / "derived")


@pytest.mark.parametrize("backend", ["torch", *(["native"] if find_library() else [])])
def test_answers_are_the_same_and_the_models_own_weights_are_not_read(
    int4: Case, backend: str, tmp_path: Path
) -> None:
    options = EngineOptions(**OPTIONS, backend=backend)
    made = int4.derive(make_backend(options), tmp_path)
    model_files, open_file = file_set(int4.folder)
    opened: list[str] = []

    def watched(sha256: str) -> int:
        opened.append(sha256)
        descriptor = open_file(sha256)
        if any(file.sha256 == sha256 for file in model_files.matching(".safetensors")):
            header = os.pread(descriptor, 8, 0)
            length = 8 + struct.unpack("<Q", header)[0]
            content = os.pread(descriptor, length, 0)
            os.close(descriptor)
            descriptor = os.memfd_create("header alone")
            os.write(descriptor, content)
        return descriptor

    refused: list[EngineError] = []
    loops = (
        build_engine(model_files, open_file, options),
        build_engine(model_files, watched, options, made, refused.append),
    )
    for loop in loops:
        loop.submit(request(0, draw_tokens(8, count=11), max_tokens=12, ignore_eos=True, logprobs=3))
    first, second = (run(loop)[0] for loop in loops)
    assert refused == []
    assert opened
    assert (first.token_ids, first.logprobs) == (second.token_ids, second.logprobs)


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda path: _flip(path, 0), "DERIVED_CHANGED"),
        (lambda path: _flip(path, -1), "DERIVED_CHANGED"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "DERIVED_CHANGED"),
        (lambda path: os.truncate(path, 0), "DERIVED_CHANGED"),
        (lambda path: os.truncate(path, path.stat().st_size + 1), "DERIVED_CHANGED"),
        (lambda path: path.unlink(), "DERIVED_MISSING"),
        (lambda path: (path.rename(f"{path}.x"), path.symlink_to(f"{path}.x")), "DERIVED_MISSING"),
        (lambda path: (path.unlink(), path.mkdir()), "DERIVED_CHANGED"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "DERIVED_CHANGED"),
    ],
    ids=["first bit", "last bit", "short", "empty", "long", "gone", "link", "folder", "pipe"],
)
def test_a_damaged_file_is_refused_by_name_and_the_model_comes_out_of_the_store(
    int4: Case, made: Location, damage: Any, code: str
) -> None:
    made.path.chmod(0o600)
    damage(made.path)
    found, refused = int4.load(BACKENDS[1], made)
    assert refused == [code]
    same(found, int4.load(BACKENDS[1])[0])


def test_a_file_that_changes_after_it_was_read_changes_nothing(int4: Case, made: Location) -> None:
    found, refused = int4.load(BACKENDS[1], made)
    made.path.chmod(0o600)
    made.path.write_bytes(bytes(made.derived.size))
    assert refused == []
    same(found, int4.load(BACKENDS[1])[0])


def test_another_models_file_in_its_place_is_refused(int4: Case, made: Location, tmp_path: Path) -> None:
    make(tmp_path / "plain", "llama", SIZES)
    other = case(tmp_path / "plain").derive(BACKENDS[1], tmp_path / "other", "cd" * 32)
    swapped = Location(other.folder, made.derived)
    other.path.rename(swapped.path)
    assert int4.load(BACKENDS[1], swapped)[1] == ["DERIVED_CHANGED"]
    on_record = dataclasses.replace(made.derived, sha256=other.derived.sha256, size=other.derived.size)
    found, refused = int4.load(BACKENDS[1], Location(other.folder, on_record))
    assert refused == ["DERIVED_MISMATCH"]  # on record by mistake: it says what it was made of
    same(found, int4.load(BACKENDS[1])[0])


def test_a_file_of_another_layout_is_refused(int4: Case, made: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    assert int4.load(BACKENDS[0], made)[1] == ["DERIVED_MISMATCH"]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")
    found, refused = int4.load(CpuBackend(torch.bfloat16), made)
    assert refused == ["DERIVED_MISMATCH"]
    same(found, int4.load(BACKENDS[1])[0])


def test_a_file_that_other_sources_made_is_refused(
    int4: Case, made: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "sources", lambda: "of tomorrow")
    found, refused = int4.load(BACKENDS[1], made)
    assert refused == ["DERIVED_MISMATCH"]
    same(found, int4.load(BACKENDS[1])[0])


@pytest.mark.parametrize(
    "spoil", ["no about", "no made_for", "no value", "field", "tensor", "dtype", "range", "text"]
)
def test_a_file_on_record_that_is_not_as_this_program_makes_them_is_refused_and_not_the_workers_end(
    int4: Case, made: Location, tmp_path: Path, spoil: str
) -> None:
    content = made.path.read_bytes()
    end = len(content) - 8
    begin = end - int.from_bytes(content[end:], "little")
    described = json.loads(content[begin:end])
    record = described["about"]["records"][0]
    match spoil:
        case "no about":
            del described["about"]
        case "no made_for":
            del described["about"]["made_for"]
        case "no value":
            del record["value"]
        case "field":
            record["value"] = {"type": "kernels.packed:Packed", "fields": []}
        case "tensor":
            record["value"] = {"tensor": 1 << 40}
        case "dtype":
            described["tensors"][0]["dtype"] = "float7"
        case "range":
            described["tensors"][0]["begin"] = len(content)
    text = b"{" if spoil == "text" else json.dumps(described).encode()
    content = content[:begin] + text + len(text).to_bytes(8, "little")
    derived = dataclasses.replace(made.derived, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    (tmp_path / derived.name).write_bytes(content)
    found, refused = int4.load(BACKENDS[1], Location(tmp_path, derived))
    assert refused == ["DERIVED_MISMATCH"]
    same(found, int4.load(BACKENDS[1])[0])


@pytest.mark.parametrize("keep", [0, 1, -1])
def test_a_file_with_parts_missing_or_in_another_order_is_refused(int4: Case, made: Location, keep: int) -> None:
    content = read_derived(made)
    records = list(content.about["records"])
    records = {0: [], 1: [records[1], records[0], *records[2:]], -1: [*records, records[-1]]}[keep]
    weights = building.AbsentWeights(int4.known.shapes)
    other = content._replace(about={**content.about, "records": records})

    def replay() -> None:
        replaying = building.ReplayingOps(BACKENDS[1], weights, other, made.derived.model_digest)
        int4.build(weights, replaying)
        replaying.finish()

    with pytest.raises(EngineError) as error:
        replay()
    assert error.value.code == "DERIVED_MISMATCH"


def test_a_full_disk_leaves_nothing(int4: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, left = os.write, [20_000]

    def full(descriptor: int, content: Any) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= (done := write(descriptor, content[: left[0]]))
        return done

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        int4.derive(BACKENDS[1], tmp_path / "derived")
    assert list((tmp_path / "derived").iterdir()) == []


def test_what_a_killed_writer_left_is_no_file_and_the_next_one_replaces_it(int4: Case, tmp_path: Path) -> None:
    out = tmp_path / "derived"
    out.mkdir()
    name = Derived("ab" * 32, LAYOUT, "", 0).name
    child = os.fork()
    if child == 0:
        with files.writing(out / name) as writer:
            writer.put(torch.ones(1000))
            os._exit(9)
    os.waitpid(child, 0)
    assert [path.name for path in out.iterdir()] == [name + UNFINISHED]
    with files.writing(out / name) as writer:
        number = writer.put(torch.arange(5))
        sha256, size = writer.finish({})
    assert [path.name for path in out.iterdir()] == [name]
    read = read_derived(Location(out, Derived("ab" * 32, LAYOUT, sha256, size)))
    assert read.tensors[number].tolist() == [0, 1, 2, 3, 4]


def test_tensors_of_every_kind_come_back_with_their_strides(tmp_path: Path) -> None:
    given = [
        torch.arange(24).view(2, 3, 4).permute(2, 0, 1),
        torch.randn(5, 7).T,
        torch.randn(3).bfloat16(),
        torch.randn(4, 4).to(torch.float8_e4m3fn),
        torch.tensor(2.5),
        torch.empty(0, 3),
        torch.tensor([True, False]),
    ]
    with files.writing(tmp_path / "x") as writer:
        tree = encode([*given, given[0], None, 1.5, "a", (1, [True])], writer.put)
        sha256, size = writer.finish({"tree": tree})
    (tmp_path / "x").rename(tmp_path / f"{'ab' * 32}.{LAYOUT}")
    content = read_derived(Location(tmp_path, Derived("ab" * 32, LAYOUT, sha256, size)))
    same(decode(content.about["tree"], content.tensors), [*given, given[0], None, 1.5, "a", (1, [True])])
    assert all(t.data_ptr() % 64 == 0 for t in content.tensors if t.numel())
    for unsupported in (torch.arange(10)[::2], torch.ones(1).expand(4), torch.ones(1, device="meta"), {1: 2}):
        with pytest.raises(EngineError) as error:
            encode(unsupported, writer.put)
        assert error.value.code == "DERIVED_UNSUPPORTED"


@pytest.mark.parametrize("name", ["os:_Environ", "kernels.nothing:X", "kernels.cpu:CpuBackend", "kernels.cpu:os"])
def test_only_our_own_named_tuples_are_made(name: str) -> None:
    with pytest.raises(EngineError) as error:
        decode({"type": name, "fields": []}, [])
    assert error.value.code == "DERIVED_MISMATCH"


def test_a_layouts_name_follows_from_options_libraries_processor_and_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Example\ncpu MHz\t: 1000\nflags\t: a b\n\nmodel name\t: Example\n")
    name = partial(layout_name, cpuinfo=cpuinfo)
    bf16 = EngineOptions(backend="cpu", dtype="bfloat16")
    names = [name(bf16), name(EngineOptions(backend="cpu", dtype="float32"))]
    cpuinfo.write_text(cpuinfo.read_text().replace("1000", "2000"))
    assert name(bf16) == names[0]
    cpuinfo.write_text(cpuinfo.read_text().replace("a b", "a b c"))
    names.append(name(bf16))
    monkeypatch.setenv("CLOISTER_KERNELS_ISA", "avx2")
    names.append(name(bf16))
    monkeypatch.setattr(layout.metadata, "version", lambda _: "2.99")
    names.append(name(bf16))
    library = tmp_path / "libcloister_kernels.so"
    library.write_bytes(b"kernels")
    monkeypatch.setattr(layout, "find_library", lambda: library)
    names.append(name(bf16))
    assert len(set(names)) == len(names)
    assert all(Derived("ab" * 32, one, "cd" * 32, 1).is_sound for one in names)


def test_what_was_packed_by_other_python_sources_has_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16 = EngineOptions(backend="cpu", dtype="bfloat16")
    before = layout_name(bf16)
    (tmp_path / "kernels" / "native").mkdir(parents=True)
    source = tmp_path / "kernels" / "native" / "weights.py"
    digests = set()
    for text in ("a = 1", "a = 2"):
        source.write_text(text)
        digests.add(sources(tmp_path))
    assert len(digests) == 2
    assert sources(tmp_path) == sources(tmp_path)
    assert sources() not in digests
    monkeypatch.setattr(layout, "sources", lambda: "other")
    assert layout_name(bf16) != before


def test_names_that_lead_elsewhere_are_unsound() -> None:
    sound = Derived("ab" * 32, LAYOUT, "cd" * 32, 1)
    assert sound.is_sound
    for change in ({"model_digest": "../x"}, {"layout": f"{LAYOUT}/.."}, {"sha256": ""}, {"size": 0}):
        assert not dataclasses.replace(sound, **change).is_sound  # type: ignore[arg-type]  # each is of its field's type


def test_quantised_models_are_worth_a_file_and_plain_ones_are_not(int4: Case, tmp_path: Path) -> None:
    make(tmp_path, "llama", SIZES)
    plain = case(tmp_path).known
    options = plan_memory(plain, EngineOptions(**OPTIONS), 1 << 40).options
    assert pays(int4.known, options)
    assert not pays(int4.known, dataclasses.replace(options, backend="reference"))
    assert not pays(plain, options)


def test_the_memory_plan_covers_what_a_derived_file_takes(int4: Case, made: Location) -> None:
    plan = plan_memory(int4.known, EngineOptions(**OPTIONS), 1 << 40)
    about = len(json.dumps(dict(read_derived(made).about)))
    assert made.derived.size - about * 2 < plan.weights + plan.loading
