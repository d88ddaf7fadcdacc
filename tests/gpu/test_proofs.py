"""Every kernel on the device against float64: at every edge, and with the sizes and tiles of published models."""

from types import ModuleType

import pytest
import torch

from kernels.bench.cuda import DeviceDraw
from kernels.bench.device import take_device
from kernels.triton.case import MODEL, PROOF, Draw
from kernels.triton.families import FAMILIES
from kernels.triton.launch import Unsupported
from tests.kernels.proofs import check, family_name

families = pytest.mark.parametrize("family", FAMILIES, ids=family_name)


@pytest.fixture(autouse=True)
def _table_of_the_device() -> None:
    take_device()


@pytest.mark.timeout(600)  # with what a first start compiles
@families
def test_kernels_are_as_exact_as_their_outputs_can_be_at_every_edge(family: ModuleType) -> None:
    for case in family.cases(Draw("cuda"), PROOF):
        check(case)


@pytest.mark.timeout(600)
@families
def test_kernels_are_as_exact_with_the_sizes_of_models(family: ModuleType) -> None:
    for case in family.cases(DeviceDraw("cuda"), MODEL):
        try:
            check(case)
        except Unsupported:
            continue
        torch.cuda.empty_cache()
