"""Loads a model and fills its pages and steps; prints the plan beside what was held and measured, for each layout.

Run as a process of its own: `python -m tests.engine.plan_against_process FOLDER LAYOUTS_JSON`. Each layout is
measured in a process forked off before any model is loaded, so that none inherits what another leaves behind and
the libraries are imported once.
"""

import json
import os
import random
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from engine.build import build_engine
from engine.memory_plan import plan_memory, read_model
from engine.options import EngineOptions
from kernels.native.memory import HUGE_PAGE
from tests.engine.tiny import file_set, request, run


def main(folder: Path, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)  # before the forks: threads do not survive one
    _warm_up()
    return [_apart(folder, EngineOptions(**layout)) for layout in layouts]


def _apart(folder: Path, options: EngineOptions) -> dict[str, Any]:
    """`measure` in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writing, json.dumps(measure(folder, options)).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with open(reading, "rb") as answer:
        said = answer.read()
    assert os.waitpid(child, 0)[1] == 0, f"{options} could not be measured"
    found: dict[str, Any] = json.loads(said)
    return found


def measure(folder: Path, options: EngineOptions) -> dict[str, Any]:
    model = read_model(*file_set(folder))
    plan = plan_memory(model, options, 1 << 50)
    before = _restart_peak()
    loop = build_engine(*file_set(folder), options)
    loading = _peak()
    _restart_peak()
    runner: Any = loop._runner
    held = {"weights": held_bytes(runner._model), "kv": held_bytes(runner._kv)}
    for tensor in _tensors(runner._kv).values():
        tensor.zero_()  # pages that were never touched are in no figure of the kernel's
    draw = random.Random(1)
    length = plan.options.max_context_tokens - 6
    for handle in range(min(plan.options.max_running, plan.full_contexts)):
        prompt = [draw.randrange(2, model.config.vocab_size) for _ in range(length)]
        sampling = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": handle}
        loop.submit(request(handle, prompt, 4, ignore_eos=True, **sampling))
    answers = run(loop)
    assert [len(answer.token_ids) for answer in answers.values()] == [4] * len(answers), "a step failed"
    steps = _peak() - before
    planned = {"weights": plan.weights, "kv": plan.kv, "steps": plan.weights + plan.kv + plan.activations}
    planned["total"] = plan.total - plan.process
    return {"planned": planned, "held": held, "steps": steps, "peak": max(loading - before, steps)}


def _warm_up() -> None:
    """Libraries allocate at their first product."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.randn(64, 64).to(dtype) @ torch.randn(64, 64).to(dtype)


def _tensors(value: Any) -> dict[int, torch.Tensor]:
    """Every tensor inside, once for each storage."""
    if isinstance(value, torch.Tensor):
        is_opaque = value.layout == torch._mkldnn  # type: ignore[attr-defined]  # torch's stubs lack it
        return {id(value) if is_opaque else value.untyped_storage().data_ptr(): value}
    fields = getattr(value, "__dataclass_fields__", None)
    inside = [getattr(value, name) for name in fields] if fields else value
    if not isinstance(inside, list | tuple):
        return {}
    return {place: tensor for item in inside for place, tensor in _tensors(item).items()}


def held_bytes(value: Any) -> int:
    """Bytes of every tensor inside; of memory that starts on a huge page, what was asked for."""
    return sum(map(_held, _tensors(value).values()))


def _held(tensor: torch.Tensor) -> int:
    if tensor.layout == torch._mkldnn:  # type: ignore[attr-defined]  # torch's stubs lack it
        return tensor.nbytes  # of whole blocks
    held = tensor.untyped_storage().nbytes()
    return tensor.nbytes if held == tensor.nbytes + HUGE_PAGE else held


def _restart_peak() -> int:
    """Let the kernel forget the peak of resident memory (proc(5), clear_refs); bytes now that no file backs."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("RssAnon")


def _peak() -> int:
    """Most bytes since then that no file backs: pages of libraries are touched once and stay."""
    return _status("VmHWM") - _status("RssFile")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
