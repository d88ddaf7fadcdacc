"""Block sizes and warps of each kernel, from committed tables: by device, by kernel, by the nearest size.

`kernels/configs/DEVICE.json` maps a kernel's name to configurations by bucket; a size takes the smallest bucket
that holds it, or else the largest. A kernel that the device's table lacks is looked up in `default.json`, whose
configurations fit every device from compute capability 8.0 on (99 KiB of shared memory). Nothing is tuned while
requests wait: what is compiled is known beforehand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Any, TypeAlias

DEFAULT = "default"

Config: TypeAlias = dict[str, int]  # constants, num_warps and num_stages

_chosen = DEFAULT
_capability = 90
_place: int | None = None
_tried: dict[tuple[str, int], Config] = {}
_asked: set[tuple[str, int]] = set()


def device_key(name: str) -> str:
    """The name of a device's table: "NVIDIA H200 141GB" -> "nvidia-h200"."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if not re.fullmatch(r"\d+gb|hbm\w*|sxm\d*|pcie|nvl", word))


def select(name: str, capability: int = 90) -> str:
    """Take the table of the device called `name` from now on, or the default; the table that is taken.

    Args:
        name: as its driver tells it.
        capability: 10 times the major compute capability, and the minor one.
    """
    global _chosen, _capability  # noqa: PLW0603  # a process has devices of one kind
    key = device_key(name)
    _chosen = key if files("kernels.configs").joinpath(f"{key}.json").is_file() else DEFAULT
    _capability = capability
    return _chosen


def capability() -> int:
    """Of the selected device: 90 is 9.0."""
    return _capability


@contextmanager
def only(place: int) -> Iterator[None]:
    """Whatever the size, a kernel's configuration is that at this place of its table, or its last."""
    global _place  # noqa: PLW0603  # as above
    _place = place
    try:
        yield
    finally:
        _place = None


@contextmanager
def trying(changed: dict[tuple[str, int], Config]) -> Iterator[set[tuple[str, int]]]:
    """Kernels and buckets named here have these configurations inside; gives all those that are asked for."""
    global _tried, _asked  # noqa: PLW0603  # as above
    _tried, _asked = changed, set()
    try:
        yield _asked
    finally:
        _tried = {}


def config(kernel: str, size: int) -> Config:
    """The configuration of `kernel` for a problem of this size.

    Raises:
        KeyError: no table has the kernel.
    """
    own = table(_chosen)
    buckets = own.get(kernel) or table(DEFAULT)[kernel]
    sizes = sorted(map(int, buckets))
    if _place is None:
        bucket = next((at for at in sizes if at >= size), sizes[-1])
    else:
        bucket = sizes[min(_place, len(sizes) - 1)]
    _asked.add((kernel, bucket))
    return dict(_tried.get((kernel, bucket)) or buckets[str(bucket)])


@cache
def table(key: str) -> dict[str, dict[str, Config]]:
    """A committed table."""
    found: Any = json.loads(files("kernels.configs").joinpath(f"{key}.json").read_text())
    return {kernel: buckets for kernel, buckets in found.items() if not kernel.startswith("_")}


def most_buckets() -> int:
    """Of any kernel in the selected table and the default."""
    return max(len(buckets) for key in (_chosen, DEFAULT) for buckets in table(key).values())
