"""How long a worker takes to have a model's weights ready: packed by itself, or read from a derived file.

Run: python -m benchmarks.loading [--shape llama-3.2-1b] [--stored int4 gptq int8 bf16] [--rounds 3]

Random weights of a published shape are written to a temporary folder, so that the page cache has them; then each
way runs in a process of its own, alternating. Seconds are from an imported engine to a model that computes, every
byte hashed; CPU seconds are of all threads, which others miss meanwhile; the peak is of memory that no file backs.
`derive` is what engine-prepare takes once.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.bench.shapes import SHAPES
from engine.build import make_backend
from engine.derived.layout import layout_name
from engine.derived.loading import build_model, derive, load_model
from engine.derived.location import Derived, Location
from engine.memory_plan import plan_memory, read_model
from engine.models.config import parse_config
from engine.models.registry import architecture
from engine.options import EngineOptions
from engine.weights.files import File, FileSet

_GROUP = 128
_METHODS: Mapping[str, Any] = {
    "int4": {"quant_method": "cloister", "bits": 4, "group_size": _GROUP, "symmetric": True},
    "int8": {"quant_method": "cloister", "bits": 8, "group_size": 0, "symmetric": True},
    "gptq": {
        "quant_method": "gptq", "bits": 4, "group_size": _GROUP, "sym": True, "desc_act": False,
        "checkpoint_format": "gptq",
    },
    "bf16": None,
}  # fmt: skip
_WAYS = ("store", "derived")


def main() -> None:
    """Measure and print, or be one of the measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b", choices=sorted(SHAPES))
    parser.add_argument("--stored", nargs="+", default=list(_METHODS), choices=sorted(_METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--way", choices=(*_WAYS, "derive"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.way:
        print(json.dumps(_measure(chosen.way, chosen.folder, chosen.backend, chosen.threads)))
        return
    for stored in chosen.stored:
        with tempfile.TemporaryDirectory(prefix="loading-") as folder:
            _compare(Path(folder), stored, chosen)


def _compare(folder: Path, stored: str, chosen: argparse.Namespace) -> None:
    model = folder / "model"
    _write(model, SHAPES[chosen.shape], _METHODS[stored])
    ask = partial(_ask, model, chosen)
    made = ask("derive")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in _WAYS}
    for _ in range(chosen.rounds):
        for way in _WAYS:
            found[way].append(ask(way))
    stored_gib = sum(path.stat().st_size for path in model.iterdir() if path.suffix == ".safetensors") / 2**30
    print(f"{chosen.shape} {stored}: {stored_gib:.2f} GiB stored, derived {made['bytes'] / 2**30:.2f} GiB")
    for way, runs in {"derive": [made], **found}.items():
        seconds, cpu = (statistics.median(run[name] for run in runs) for name in ("seconds", "cpu"))
        peak = max(run["peak"] for run in runs) / 2**30
        print(f"  {way:<8} {seconds:6.2f} s, {cpu:6.2f} s of CPU, peak {peak:.2f} GiB")


def _ask(folder: Path, chosen: argparse.Namespace, way: str) -> dict[str, float]:
    argv = ("--way", way, "--folder", str(folder), "--threads", str(chosen.threads), "--backend", chosen.backend)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loading", *argv], stdout=subprocess.PIPE, check=True, timeout=600
    )
    told: dict[str, float] = json.loads(done.stdout)
    return told


def _measure(way: str, folder: Path, backend: str, threads: int) -> dict[str, float]:
    """One way, in this process."""
    torch.set_num_threads(threads)
    files, open_file = _file_set(folder)
    options = EngineOptions(backend=backend, dtype="bfloat16", threads=threads)
    known = read_model(files, open_file)
    build = partial(build_model, known, max_positions=4096, context=4096)
    ops = make_backend(options)
    layout = layout_name(plan_memory(known, options, 0).options)
    kept = folder.with_name("derived")
    kept.mkdir(exist_ok=True)
    note = kept / "digest.json"
    before, computed = time.perf_counter(), time.process_time()

    def told() -> dict[str, float]:
        spent = time.process_time() - computed
        return {"seconds": time.perf_counter() - before, "cpu": spent, "peak": _peak()}

    if way == "derive":
        made = derive(known, files, open_file, build, ops, kept, layout)
        note.write_text(json.dumps([made.sha256, made.size]))
        return {**told(), "bytes": made.size}
    location = None
    if way == "derived":
        location = Location(kept, Derived(files.model_digest, layout, *json.loads(note.read_text())))
    load_model(known, files, open_file, build, ops, location, _fail)
    return told()


def _fail(error: Exception) -> None:
    raise SystemExit(f"the derived file was not used: {error}")


def _peak() -> float:
    """Bytes: what was resident at most, less what files back now (proc_pid_status(5))."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = {
        name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.split()
    }
    return (int(fields["VmHWM"]) - int(fields["RssFile"])) * 1024


def _file_set(folder: Path) -> tuple[FileSet, Any]:
    """By digests that are kept beside the folder, as the store has them."""
    note = folder.with_name("files.json")
    if not note.exists():
        found = {path.name: _digest(path) for path in sorted(folder.iterdir())}
        note.write_text(json.dumps(found))
    digests: dict[str, str] = json.loads(note.read_text())
    files = tuple(File(name, (folder / name).stat().st_size, sha256) for name, sha256 in digests.items())
    paths = {sha256: folder / name for name, sha256 in digests.items()}
    return FileSet("0" * 64, files), lambda sha256: os.open(paths[sha256], os.O_RDONLY)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder: Path, shape: Mapping[str, Any], method: Mapping[str, Any] | None) -> None:
    """A random model in files."""
    folder.mkdir()
    fields = dict(shape) | ({"quantization_config": method} if method else {})
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text("{}")  # loading weights does not read it
    config = parse_config(json.dumps(fields).encode())
    family = architecture(config)
    matrices = family.matrices(config) if method else frozenset()
    tensors: dict[str, Tensor] = {}
    for name, size in family.tensor_shapes(config).items():
        if name in matrices and method:
            stem = name.removesuffix("weight")
            tensors |= {stem + part: tensor for part, tensor in _quantised(method, size).items()}
        else:
            tensors[name] = torch.randn(prod(size)).bfloat16().view(size)
    save_file(tensors, folder / "model.safetensors")


def _quantised(method: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Random codes; scales such that numbers stay small."""
    out, inner = shape
    groups = inner // _GROUP
    if method["quant_method"] == "gptq":
        return {
            "qweight": torch.randint(-(2**31), 2**31 - 1, (inner // 8, out), dtype=torch.int32),
            "qzeros": torch.full((groups, out // 8), 0x77777777, dtype=torch.int32),
            "scales": torch.full((groups, out), 0.01).half(),
            "g_idx": torch.arange(inner, dtype=torch.int32) // _GROUP,
        }
    if method["bits"] == 8:
        codes = torch.randint(-127, 128, shape, dtype=torch.int8)
        return {"codes": codes, "scales": torch.full((out, 1), 0.001).half()}
    codes = torch.randint(0, 256, (out, inner // 2), dtype=torch.uint8)
    return {"codes": codes, "scales": torch.full((out, groups), 0.01).half()}


if __name__ == "__main__":
    main()
