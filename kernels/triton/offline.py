"""Compiling kernels to cubin without a device, and what the machine code says about its speed.

A driver that only names its target stands in for CUDA's: `warmup` then makes the very binary, under the very cache
key, that a start with the same arguments would make on the device. `cuobjdump`, which comes with Triton, tells its
registers and spills and, of a kernel that promises something of them, its instructions.

    python -m kernels.triton.offline --target 90 [--scale proof] [--only NAME] [--table NAME] [--all-configs]

prints a line of JSON for each kernel with each of its constants and argument types, and ends with status 1 where
one has a fault. It must run in a process without TRITON_INTERPRET.

A family may promise more of its kernels than that they spill nothing and fit: MUST, a dictionary from a kernel's
name without its underscore to some of PROMISES.

Source: NVIDIA, "CUDA Binary Utilities" (cuobjdump); "CUDA C++ Programming Guide", table of compute capabilities
(shared memory of a block); prctl(2), PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from kernels.triton import configs
from kernels.triton.case import MODEL, PROOF, Draw
from kernels.triton.launch import Launch, Unsupported, recording

TARGETS = (80, 86, 89, 90, 100, 120)
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Most shared memory of a block, by compute capability."""

WGMMA, TMA, NO_I2F = "wgmma", "tma", "no-i2f"
PROMISES = (WGMMA, TMA, NO_I2F)
"""Tensor cores of Hopper where BLOCK_M is at least 64; bulk copies on Hopper; no loop makes floats of integers one
by one."""

_WGMMA_ROWS = 64
_HOPPER = 90
_PR_SET_PDEATHSIG = 1


class OfflineDriver:
    """Stands in for CUDA's driver where there is no device: it knows what to compile for, and starts nothing."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """The capability: Triton keeps what it compiled by device."""
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        """None is ever used."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are that have sizes alone."""
        return torch.device("meta")

    @staticmethod
    def is_active() -> bool:
        """It is chosen by hand."""
        return False

    def map_python_to_cpp_type(self, name: str) -> str:
        """As CUDA's driver has it; asked by what makes launchers."""
        from triton.backends.nvidia.driver import ty_to_cpp

        return str(ty_to_cpp(name))


class Compiled(NamedTuple):
    """What one kernel came to for one target.

    Attributes:
        kernel: its name.
        key: of its constants, options and argument types.
        target: compute capability.
        constants: and options.
        registers: of a thread.
        spilled: bytes of a thread's stack.
        shared: bytes of a block.
        wgmma: it uses the tensor cores of Hopper.
        bulk: it copies by TMA.
        converts: instructions in loops that make floats of integers one by one, where it promises none.
        refused: why its launcher does not start it on such a device; else "".
        error: why it did not compile; else "".
    """

    kernel: str
    key: str
    target: int
    constants: Mapping[str, Any] = {}
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    wgmma: bool = False
    bulk: bool = False
    converts: int = 0
    refused: str = ""
    error: str = ""


def launches(scale: str, only: str = "", refused: list[str] | None = None) -> list[Launch]:
    """Every start of every family's cases on the selected device, one of each kind.

    Args:
        scale: of the cases.
        only: kernels whose name holds this.
        refused: is told what launchers do not start on the device.
    """
    from kernels.triton.families import FAMILIES

    found: dict[str, Launch] = {}
    for family in FAMILIES:
        with recording() as started:
            for case in family.cases(Draw("meta"), scale):
                try:
                    case.run()
                except Unsupported as error:
                    if refused is not None:
                        refused.append(f"{case.name}: {error}")
        found |= {name(start) + key(start): start for start in started if only in name(start)}
    return list(found.values())


def promises() -> dict[str, set[str]]:
    """What families promise of their kernels, by name."""
    from kernels.triton.families import FAMILIES

    found: dict[str, set[str]] = {}
    for family in FAMILIES:
        for kernel, promised in getattr(family, "MUST", {}).items():
            if not set(promised) <= set(PROMISES):
                raise ValueError(f"{family.__name__}: MUST of {kernel} is not of {PROMISES}")
            found.setdefault(kernel, set()).update(promised)
    return found


def name(start: Launch) -> str:
    """Of the kernel."""
    return str(start.kernel.__name__).lstrip("_")


def key(start: Launch) -> str:
    """Short for the kernel's constants, options and types: what a binary is made of beside its source."""
    free, loose = (_told(start.kernel, what) for what in ("do_not_specialize", "do_not_specialize_on_alignment"))
    types = [
        _kind(arg, at in free, at in free | loose)
        for at, arg in zip(start.kernel.arg_names, start.args, strict=False)
    ]
    source = f"{start.kernel.fn.__module__}.{start.kernel.fn.__name__}"
    return sha256(repr((source, types, sorted(start.options.items()))).encode()).hexdigest()[:12]


def _told(kernel: Any, what: str) -> set[str]:
    """The parameters that `triton.jit` was told something of, whether the kernel is compiled or interpreted."""
    if hasattr(kernel, "params"):
        return {parameter.name for parameter in kernel.params if getattr(parameter, what)}
    return set(kernel.kwargs.get(what) or ())


def _kind(arg: Any, is_free: bool, is_loose: bool) -> str:
    """What a binary is made for: type and alignment of tensors, width of integers, and 1 or a multiple of 16."""
    if isinstance(arg, torch.Tensor):
        return f"{arg.dtype}{' aligned' if arg.data_ptr() % 16 == 0 and not is_loose else ''}"
    if not isinstance(arg, int) or isinstance(arg, bool):
        return type(arg).__name__
    special = " 1" if arg == 1 and not is_free else " 16" if arg % 16 == 0 and not is_loose else ""
    return f"int{special}{'' if -(2**31) <= arg < 2**31 else ' wide'}"


def compile_launch(start: Launch, target: int) -> Any:
    """The compiled kernel of a start; Triton's cache keeps it."""
    driver.set_active(OfflineDriver(target))
    return start.kernel.warmup(*start.args, grid=start.grid, **start.options)


def examine(start: Launch, target: int, promised: Collection[str] = ()) -> Compiled:
    """Compile, and read the machine code."""
    found = Compiled(name(start), key(start), target, {at: _plain(value) for at, value in start.options.items()})
    try:
        kernel = compile_launch(start, target)
    except Exception as error:  # a refusal is what is asked for
        return found._replace(error=f"{type(error).__name__}: {error}"[:2000])
    usage, code = _dump(kernel.asm["cubin"], "-res-usage"), kernel.asm["ptx"]
    return found._replace(
        registers=_number(r"REG:(\d+)", usage),
        spilled=_number(r"STACK:(\d+)", usage),
        shared=int(kernel.metadata.shared),
        wgmma="wgmma.mma_async" in code,
        bulk="cp.async.bulk" in code,
        converts=converts_in_loops(_dump(kernel.asm["cubin"], "-sass")) if NO_I2F in promised else 0,
    )


def faults(compiled: Compiled, promised: set[str]) -> list[str]:
    """What is wrong with a kernel, in words."""
    if compiled.error:
        return [f"does not compile: {compiled.error}"]
    rows, on_hopper = int(compiled.constants.get("BLOCK_M", 0)), compiled.target == _HOPPER
    wrong = {
        f"spills {compiled.spilled} bytes": compiled.spilled > 0,
        f"takes {compiled.shared} bytes of shared memory": compiled.shared > SHARED_BYTES[compiled.target],
        f"has no wgmma with {rows} rows": WGMMA in promised
        and on_hopper
        and rows >= _WGMMA_ROWS
        and not compiled.wgmma,
        "copies nothing by TMA": TMA in promised and on_hopper and not compiled.bulk,
        f"has {compiled.converts} I2F in loops": NO_I2F in promised and compiled.converts > 0,
    }
    return [text for text, holds in wrong.items() if holds]


def converts_in_loops(code: str) -> int:
    """Instructions I2F between the target of a branch backwards and that branch."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*);", code, re.M)]
    loops = [
        (int(back[1], 16), at)
        for at, text in lines
        if (back := re.search(r"\bBRA(?:\.\S+)*\s.*?(0x[0-9a-f]+)", text)) and int(back[1], 16) < at
    ]
    return sum(
        bool(re.search(r"\bI2FP?\b", text)) and any(first <= at <= last for first, last in loops)
        for at, text in lines
    )


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _dump(cubin: bytes, what: str) -> str:
    """What cuobjdump tells; resources at once, instructions in half a second."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], check=True, capture_output=True, text=True).stdout


def main(words: list[str] | None = None) -> int:
    """Compile all that is asked for; 1 where something has a fault."""
    parser = argparse.ArgumentParser(prog="python -m kernels.triton.offline", description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, action="append", choices=TARGETS)
    parser.add_argument("--scale", choices=(PROOF, MODEL), default=MODEL)
    parser.add_argument("--only", default="", metavar="NAME", help="kernels whose name holds this")
    parser.add_argument("--table", default=configs.DEFAULT, metavar="NAME", help="of configurations")
    parser.add_argument("--all-configs", action="store_true", help="each configuration of the table")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(words)
    promised, wrong = promises(), 0
    for target in args.target or [_HOPPER]:
        configs.select(args.table, target)
        refused: list[str] = []
        starts = _starts(args.scale, args.only, args.all_configs, refused)
        for text in sorted(set(refused)):
            print(
                json.dumps(Compiled(text.partition(" ")[0], "", target, refused=text)._asdict() | {"faults": []})
            )
        for compiled in _examined(target, starts, args.processes):
            found = faults(compiled, promised.get(compiled.kernel, set()))
            print(json.dumps(compiled._asdict() | {"faults": found}), flush=True)
            wrong += bool(found)
    return int(bool(wrong))


def _starts(scale: str, only: str, all_configs: bool, refused: list[str]) -> list[Launch]:
    """Of the cases: with the configurations that their sizes have, or with each there is."""
    places: list[int | None] = list(range(configs.most_buckets())) if all_configs else [None]
    found: dict[str, Launch] = {}
    for place in places:
        with nullcontext() if place is None else configs.only(place):
            found |= {name(start) + key(start): start for start in launches(scale, only, refused)}
    return list(found.values())


_asked: Sequence[Launch] = ()  # of this process and those forked from it: a start cannot be sent


def _examined(target: int, starts: Sequence[Launch], processes: int) -> Iterator[Compiled]:
    """Each start compiled, in several processes, as Triton's own part of the work holds Python's lock."""
    global _asked  # noqa: PLW0603  # see there
    _asked = starts
    with forked(processes) as pool:
        yield from pool.map(_examine_one, range(len(starts)), [target] * len(starts))


def forked(processes: int) -> ProcessPoolExecutor:
    """Processes that have what this one has, and end with it."""
    return ProcessPoolExecutor(max(1, processes), get_context("fork"), _end_with_parent)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _examine_one(place: int, target: int) -> Compiled:
    return examine(_asked[place], target, promises().get(name(_asked[place]), ()))


if __name__ == "__main__":
    sys.exit(main())
