"""`python -m kernels.bench --device cuda --tune`: configurations tried on this device, and the table they make.

For each kernel and bucket that a family's cases ask for, what is listed in CHOICES is tried, one constant after
the other with the best of those before, until nothing is faster. The best are written to
`kernels/configs/DEVICE.json`, which the tests under `tests/gpu` then prove.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from triton.runtime.errors import OutOfResources

import kernels.configs
from kernels.bench.cuda import model_cases
from kernels.bench.device import graph_seconds, take_device
from kernels.bench.starts import starts_of
from kernels.triton import configs
from kernels.triton.case import Case
from kernels.triton.configs import Config, config, device_key, trying
from kernels.triton.launch import Unsupported

_FLAT = {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)}
_ROW = {"num_warps": (2, 4, 8, 16)}
_PRODUCT = {"BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}
_WORDS = {"BLOCK_N": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4)}
_ATTENTION = {"BLOCK_N": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4)}
_WIDTHS = [f"{width}{kind}" for width in (64, 128, 256, 512) for kind in ("", "_codes")]
CHOICES: Mapping[str, Mapping[str, Sequence[int]]] = {
    "add": _FLAT,
    "finish": _FLAT,
    "gated": _FLAT,
    "gather": _FLAT,
    "combine": _FLAT,
    "rms_norm": _ROW,
    "gated_codes": _ROW,
    "rope_and_write": _ROW,
    "route": {"BLOCK_T": (1, 2, 4, 8), "num_warps": (1, 2, 4)},
    "experts": {"BLOCK_M": (16, 32, 64, 128)},
    "experts_plain": _PRODUCT,
    "experts_int8": _PRODUCT,
    "experts_float8": _PRODUCT,
    "experts_int4": _WORDS,
    "int4_few": _WORDS,
    "int4_many": _WORDS,
    "lora": {"BLOCK_M": (16, 32, 64)},
    "lora_shrink": {
        "BLOCK_R": (16, 32, 64),
        "BLOCK_K": (64, 128, 256),
        "num_warps": (2, 4),
        "num_stages": (2, 3, 4),
    },
    "lora_expand": {"BLOCK_N": (64, 128, 256), "num_warps": (4, 8), "num_stages": (1, 2)},
    **{f"decode_attention_{of}": _ATTENTION for of in _WIDTHS},
    **{f"prefill_attention_{of}": _ATTENTION | {"BLOCK_M": (64, 128)} for of in _WIDTHS},
}
"""What is tried of each kernel; of others warps and stages alone."""

_OTHERS = {"num_warps": (2, 4, 8), "num_stages": (1, 2, 3, 4)}

Bucket = tuple[str, int]


def tune(only: str) -> int:
    """Try, write the table, and print what was gained.

    Args:
        only: of families whose name holds this; "": all.

    Raises:
        NoDeviceError: there is no CUDA device.
    """
    name = take_device()
    best: dict[Bucket, Config] = {}
    by_family: dict[str, list[Case]] = {}
    for family, case in model_cases(only):
        by_family.setdefault(family, []).append(case)
    for cases in by_family.values():
        for bucket, asking in _asking(cases).items():
            found, before, after = best_of(bucket, asking)
            best[bucket] = found
            print(
                f"{bucket[0]:<28} {bucket[1]:>8} {before * 1e6:>10.1f} {after * 1e6:>10.1f} us  {found}",
                flush=True,
            )
    path = Path(str(kernels.configs.__file__)).with_name(f"{device_key(name)}.json")
    write(path, name, best)
    print(json.dumps({"device": name, "table": str(path), "tuned": len(best)}))
    return 0


def _asking(cases: Iterable[Case]) -> dict[Bucket, list[Case]]:
    """The cases that ask for each kernel and bucket."""
    found: dict[Bucket, list[Case]] = {}
    for case in cases:
        with trying({}) as asked:
            try:
                case.run()
            except Unsupported:
                continue
        for bucket in asked:
            found.setdefault(bucket, []).append(case)
    return dict(sorted(found.items()))


def best_of(bucket: Bucket, cases: Sequence[Case]) -> tuple[Config, float, float]:
    """The fastest configuration, and the seconds of all cases together before and with it."""
    best = config(*bucket)
    before = least = _seconds(bucket, best, cases)
    choices = {name: some for name, some in CHOICES.get(bucket[0], _OTHERS).items() if name in best}
    was: Config = {}
    while was != best:
        was = dict(best)
        for name, some in choices.items():
            for choice in some:
                tried = best | {name: choice}
                if tried != best and (seconds := _seconds(bucket, tried, cases)) < 0.98 * least:
                    best, least = tried, seconds
    return best, before, least


def _seconds(bucket: Bucket, tried: Config, cases: Sequence[Case]) -> float:
    """Of all cases together; infinite where it does not fit."""
    with trying({bucket: tried}):
        try:
            return sum(graph_seconds(starts_of(case.run)) for case in cases)
        except (OutOfResources, RuntimeError, ValueError):
            return math.inf


def write(path: Path, name: str, best: Mapping[Bucket, Config]) -> None:
    """Put configurations into the table at `path`, which may be there; other kernels and buckets stay."""
    table = json.loads(path.read_text()) if path.exists() else {}
    default = configs.table(configs.DEFAULT)
    table["_note"] = (
        f"measured on {name}, {datetime.now(UTC):%Y-%m-%d}: python -m kernels.bench --device cuda --tune"
    )
    for (kernel, bucket), found in best.items():
        table[kernel] = table.get(kernel, default[kernel]) | {str(bucket): found}
    lines = (f"  {json.dumps(kernel)}: {json.dumps(table[kernel])}" for kernel in sorted(table))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
