"""A process that starts kernels as a worker does, on a driver that the test made: what it found in its cache.

Arguments: the cache's folder, part of a kernel's name, and words: `changed` starts one more kernel, with another
constant, after the cache is sealed; `may-compile` is a developer's mode. Prints one JSON object.
"""

import ctypes
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kernels.triton import configs
from kernels.triton.cache import CacheError, KernelCache, activate
from kernels.triton.case import MODEL, Draw
from kernels.triton.launch import recording


def families(part: str) -> list[ModuleType]:
    from kernels.triton.families import FAMILIES

    return [family for family in FAMILIES if part in family.__name__]


def use_device() -> None:
    """CUDA's own driver, with what torch for the CPU cannot tell it."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    cuda: Any = CudaDriver()
    cuda.get_current_device = lambda: 0
    cuda.get_current_stream = lambda device: 0
    cuda.get_device_capability = lambda device: (9, 0)
    driver.set_active(cuda)


def serve(cache: KernelCache, part: str, words: list[str]) -> dict[str, Any]:
    use_device()
    for family in families(part):
        for case in family.cases(Draw("meta"), MODEL):
            case.run()
    cache.seal()
    answer: dict[str, Any] = {"hits": cache.hits, "misses": len(cache.misses)}
    if "changed" in words:
        answer["changed"] = start_changed(families(part)[0])
        answer["misses"] = len(cache.misses)
    return answer


def start_changed(family: ModuleType) -> str:
    """The first kernel of a family, with one warp more or less."""
    case = next(iter(family.cases(Draw("meta"), MODEL)))
    with recording() as starts:
        case.run()
    start = starts[0]
    options = {**start.options, "num_warps": 2}
    try:
        start.kernel[start.grid](*start.args, **options)
    except CacheError as error:
        return str(error)
    return "started"


def main() -> None:
    folder, part, *words = sys.argv[1:]
    configs.select("NVIDIA H200", 90)
    torch.set_num_threads(1)
    try:
        answer = serve(activate([Path(folder)], may_compile="may-compile" in words), part, words)
    except CacheError as error:
        answer = {"error": str(error)}
    try:
        started = ctypes.c_int.in_dll(ctypes.CDLL("libcuda.so.1"), "started").value
    except OSError:
        started = 0
    compilers = [name for name in ("cc", "gcc", "clang", "file") if shutil.which(name)]
    print(json.dumps(answer | {"started": started, "compilers": compilers}))


if __name__ == "__main__":
    main()
