// act(gate) * up of one row, for each of kernels.ops.ACTIVATIONS.
//
// Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; Shazeer, "GLU Variants Improve Transformer",
// 2020; the gpt-oss model card, 2025 (clamped SwiGLU).
#pragma once

#include "functions.h"

namespace CL_ISA {
namespace {

enum Activation { SILU, GELU, GELU_TANH, CLAMPED_SWIGLU };  // as in kernels.ops.ACTIVATIONS

inline F16 swish(F16 x, float steep) { return x / (broadcast(1.0f) + exp(x * broadcast(-steep))); }

template <int activation>
inline F16 gate(F16 gate, F16 up) {
  if (activation == SILU) return swish(gate, 1) * up;
  if (activation == GELU) return gate * normal_share(gate) * up;
  if (activation == GELU_TANH) {
    const F16 inner = fma(gate * gate * gate, broadcast(0.044715f), gate) * broadcast(0.797884561f);
    return gate * broadcast(0.5f) * (broadcast(1.0f) + tanh(inner)) * up;
  }
  const F16 bounded = min(broadcast(7.0f), gate);
  return swish(bounded, 1.702f) * (max(broadcast(-7.0f), min(broadcast(7.0f), up)) + broadcast(1.0f));
}

template <int activation>
inline void gate_with(const float *x, int64_t width, float *out) {
  for (int64_t i = 0; i < width; i += 16) {
    const int64_t left = width - i;
    store_some(out + i, gate<activation>(load_some(x + i, left), load_some(x + width + i, left)), left);
  }
}

// out [width] of x [2 * width], gate first.
inline void gate_row(int64_t activation, const float *x, int64_t width, float *out) {
  if (activation == SILU) gate_with<SILU>(x, width, out);
  if (activation == GELU) gate_with<GELU>(x, width, out);
  if (activation == GELU_TANH) gate_with<GELU_TANH>(x, width, out);
  if (activation == CLAMPED_SWIGLU) gate_with<CLAMPED_SWIGLU>(x, width, out);
}

}  // namespace
}  // namespace CL_ISA
