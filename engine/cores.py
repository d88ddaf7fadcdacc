"""How many cores this process may keep busy: what it may run on, or what the tightest control group allows.

A group's quota leaves all cores visible and stops every thread once its share of the period is used up, so a step
with more threads than that waits for the ones that were stopped.

Source: sched_getaffinity(2); Linux, "Control Group v2", cpu.max.
"""

import os
from pathlib import Path

from engine.memory import CGROUP, PROC, control_groups


def usable_cores(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Whole cores, at least one."""
    allowed = [len(os.sched_getaffinity(0))]
    for group in control_groups(proc, cgroup):
        try:
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and int(period):
            allowed.append(int(quota) // int(period))
    return max(1, min(allowed))
