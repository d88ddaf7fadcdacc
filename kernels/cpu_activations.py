"""Gated activations of the CPU backend: torch's own, and others whose bits do not depend on a number's place.

torch's silu, sigmoid and gelu give other bits to the numbers left over where a vector loop or a thread's share
ends; its exp, tanh and erf do not.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; Shazeer, "GLU Variants Improve Transformer",
2020; the gpt-oss model card, 2025 (clamped SwiGLU).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom
from torch import Tensor

_LIMIT = 7.0  # of the clamped SwiGLU, and
_STEEP = 1.702  # the factor inside its sigmoid


def activate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up; one of `kernels.ops.ACTIVATIONS`."""
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT)
        return gate * torch.sigmoid(_STEEP * gate) * (up + 1)
    return _FAST[activation](gate) * up


def activate_exactly(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The same in float32, with the same bits for a number wherever it lies."""
    wide, factor = gate.float(), up
    if activation == "clamped_swiglu":
        wide, factor = wide.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT).float() + 1
    return (_EXACT[activation](wide) * factor).to(gate.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_FAST: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh}


def _exact_silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _exact_swish(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(x * -_STEEP))


def _exact_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _exact_gelu_tanh(x: Tensor) -> Tensor:
    inner = (x * x * x * 0.044715 + x) * math.sqrt(2 / math.pi)
    return x * 0.5 * (1 + torch.tanh(inner))


_EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _exact_silu,
    "gelu": _exact_gelu,
    "gelu_tanh": _exact_gelu_tanh,
    "clamped_swiglu": _exact_swish,
}
