"""Memory and cores: the kernel's figures, or what the tightest control group above still allows."""

import os
from pathlib import Path

import pytest

from engine.cores import usable_cores
from engine.memory import available_bytes, total_bytes

KIB, GIB = 2**10, 2**30


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 33554432 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("3:cpuset:/\n0::/site.slice/worker\n")
    return tmp_path / "proc"


def limit(group: Path, allowed: str, current: int, cache: int = 0) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(allowed + "\n")
    (group / "memory.current").write_text(f"{current}\n")
    (group / "memory.stat").write_text(
        f"anon 5\nactive_file {cache}\ninactive_file {cache}\nslab_reclaimable {cache}\n"
    )


def test_without_control_groups_it_is_what_the_kernel_calls_available(proc: Path, tmp_path: Path) -> None:
    assert available_bytes(proc, tmp_path / "none") == 8 * GIB
    (proc / "self" / "cgroup").unlink()
    assert available_bytes(proc, tmp_path / "none") == 8 * GIB


@pytest.mark.parametrize("place", ["site.slice/worker", "site.slice", ""])
def test_a_control_group_at_any_height_lowers_it(proc: Path, tmp_path: Path, place: str) -> None:
    root = tmp_path / "cgroup"
    limit(root / "site.slice" / "worker", "max", GIB)
    limit(root / place, str(4 * GIB), 3 * GIB, cache=KIB)
    assert available_bytes(proc, root) == GIB + 3 * KIB
    assert total_bytes(proc, root) == 4 * GIB


def test_a_group_without_a_limit_or_with_a_higher_one_changes_nothing(proc: Path, tmp_path: Path) -> None:
    limit(tmp_path / "cgroup", "max", 3 * GIB)
    limit(tmp_path / "cgroup" / "site.slice", str(100 * GIB), 3 * GIB)
    assert available_bytes(proc, tmp_path / "cgroup") == 8 * GIB
    assert total_bytes(proc, tmp_path / "cgroup") == 32 * GIB


def test_a_group_over_its_limit_has_nothing_left(proc: Path, tmp_path: Path) -> None:
    limit(tmp_path / "cgroup", str(GIB), 2 * GIB)
    assert available_bytes(proc, tmp_path / "cgroup") == 0


def test_this_machine_has_some() -> None:
    assert 0 < available_bytes() < 2**50


@pytest.mark.parametrize(("quota", "cores"), [("250000 100000", 2), ("50000 100000", 1), ("max 100000", 64)])
@pytest.mark.parametrize("place", ["site.slice/worker", ""])
def test_a_share_of_the_processor_bounds_the_cores(
    proc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, quota: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    group = tmp_path / "cgroup" / place
    group.mkdir(parents=True)
    (group / "cpu.max").write_text(quota + "\n")
    assert usable_cores(proc, tmp_path / "cgroup") == cores
