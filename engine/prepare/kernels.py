"""The kernels that a deployment will start, listed and compiled on a machine that need not have its device.

A worker starts every kernel once before it takes requests: when its steps are warmed up and recorded. Here the
same is done with tensors that have sizes and no memory, and every start is noted in place of being made; so the
list is complete by construction, and depends on no number of the model.

    python -m engine.prepare.kernels MODEL --device "NVIDIA H200" --capability 9.0 --kv-blocks 4096 > list.json

prints such a list for `python -m kernels.aot build --launches`; options are those of `cloister model load`. MODEL
is a folder with config.json and, if it is quantised, the files of its weights, of which the headers are read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.build import make_backend, make_runner
from engine.derived.kernels import keep_kernels
from engine.derived.loading import build_model
from engine.errors import EngineError
from engine.footprint import positions
from engine.launch import open_in_store
from engine.memory_plan import Model, plan_memory, read_model
from engine.options import EngineOptions
from engine.prepare.question import Compiling, read_capability
from engine.weights.files import File, FileSet, OpenFile
from engine.weights.formats import Shape
from kernels import aot
from kernels.packed import Layout, Packed
from kernels.triton import configs
from kernels.triton.cache import CacheError, installed_folder, own_folder
from kernels.triton.launch import Launch, Unsupported, recording

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SCALE = torch.float32
_ANY_DEVICE = "cuda"  # of a plan that is made for no device that is here


class SizedWeights:
    """A model's tensors as far as their sizes; a `engine.models.tensors.Weights`.

    Args:
        known: the model.
    """

    def __init__(self, known: Model) -> None:
        self._known = known

    def pop(self, name: str, /) -> Tensor:
        """The tensor `name`."""
        return torch.empty(self._known.shapes[name], dtype=_DTYPES[self._known.dtype], device="meta")

    def matrix(self, prefix: str, /) -> Tensor | Packed:
        """The matrix `{prefix}.weight`."""
        name = f"{prefix}.weight"
        shape = self._known.shapes[name]
        return packed(self._layout(name), shape) if name in self._known.formats else self.pop(name)

    def experts(self, name: str, /) -> Sequence[Tensor | Packed]:
        """The matrices of `name`, which is [experts, in, out]."""
        count, inner, out = self._known.shapes[name]
        if name not in self._known.formats:
            return [stack.T for stack in self.pop(name)]
        return [packed(self._layout(name), (out, inner)) for _ in range(count)]

    def _layout(self, name: str) -> Layout:
        return self._known.formats[name].layout(self._known.shapes[name])


def packed(layout: Layout, shape: Shape) -> Packed:
    """A quantised matrix that has sizes alone."""
    out, inner = shape
    empty = partial(torch.empty, device="meta")
    kinds = {"float8": torch.float8_e4m3fn, "table": torch.uint8}
    codes = empty((out, inner), dtype=kinds.get(layout.kind, torch.uint8 if layout.zeros else torch.int8))
    scales = -(-out // layout.rows), -(-inner // layout.columns)
    return Packed(
        codes=codes,
        scales=empty(scales, dtype=_SCALE),
        rows=layout.rows,
        columns=layout.columns,
        bits=layout.bits,
        zeros=empty(scales, dtype=_SCALE) if layout.zeros else None,
        table=empty(2**layout.bits, dtype=_SCALE) if layout.kind == "table" else None,
        order=empty(inner, dtype=torch.int64) if layout.order else None,
    )


def deployment_starts(known: Model, options: EngineOptions) -> list[Launch]:
    """Every start of a kernel that a worker of this deployment makes while it warms up, on the selected device.

    Args:
        known: the model.
        options: with every default filled in.

    Raises:
        EngineError: DEVICE_UNSUPPORTED, the device cannot do what the deployment needs.
    """
    ops = make_backend(options, "meta")
    with recording() as starts, torch.inference_mode():
        try:
            model = build_model(
                known,
                SizedWeights(known),
                ops,
                max_positions=positions(options),
                context=options.max_context_tokens,
            )
            make_runner(model, ops, options, known.served.pooling)
        except Unsupported as error:
            raise EngineError("DEVICE_UNSUPPORTED", str(error)) from error
    return starts


def compile_kernels(question: Compiling) -> dict[str, Any]:
    """Make the derived file of a deployment's kernels; its digest and size, and how many kernels there are.

    Raises:
        EngineError: the model cannot be read; a code of `kernels.triton.cache.CacheError`.
        OSError: the file cannot be written.
    """
    packing = question.packing
    torch.set_num_threads(1)
    configs.select(question.device, question.capability)
    starts = deployment_starts(read_model(packing.files, partial(open_in_store, packing.store)), packing.options)
    installed = installed_folder()
    known = [installed] if installed.is_dir() else []
    cache = own_folder() / "cache"
    try:
        count = aot.build(cache, starts, question.capability, known, packing.options.threads)
    except CacheError as error:
        raise EngineError(error.code, error.message) from error
    made = keep_kernels(cache, packing.out, packing.files.model_digest, packing.layout)
    return {"sha256": made.sha256, "size": made.size, "kernels": count}


def main(words: list[str] | None = None) -> int:
    """Print the list of a deployment's starts."""
    args = _parser().parse_args(words)
    asked = {field.name: getattr(args, field.name) for field in fields(EngineOptions) if field.name in args}
    try:
        configs.select(args.name, read_capability(args.capability))
        known = read_model(*_folder(args.model))
        plan = plan_memory(
            known, EngineOptions(**asked | {"backend": "triton", "device": _ANY_DEVICE}), available=0
        )
        starts = deployment_starts(known, plan.options)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from kernels.triton.launch_list import to_json
    from kernels.triton.offline import key

    print(json.dumps(to_json(list({key(start): start for start in starts}.values())), indent=1))
    return 0


def _folder(model: Path) -> tuple[FileSet, OpenFile]:
    """A model's files as if they were of the store; those of its weights by names in place of digests."""
    paths: dict[str, Path] = {}
    files = []
    for path in sorted(model.iterdir()):
        if path.is_file():
            is_large = path.suffix == ".safetensors"
            digest = sha256(path.name.encode() if is_large else path.read_bytes()).hexdigest()
            paths[digest] = path
            files.append(File(path.name, path.stat().st_size, digest))
    return FileSet("0" * 64, tuple(files)), lambda digest: os.open(paths[digest], os.O_RDONLY | os.O_CLOEXEC)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.prepare.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", dest="name", required=True, help="its name, as its driver tells it")
    parser.add_argument("--capability", required=True, help="compute capability, 9.0 of an H200")
    parser.add_argument("--dtype", default="")
    parser.add_argument("--kv-dtype", default="")
    parser.add_argument("--deterministic", action="store_true")
    for name in ("kv_blocks", "block_size", "max_step_tokens", "max_running", "max_context_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
