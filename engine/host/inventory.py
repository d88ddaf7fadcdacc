"""The devices of this machine that a model can run on.

Source: proc_cpuinfo(5), proc_meminfo(5); sched_getaffinity(2); memory.max of cgroups(7), version 2.
"""

import os
import platform
from pathlib import Path

from engine.protos import engine_pb2

CPU = "cpu"


def devices(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> list[engine_pb2.Device]:
    """Every device; the CPU is one, with the cores and the memory this process may use."""
    return [
        engine_pb2.Device(
            id=CPU,
            kind=CPU,
            name=_cpu_name(proc / "cpuinfo"),
            memory_bytes=_memory_bytes(proc / "meminfo", cgroup / "memory.max"),
            cores=len(os.sched_getaffinity(0)),
        )
    ]


def _cpu_name(cpuinfo: Path) -> str:
    """The vendor's name of the first core; the architecture where the kernel gives none, as on ARM."""
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _memory_bytes(meminfo: Path, limit: Path) -> int:
    """Physical memory, or less where a control group allows less."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
    total = int(fields["MemTotal"].split()[0]) * 1024
    try:
        allowed = limit.read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(allowed)) if allowed.isdigit() else total
