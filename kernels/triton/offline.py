"""Compiling kernels to cubin without a device, and what the machine code says about its speed.

A driver that only names its target stands in for CUDA's: `warmup` then makes the very binary, under the very cache
key, that a start with the same arguments would make on the device. `cuobjdump`, which comes with Triton, tells
registers, spills and shared memory, and whether tensor cores and bulk copies are used.

    python -m kernels.triton.offline --target 90 [--scale proof] [--only NAME]

prints a line of JSON for each kernel with each of its constants and argument types. It must run in a process
without TRITON_INTERPRET.

Source: NVIDIA, "CUDA Binary Utilities" (cuobjdump); "CUDA C++ Programming Guide", table of compute capabilities
(shared memory of a block).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from kernels.triton.case import MODEL, PROOF, Draw
from kernels.triton.launch import Launch, recording

TARGETS = (80, 86, 89, 90, 100, 120)
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Most shared memory of a block, by compute capability."""


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
        registers: of a thread.
        spilled: bytes of a thread's stack.
        shared: bytes of a block.
        wgmma: it uses the tensor cores of Hopper.
        bulk: it copies by TMA.
        converts: instructions that make floats of integers one by one.
        error: why it did not compile; else "".
    """

    kernel: str
    key: str
    target: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    wgmma: bool = False
    bulk: bool = False
    converts: int = 0
    error: str = ""


def launches(scale: str, only: str = "") -> list[Launch]:
    """Every start of every family's cases, one of each kind."""
    from kernels.triton.families import FAMILIES

    found: dict[str, Launch] = {}
    for family in FAMILIES:
        with recording() as started:
            for case in family.cases(Draw("meta"), scale):
                case.run()
        found |= {name(start) + key(start): start for start in started if only in name(start)}
    return list(found.values())


def name(start: Launch) -> str:
    """Of the kernel."""
    return str(start.kernel.__name__).lstrip("_")


def key(start: Launch) -> str:
    """Short for the kernel's constants, options and types: what a binary is made of beside its source."""
    types = [str(arg.dtype) if isinstance(arg, torch.Tensor) else type(arg).__name__ for arg in start.args]
    return sha256(repr((types, sorted(start.options.items()))).encode()).hexdigest()[:12]


def compile_launch(start: Launch, target: int) -> Any:
    """The compiled kernel of a start; Triton's cache keeps it."""
    driver.set_active(OfflineDriver(target))
    return start.kernel.warmup(*start.args, grid=start.grid, **start.options)


def examine(start: Launch, target: int) -> Compiled:
    """Compile, and read the machine code."""
    found = Compiled(name(start), key(start), target)
    try:
        kernel = compile_launch(start, target)
    except Exception as error:  # a refusal is what is asked for
        return found._replace(error=f"{type(error).__name__}: {error}"[:2000])
    usage, code = _dump(kernel.asm["cubin"])
    return found._replace(
        registers=_number(r"REG:(\d+)", usage),
        spilled=_number(r"STACK:(\d+)", usage),
        shared=int(kernel.metadata.shared),
        wgmma="HGMMA" in code or "IGMMA" in code or "QGMMA" in code,
        bulk="UTMALDG" in code or "UBLKCP" in code,
        converts=len(re.findall(r"\bI2FP?\b", code)),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _dump(cubin: bytes) -> tuple[str, str]:
    """Resources, and machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        asked = [subprocess.run([tool, how, file.name], check=True, capture_output=True, text=True).stdout
                 for how in ("-res-usage", "-sass")]  # fmt: skip
    return asked[0], asked[1]


def main(words: list[str] | None = None) -> int:
    """Compile all that is asked for; 1 where something did not."""
    parser = argparse.ArgumentParser(prog="python -m kernels.triton.offline", description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, action="append", choices=TARGETS)
    parser.add_argument("--scale", choices=(PROOF, MODEL), default=MODEL)
    parser.add_argument("--only", default="", metavar="NAME", help="kernels whose name holds this")
    args = parser.parse_args(words)
    wrong = 0
    for compiled in _all(args.target or [90], launches(args.scale, args.only)):
        print(json.dumps(compiled._asdict()), flush=True)
        wrong += bool(compiled.error)
    return int(bool(wrong))


def _all(targets: list[int], starts: list[Launch]) -> Iterator[Compiled]:
    for target in targets:
        driver.set_active(OfflineDriver(target))
        with ThreadPoolExecutor(2) as pool:
            yield from pool.map(lambda start, at=target: examine(start, at), starts)


if __name__ == "__main__":
    sys.exit(main())
