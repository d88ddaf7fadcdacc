"""The cores this process may keep busy, and what of them is left to others while an engine runs.

A core is a physical one, however many hardware threads it shows: these share its vector units and its way to
memory. A quota of a control group leaves all cores visible and stops every thread once its share of the period is
used up, so a step with more threads than that waits for the ones that were stopped.

Source: sched_getaffinity(2); Linux, "Control Group v2", cpu.max; "How CPU topology info is exported via sysfs".
"""

import os
from pathlib import Path

from engine.memory import CGROUP, PROC, control_groups

SYSTEM = Path("/sys/devices/system/cpu")
_CORES_OF_WHICH_ONE_IS_KEPT = 8

Core = tuple[int, ...]
"""The hardware threads of a physical core that may be used, by the kernel's numbers, in order."""


def physical_cores(system: Path = SYSTEM) -> tuple[Core, ...]:
    """The cores that the caller may run on, in order; each hardware thread is one where none are told apart."""
    found: dict[frozenset[int], set[int]] = {}
    for number in sorted(os.sched_getaffinity(0)):
        try:
            text = (system / f"cpu{number}" / "topology" / "thread_siblings_list").read_text(encoding="ascii")
            siblings = numbers(text)
        except (OSError, ValueError):
            siblings = frozenset((number,))
        found.setdefault(siblings | {number}, set()).add(number)
    return tuple(sorted(tuple(sorted(core)) for core in found.values()))


def quota_cores(proc: Path = PROC, cgroup: Path = CGROUP) -> int | None:
    """Whole cores that the tightest control group's share of time amounts to; None where all time may be used."""
    shares = []
    for group in control_groups(proc, cgroup):
        try:
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and int(period):
            shares.append(int(quota) // int(period))
    return max(1, min(shares)) if shares else None


def usable_cores(proc: Path = PROC, cgroup: Path = CGROUP, system: Path = SYSTEM) -> int:
    """How many cores can be kept busy, at least one."""
    cores = len(physical_cores(system))
    return min(cores, quota_cores(proc, cgroup) or cores)


def engine_cores(cores: int) -> int:
    """Of so many cores, those for an engine's threads unless somebody asks for another number; at least one.

    The others are for the processes beside it: a spinning thread that shares its core slows a step tenfold.
    """
    return max(1, cores - max(1, cores // _CORES_OF_WHICH_ONE_IS_KEPT))


def numbers(text: str) -> frozenset[int]:
    """The numbers of a list like 0-3,8, as the kernel writes them.

    Raises:
        ValueError: it is no such list.
    """
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
