"""Functions that the kernels compute themselves, and what becomes of rows that hold no numbers."""

import math

import pytest
import torch
import triton
import triton.language as tl

from kernels.triton import gated, norm
from kernels.triton.functions import erf, tanh
from kernels.triton.launch import launch
from tests.kernels.proofs import DEVICE


@triton.jit
def _both(x_ptr, erf_ptr, tanh_ptr, block: tl.constexpr):
    offs = tl.arange(0, block)
    x = tl.load(x_ptr + offs)
    tl.store(erf_ptr + offs, erf(x))
    tl.store(tanh_ptr + offs, tanh(x))


def test_erf_and_tanh_are_within_float32s_last_places_everywhere() -> None:
    ends = torch.tensor([torch.inf, -torch.inf, 0.0, 1e-30, 30.0, -30.0, 0.6, 1.0])
    x = torch.cat([torch.linspace(-6, 6, 16384 - len(ends)), ends]).to(DEVICE)
    found = torch.empty_like(x), torch.empty_like(x)
    launch(_both, (1,), x, *found, block=len(x), num_warps=8)
    for got, exact in zip(found, (torch.erf(x.double()), torch.tanh(x.double())), strict=True):
        assert ((got.double() - exact).abs() <= 4e-7 * exact.abs()).all()


def test_what_is_no_number_stays_none() -> None:
    x = torch.full((16,), math.nan, device=DEVICE)
    found = torch.empty_like(x), torch.empty_like(x)
    launch(_both, (1,), x, *found, block=16, num_warps=4)
    assert all(one.isnan().all() for one in found)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_row_of_codes_that_is_not_finite_has_no_finite_scale(wrong: float) -> None:
    x = torch.ones(2, 64, device=DEVICE)
    x[1, 3] = wrong
    codes, scales = torch.empty(2, 32, dtype=torch.int8, device=DEVICE), torch.empty(2, device=DEVICE)
    gated.gated_codes(x, "silu", codes, scales)
    assert scales.isfinite().tolist() == [True, False]
    codes = torch.empty(2, 64, dtype=torch.int8, device=DEVICE)
    norm.rms_norm(x, torch.ones(64, device=DEVICE), 1e-5, codes, scales)
    assert scales.isfinite().tolist() == [True, False]


def test_a_row_of_zeros_becomes_codes_of_zero() -> None:
    codes, scales = torch.ones(1, 32, dtype=torch.int8, device=DEVICE), torch.ones(1, device=DEVICE)
    gated.gated_codes(torch.zeros(1, 64, device=DEVICE), "silu", codes, scales)
    assert not codes.any()
    assert not scales.any()
