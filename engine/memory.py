"""How much memory this process may still take: the one answer that sizes KV pages and that operators are shown.

It is what the kernel calls available, or less where a control group allows less; file cache that can be dropped
counts as free in both.

Source: proc_meminfo(5), MemAvailable; proc_pid_status(5), RssAnon; cgroups(7), version 2: memory.max,
memory.current, memory.stat.
"""

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def available_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Bytes that can be taken without swapping and without breaking the limit of any control group above."""
    available = _fields(proc / "meminfo")["MemAvailable"] * 1024
    for group in control_groups(proc, cgroup):
        available = min(available, _left_in(group, available))
    return max(0, available)


def total_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Physical memory, or less where a control group above allows less."""
    limits = (_limit(group) for group in control_groups(proc, cgroup))
    physical = _fields(proc / "meminfo")["MemTotal"] * 1024
    return min([physical, *(limit for limit in limits if limit is not None)])


def own_bytes(pid: str = "self", proc: Path = PROC) -> int:
    """Memory that a process holds and no file backs: RssAnon of proc_pid_status(5); 0 when the process is gone."""
    try:
        return _fields(proc / pid / "status").get("RssAnon", 0) * 1024
    except OSError:
        return 0


def control_groups(proc: Path, cgroup: Path) -> Iterator[Path]:
    """This process's control group of version 2 and all above it; the root alone where there is no version 2."""
    membership = proc / "self" / "cgroup"
    lines = membership.read_text(encoding="utf-8").splitlines() if membership.exists() else []
    group = cgroup / next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    for place in (group, *group.parents):
        if place == cgroup.parent:
            return
        yield place


def _limit(group: Path) -> int | None:
    """What a group may hold; None where it has no limit."""
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(limit) if limit.isdigit() else None


def _left_in(group: Path, otherwise: int) -> int:
    """What the group's limit leaves; `otherwise` where it has none."""
    limit = _limit(group)
    try:
        current = int((group / "memory.current").read_text(encoding="ascii"))
        fields = _fields(group / "memory.stat")
    except OSError:
        return otherwise
    droppable = sum(fields.get(name, 0) for name in ("active_file", "inactive_file", "slab_reclaimable"))
    return otherwise if limit is None else limit - current + droppable


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number, with or without a colon and a unit."""
    text = path.read_text(encoding="ascii", errors="replace")
    lines = (line.replace(":", " ").split() for line in text.splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
