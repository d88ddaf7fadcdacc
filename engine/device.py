"""The CUDA device that this process computes on: opened, measured, and its memory held to the plan.

engine-host lets a worker see one device, by its UUID, so that to CUDA it is always the first.

Source: NVIDIA, "CUDA C++ Programming Guide", CUDA_VISIBLE_DEVICES; PyTorch, "CUDA semantics" (memory management).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.errors import EngineError
from engine.memory_plan import MemoryPlan
from engine.options import EngineOptions
from engine.triton_footprint import CONTEXT_BYTES

_FIRST = 0
_WORKSPACES = 3  # of the thread that loads, on its stream and that of graphs, and of the thread that steps
_WORKSPACE_BYTES = 32 * 2**20  # torch's, on compute capability 9.0; less on others


@dataclass(frozen=True)
class Device:
    """A CUDA device in use.

    Attributes:
        name: as the vendor calls it.
        capability: of its kernels: 90 for compute capability 9.0.
        total: bytes of its memory.
        available: bytes of it that a deployment may take, what CUDA needs itself included.
    """

    name: str
    capability: int
    total: int
    available: int

    def hold_to(self, plan: MemoryPlan) -> None:
        """From now on torch refuses what is beyond the plan, as if the device had no more.

        Torch's own are the ends of tensors' segments, too, which the plan counts with the process, and what cuBLAS
        works in, once for each thread and stream.
        """
        held = plan.total - CONTEXT_BYTES + _WORKSPACES * _WORKSPACE_BYTES
        torch.cuda.set_per_process_memory_fraction(min(1.0, held / self.total), _FIRST)


def open_device(options: EngineOptions) -> Device:
    """The device that `options` name, which is the only one that this process sees.

    Raises:
        EngineError: DEVICE_UNAVAILABLE, CUDA does not have it, or has more than it.
    """
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count != 1:
            raise _unavailable(options, f"CUDA shows {count} devices and not the one it is to run on")
        free, total = torch.cuda.mem_get_info(_FIRST)
        major, minor = torch.cuda.get_device_capability(_FIRST)
        name = torch.cuda.get_device_name(_FIRST)
    except (RuntimeError, AssertionError) as error:
        raise _unavailable(options, str(error).partition("\n")[0]) from error
    own = min(CONTEXT_BYTES, total - free)  # what was just opened is in the plan, too
    return Device(name, 10 * major + minor, total, free + own)


def _unavailable(options: EngineOptions, why: str) -> EngineError:
    return EngineError(
        "DEVICE_UNAVAILABLE",
        f"the worker is to run on {options.device}, and {why}; see `cloister gpu list`, and that torch was built "
        "for CUDA and the driver is loaded",
    )
