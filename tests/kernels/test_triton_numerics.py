"""Every kernel in Triton against float64: as exact as the format of its output, at every edge size."""

import pytest

from tests.kernels.proofs import DEVICE, all_cases, check


@pytest.mark.parametrize("name", all_cases("meta"))
def test_a_kernel_is_as_exact_as_its_output_can_be(name: str) -> None:
    check(all_cases(DEVICE)[name])
