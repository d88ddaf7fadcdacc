"""`python -m kernels.bench --device cuda`: every family's cases of published models beside the device's ceilings.

A case's ceiling is the longer of moving its bytes as fast as a large copy does in this run, and of computing its
products as fast as the vendor's library multiplies large square matrices. The last line is a JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.bench.device import Ceilings, ceilings, graph_seconds, take_device
from kernels.bench.starts import starts_of
from kernels.packed import Packed
from kernels.triton.case import MODEL, Case, Draw
from kernels.triton.families import FAMILIES
from kernels.triton.launch import Unsupported

_RATIO_ROWS = (1, 16, 64, 256)
_RATIO_SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336))


class DeviceDraw(Draw):
    """Random tensors made on the device itself: those of the cases, but for the numbers."""

    def _place(
        self, make: Callable[[torch.Generator], Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        with torch.device(self.device):
            made = make(torch.Generator(self.device).manual_seed(self.seed + sum(shape)))
        return made.to(dtype)


def run(only: str) -> int:
    """Measure and print.

    Args:
        only: of families whose name holds this; "": all.

    Raises:
        NoDeviceError: there is no CUDA device.
    """
    name, most = take_device(), ceilings()
    print(
        f"{name}; copy {most.memory / 1e9:,.0f} GB/s; products bfloat16 {most.bfloat16 / 1e12:,.0f}, int8 "
        f"{most.int8 / 1e12:,.0f}, float8 {most.float8 / 1e12:,.0f}, float32 {most.float32 / 1e12:,.0f} TFLOP/s"
    )
    print(f"{'':<76} {'us':>10} {'GB/s':>8} {'TFLOP/s':>8} {'ceiling':>8}")
    rows = []
    for family, case in model_cases(only):
        rows.append(_row(family, case, most))
        print(_line(rows[-1]), flush=True)
    ratios = list(_ratios()) if not only or only in "linear_int4" else []
    for ratio in ratios:
        print(
            f"W4A16 {ratio['out']} x {ratio['in']}, {ratio['rows']} rows: {ratio['int4'] * 1e6:.1f} us, cuBLAS "
            f"bfloat16 {ratio['bfloat16'] * 1e6:.1f} us: {ratio['bfloat16'] / ratio['int4']:.2f} times as fast"
        )
    print(json.dumps({"device": name, "ceilings": asdict(most), "cases": rows, "w4a16": ratios}))
    return 0


def model_cases(only: str) -> Iterator[tuple[str, Case]]:
    """Of every family whose name holds `only`, with its name; each is made when it is asked for."""
    for family in FAMILIES:
        name = family.__name__.rpartition(".")[2]
        if only in name:
            yield from ((name, case) for case in family.cases(DeviceDraw("cuda"), MODEL))


def _row(family: str, case: Case, most: Ceilings) -> dict[str, Any]:
    try:
        seconds = graph_seconds(starts_of(case.run))
    except Unsupported as refused:
        return {"family": family, "name": case.name, "refused": str(refused)}
    return {
        "family": family,
        "name": case.name,
        "seconds": seconds,
        "bytes_per_second": case.nbytes / seconds,
        "operations_per_second": case.flops / seconds,
        "ceiling": most.seconds(case.nbytes, case.flops, case.arithmetic) / seconds,
    }


def _line(row: dict[str, Any]) -> str:
    title = f"{row['family']}: {row['name']}"
    if "refused" in row:
        return f"{title:<76} refused: {row['refused']}"
    return (
        f"{title:<76} {row['seconds'] * 1e6:>10,.1f} {row['bytes_per_second'] / 1e9:>8,.0f} "
        f"{row['operations_per_second'] / 1e12:>8,.1f} {row['ceiling']:>8.0%}"
    )


def _ratios() -> Iterator[dict[str, Any]]:
    """Products with four-bit matrices, and the library's with the same matrix in bfloat16."""
    from kernels.triton.linear import linear, scratch_bytes
    from kernels.triton.weights import prepare_linear

    draw = DeviceDraw("cuda")
    for out, inner in _RATIO_SHAPES:
        scales = draw.uniform(0.01, 0.02, out, inner // 128)
        codes = Packed(draw.integers(-8, 8, out, inner), scales, 1, 128, 4)
        weight, wide = prepare_linear([codes], [], torch.bfloat16, "cuda"), draw.normal(out, inner)
        for rows in _RATIO_ROWS:
            x, y = draw.normal(rows, inner), draw.normal(rows, out)
            scratch = torch.empty(scratch_bytes(weight, rows, x.element_size()), dtype=torch.uint8, device="cuda")
            ours = graph_seconds(starts_of(partial(linear, x, weight, y, scratch)))
            theirs = graph_seconds(starts_of(partial(torch.mm, x, wide.t(), out=y)))
            yield {"out": out, "in": inner, "rows": rows, "int4": ours, "bfloat16": theirs}
