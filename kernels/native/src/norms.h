// The root mean square of a row, and its norm.
#pragma once

#include "simd.h"

namespace CL_ISA {
namespace {

// 1 / sqrt(mean(x^2) + eps). Squares are added in four vectors of sixteen, by their place in the row.
inline float inverse_root(const float *x, int64_t count, float eps) {
  F16 sums[4] = {};
  for (int64_t i = 0; i < count; i += 16) {
    const F16 some = load_some(x + i, count - i);
    sums[i / 16 % 4] = fma(some, some, sums[i / 16 % 4]);
  }
  const float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return 1.0f / __builtin_sqrtf(total / (float)count + eps);
}

// out = x * factor * weight; out may be x.
inline void scale_by(const float *x, float factor, const float *weight, int64_t count, float *out) {
  for (int64_t i = 0; i < count; i += 16) {
    const F16 some = load_some(x + i, count - i) * broadcast(factor);
    store_some(out + i, some * load_some(weight + i, count - i), count - i);
  }
}

}  // namespace
}  // namespace CL_ISA
