"""What a kernel's case must show on whatever runs it: the interpreter, or a device."""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch

from kernels.triton.case import PROOF, Case, Draw
from kernels.triton.families import FAMILIES

SLACK = 1.5  # an output may lie so many times as far from the exact numbers as rounding alone would put it

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def family_name(family: ModuleType) -> str:
    """Of its file."""
    return family.__name__.rpartition(".")[2]


@cache
def all_cases(device: str, scale: str = PROOF) -> dict[str, Case]:
    """Of every family, by name."""
    found: dict[str, Case] = {}
    for family in FAMILIES:
        for case in family.cases(Draw(device), scale):
            name = f"{family_name(family)}: {case.name}"
            assert name not in found, f"two cases are called {name}"
            found[name] = case
    return found


def check(case: Case) -> None:
    """Each output is as near the exact numbers as its format lets it, or equal where it is of integers."""
    outputs, expected = case.run(), case.expected()
    assert len(outputs) == len(expected)
    for place, (output, (exact, rounded)) in enumerate(zip(outputs, expected, strict=True)):
        output, exact = output.cpu(), exact.cpu()
        assert output.shape == exact.shape, f"output {place} has shape {tuple(output.shape)}"
        if rounded is None:
            assert torch.equal(output, exact.to(output.dtype)), f"output {place} differs"
            continue
        off = torch.linalg.vector_norm(output.double() - exact)
        floor = torch.linalg.vector_norm(rounded.cpu() - exact)
        assert off <= SLACK * floor, f"output {place} is off by {off:.3g}; rounding alone by {floor:.3g}"
