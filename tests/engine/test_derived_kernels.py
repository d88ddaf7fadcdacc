"""Kernels of a deployment on a CUDA device: listed and compiled by engine-prepare, found by a worker."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import make_backend
from engine.derived import kernels
from engine.derived.kernels import keep_kernels, open_kernels
from engine.derived.layout import kernels_layout_name
from engine.derived.loading import build_model
from engine.derived.location import Derived, Location
from engine.errors import EngineError
from engine.footprint import positions
from engine.memory_plan import read_model
from engine.options import EngineOptions
from engine.prepare.kernels import SizedWeights, deployment_starts
from engine.protos import engine_pb2
from kernels.packed import Layout
from kernels.steps import SCORED_AT_ONCE
from kernels.triton import cache as kernel_cache
from kernels.triton.cache import KernelCache, write_manifest
from kernels.triton.launch import noting, recording
from kernels.triton.offline import key
from tests.engine.test_worker import flip_bit
from tests.engine.tiny import engine, file_set, request, run, save_llama
from tests.engine.tiny_models import into_store
from tests.kernels.triton_machine import ROOT, build, environment, make_driver, needs_compiler

OPTIONS = EngineOptions(
    backend="triton",
    dtype="bfloat16",
    kv_dtype="bfloat16",
    kv_blocks=16,
    block_size=16,
    max_step_tokens=32,
    max_running=4,
    max_context_tokens=128,
    threads=2,
    device="GPU-0",
)
H200 = ("NVIDIA H200", "9.0")
LAYOUT = kernels_layout_name(OPTIONS, *H200)
MODEL = "ab" * 32


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[KernelCache]:
    """Caches that are opened here, which this process's Triton is not told of; none is installed."""
    found: list[KernelCache] = []
    monkeypatch.setattr(kernel_cache, "use", found.append)
    monkeypatch.setenv("CLOISTER_TRITON_CACHE", str(tmp_path / "installed"))
    return found


@pytest.fixture
def derived(tmp_path: Path) -> Location:
    """Of a cache with one kernel that is none."""
    folder = tmp_path / "cache"
    (folder / "kernels" / "KEY").mkdir(parents=True)
    (folder / "kernels" / "KEY" / "_add.json").write_text("{}")
    (folder / "kernels" / "KEY" / "_add.cubin").write_bytes(b"code")
    write_manifest(folder, [])
    return Location(tmp_path, keep_kernels(folder, tmp_path, MODEL, LAYOUT))


def test_a_worker_finds_the_kernels_of_its_derived_file(derived: Location, opened: list[KernelCache]) -> None:
    found = open_kernels(derived)
    assert opened == [found]
    assert found.kernel("KEY", "_add")["_add.cubin"].read_bytes() == b"code"
    assert derived.path.stat().st_mode & 0o777 == 0o400


@pytest.mark.usefixtures("opened")
def test_a_derived_file_that_was_changed_or_made_for_another_is_refused_by_name(derived: Location) -> None:
    refused: list[str] = []
    of_another = replace(derived.derived, model_digest="cd" * 32)
    derived.path.rename(derived.folder / of_another.name)
    for location in (derived, Location(derived.folder, of_another)):
        assert open_kernels(location, lambda error: refused.append(error.code)).kernel("KEY", "_add") == {}
    path = derived.folder / of_another.name
    path.chmod(0o600)
    flip_bit(path)
    open_kernels(Location(derived.folder, of_another), lambda error: refused.append(error.code))
    assert refused == ["DERIVED_MISSING", "DERIVED_MISMATCH", "DERIVED_CHANGED"]


@pytest.mark.usefixtures("opened")
def test_a_kernel_in_no_cache_is_an_error_once_all_were_started_and_not_before(derived: Location) -> None:
    found = open_kernels(derived)
    assert found.kernel("OTHER", "_mul") == {}
    found.seal()
    assert found.kernel("KEY", "_add")
    with pytest.raises(kernel_cache.KernelNotCompiled, match="KERNEL_NOT_COMPILED: kernel _mul is in no cache"):
        found.kernel("OTHER", "_mul")


@pytest.mark.usefixtures("opened")
def test_a_developer_may_have_it_compiled(derived: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.ALLOW_COMPILE, "1")
    found = open_kernels(derived)
    found.seal()
    assert (found.kernel("OTHER", "_mul"), found.misses) == ({}, ["_mul"])


@pytest.mark.usefixtures("opened")
def test_an_installed_cache_of_another_version_is_refused(tmp_path: Path, derived: Location) -> None:
    installed = tmp_path / "installed"
    installed.mkdir()
    write_manifest(installed, [])
    manifest = json.loads((installed / "manifest.json").read_text())
    manifest["made_for"]["triton"] = "2.0.0"
    (installed / "manifest.json").write_text(json.dumps(manifest))
    assert open_kernels(derived)  # which has all that it needs
    with pytest.raises(EngineError, match=r"CACHE_MISMATCH: .*2\.0\.0"):
        open_kernels(None)


@pytest.mark.usefixtures("opened")
def test_kernels_that_cannot_be_unpacked_are_said_to_be_so(
    derived: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EngineError, match=r"KERNELS_NOT_UNPACKED: .*: No space left on device"):
        open_kernels(derived)


def test_a_layout_is_of_one_kind_of_device_and_one_size_of_steps() -> None:
    names = {
        LAYOUT,
        kernels_layout_name(OPTIONS, "NVIDIA L4", "8.9"),
        kernels_layout_name(replace(OPTIONS, max_running=8), *H200),
        kernels_layout_name(replace(OPTIONS, deterministic=True), *H200),
    }
    assert len(names) == 4
    assert kernels_layout_name(replace(OPTIONS, device="GPU-1", threads=1), *H200) == LAYOUT
    assert Derived(MODEL, LAYOUT, "0" * 64, 1).is_sound


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="of kernels that the CPU interprets")
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"deterministic": True}, marks=pytest.mark.slow),
        pytest.param({"kv_dtype": "int8"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_steps_of_every_kind_start_no_kernel_that_is_not_on_the_list(options: Any, tmp_path: Path) -> None:
    save_llama(tmp_path, num_hidden_layers=1)
    limits = {"max_running": 3, "max_step_tokens": 16, "kv_blocks": 6, "max_context_tokens": 32}
    with noting() as started:
        loop = engine(tmp_path, backend="triton", dtype="bfloat16", **(limits | options))
        started.clear()
        for handle, asked in enumerate(KINDS):
            loop.submit(request(handle, [5 + handle] * (4 + 9 * handle), 3, ignore_eos=True, **asked))
        run(loop)
        loop.submit(request(9, [9] * 20, 2, scope="another tenant"))  # whose pages are scrubbed first
        run(loop)
    listed = {key(start) for start in deployment_starts(read_model(*file_set(tmp_path)), loop.options)}
    assert "_zero_fresh" in {start.kernel.fn.__name__ for start in started}
    assert {start.kernel.fn.__name__ for start in started if key(start) not in listed} == set()


class Eights:
    """A format of eight bits as far as its layout, which is all that a list of starts asks for."""

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return Layout(rows=1, columns=32, bits=8)


@pytest.mark.parametrize("running", [1, 3, 20])
def test_a_prompt_is_scored_with_no_other_kernel_however_few_requests_there_may_be(
    tmp_path: Path, running: int
) -> None:
    save_llama(tmp_path, num_hidden_layers=1)
    found: Any = read_model(*file_set(tmp_path))
    known = replace(found, formats={"lm_head.weight": Eights()})
    options = replace(OPTIONS, max_running=running, max_step_tokens=128)
    listed = {key(start) for start in deployment_starts(known, options)}
    ops: Any = make_backend(options, "meta")
    with recording() as started, torch.inference_mode():
        model = build_model(known, SizedWeights(known), ops, positions(options), options.max_context_tokens)
        started.clear()
        for tokens in (1, 2, 17, 33, SCORED_AT_ONCE):
            hidden = torch.empty(128, known.config.hidden_size, dtype=torch.bfloat16, device="meta")
            model.logits(ops, hidden, range(1, 1 + tokens))
    assert {start.kernel.fn.__name__ for start in started if key(start) not in listed} == set()
    assert len(started) > 5  # the rows that are picked, and their products


KINDS: list[dict[str, Any]] = [
    {"prompt_logprobs": 1},
    {"temperature": 0.8, "top_k": 20, "min_p": 0.1, "seed": 4},
    {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 5,
        "repetition_penalty": 1.3,
        "logprobs": 2,
        "min_tokens": 2,
        "token_ids": frozenset({7}),
        "logit_bias": ((3, 2.0),),
        "presence_penalty": 0.5,
    },
]


@pytest.fixture(scope="module")
def stored(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, engine_pb2.FileSet]:
    store = tmp_path_factory.mktemp("kernels") / "store"
    return store, into_store(tiny_llama, store)


def prepare(stored: tuple[Path, engine_pb2.FileSet], out: Path, **more: str) -> dict[str, Any]:
    """What engine-prepare answers on a machine where no C compiler is found."""
    store, files = stored
    question = {
        "do": "kernels",
        "model_digest": files.model_digest,
        "files": [(file.path, file.size, file.sha256) for file in files.files],
        "store": str(store),
        "out": str(out),
        "layout": LAYOUT,
        "threads": 2,
        "most_bytes": 1 << 30,
        "options": asdict(OPTIONS),
        "device": H200[0],
        "capability": H200[1],
    }
    return ask(("-m", "engine.prepare"), question, **more)


def ask(program: tuple[str, ...], question: Any, **more: str) -> dict[str, Any]:
    """The last line of an answer."""
    done = subprocess.run([sys.executable, *program], input=json.dumps(question), text=True, cwd=ROOT,
                          capture_output=True, env=environment(PATH="/nonexistent", **more))  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


WORKER = """
import json, sys
from functools import partial
from pathlib import Path
import torch
from engine.build import make_backend, make_runner
from engine.derived.kernels import open_kernels
from engine.derived.loading import build_model
from engine.derived.location import Derived, Location
from engine.footprint import positions
from engine.launch import open_in_store
from engine.memory_plan import read_model
from engine.memory_plan import read_model
from engine.options import EngineOptions
from engine.prepare.kernels import deployment_starts
from engine.prepare.kernels import SizedWeights
from engine.weights.files import File, FileSet
from kernels.triton import configs
from tests.kernels.triton_server import use_device

asked = json.load(sys.stdin)
files = FileSet("", tuple(File(*file) for file in asked["files"]))
known = read_model(files, partial(open_in_store, Path(asked["store"])))
options = EngineOptions(**asked["options"])
configs.select("NVIDIA H200", 90)
refused = []
cache = open_kernels(Location(Path(asked["folder"]), Derived(**asked["derived"])), refused.append)
use_device()
ops = make_backend(options, "meta")
with torch.inference_mode():
    model = build_model(known, SizedWeights(known), ops, positions(options), options.max_context_tokens)
    make_runner(model, ops, options, None)
cache.seal()
print(json.dumps({"hits": cache.hits, "misses": cache.misses, "refused": list(map(str, refused))}))
"""
"""As `engine.build` does, but for torch's own part of the device, which this machine lacks."""


@needs_compiler
def test_engine_prepare_compiles_what_a_worker_starts_and_neither_has_a_compiler(
    stored: tuple[Path, engine_pb2.FileSet], tmp_path: Path
) -> None:
    libraries, out = build(tmp_path / "libraries", "--libraries-only"), tmp_path / "derived"
    out.mkdir()
    answer = prepare(stored, out, CLOISTER_TRITON_CACHE=str(libraries))
    assert answer["ok"], answer
    made = Derived(stored[1].model_digest, LAYOUT, answer["report"]["sha256"], answer["report"]["size"])
    assert [path.name for path in out.iterdir()] == [made.name]
    asked = {
        "files": [(file.path, file.size, file.sha256) for file in stored[1].files],
        "store": str(stored[0]),
        "options": asdict(OPTIONS),
        "folder": str(out),
        "derived": asdict(made),
    }
    found = ask(("-c", WORKER), asked, LD_LIBRARY_PATH=str(make_driver(tmp_path / "driver")))
    assert found == {"hits": answer["report"]["kernels"], "misses": [], "refused": []}


@needs_compiler
def test_without_c_modules_engine_prepare_says_what_to_install(
    stored: tuple[Path, engine_pb2.FileSet], tmp_path: Path
) -> None:
    answer = prepare(stored, tmp_path, CLOISTER_TRITON_CACHE=str(tmp_path / "none"))
    assert (answer["ok"], answer["code"]) == (False, "LIBRARY_NOT_BUILT")
    assert "kernels.aot install" in answer["message"]
    assert os.listdir(tmp_path) == []
