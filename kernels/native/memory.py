"""Memory for weights and KV pages that starts on a huge page, and is made of them where the system has some.

A pass over weights touches every page of them: with pages of 4 KiB the translation buffer misses at each, with
pages of 2 MiB hardly ever. They are asked for where a whole one fits, so nothing is held that was not asked for.

Source: Linux, Documentation/admin-guide/mm/transhuge.rst; madvise(2), MADV_HUGEPAGE; proc_pid_smaps(5).
"""

import contextlib
import mmap
from pathlib import Path

import torch

HUGE_PAGE = 2 << 20
_SMAPS = Path("/proc/self/smaps")


def aligned_empty(nbytes: int) -> torch.Tensor:
    """Zeroed memory that starts on a huge page.

    Where the system has no huge pages, or none to give, these are ordinary pages and nothing else differs. Touched
    pages alone are taken from the system.

    Args:
        nbytes: how much, 0 or more.

    Returns: uint8 [nbytes], which `view(dtype)` makes anything of; the memory goes when its last tensor does.

    Raises:
        ValueError: less than nothing asked for.
        OSError: no address space left.
    """
    if nbytes < 0:
        raise ValueError(f"{nbytes} bytes of memory asked for")
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    # Private: what mmap maps by default is shared memory, for which huge pages are another, rarer setting.
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # EINVAL: a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // HUGE_PAGE * HUGE_PAGE)
    return whole[start : start + nbytes]


def huge_share(smaps: Path = _SMAPS) -> float | None:
    """Which part of the memory that huge pages were asked for lies in them, 0 to 1; None where none was touched.

    Counts what all of this process asked for, the allocator's own wishes among it. Reads a line for each mapping:
    for reports, not for a step.
    """
    resident = huge = total = total_huge = 0
    for name, *values in (
        line.split() for line in smaps.read_text(encoding="ascii", errors="replace").splitlines()
    ):
        if name == "Rss:":
            resident = int(values[0])
        elif name == "AnonHugePages:":
            huge = int(values[0])
        elif name == "VmFlags:" and "hg" in values:
            total, total_huge = total + resident, total_huge + huge
    return total_huge / total if total else None
