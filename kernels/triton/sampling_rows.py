"""What the kernels of sampling share: logits of some rows, their order as integers, their weights in float64."""

import triton
import triton.language as tl

HIGHEST = tl.constexpr(1e300)  # no adjustment takes a logit beyond it, so that differences stay finite


@triton.jit
def numbers(logits_ptr, stride, row, at, mask):
    """Logits [ROWS, N] at columns `at` of `row` [ROWS]; -inf where masked, and no negative zero."""
    x = tl.load(logits_ptr + row.to(tl.int64)[:, None] * stride + at, mask=mask, other=float("-inf"))
    if x.dtype == tl.float64:
        x = tl.where(x > HIGHEST, HIGHEST, x)
    return tl.where(x == 0, 0.0, x).to(logits_ptr.dtype.element_ty)


@triton.jit
def as_key(x):
    """Int64 that are ordered as the float32 or float64 numbers are."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        low = x.to(tl.int32, bitcast=True)
        return (low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def weights(x, highest, inverse, floor):
    """exp((x - highest) · inverse) of x [ROWS, N] in float64; 0 below `floor`."""
    weight = tl.exp((x.to(tl.float64) - highest[:, None]) * inverse[:, None])
    return tl.where(weight >= floor[:, None], weight, 0.0)


@triton.jit
def asked(temperature_ptr, top_k_ptr, top_p_ptr, highest_ptr, finite_ptr, row, mask):
    """Which of `row` are drawn, which of these in the order of ranks, 1 / temperature, and the highest logits."""
    temperature = tl.load(temperature_ptr + row, mask=mask, other=0.0)
    highest = tl.load(highest_ptr + row, mask=mask, other=0.0)
    finite = tl.load(finite_ptr + row, mask=mask, other=0) != 0
    drawn = (temperature > 0) & finite & (highest > float("-inf"))
    cut = (tl.load(top_k_ptr + row, mask=mask, other=0) > 0) | (tl.load(top_p_ptr + row, mask=mask, other=1.0) < 1)
    inverse = tl.where(drawn, tl.minimum(1.0 / tl.where(drawn, temperature, 1.0), HIGHEST), 1.0)
    return drawn, drawn & cut, inverse, tl.where(drawn, highest, 0.0)
