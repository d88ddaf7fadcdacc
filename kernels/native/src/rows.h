// How a row of activations is written in the forms that its readers need: bfloat16, and int8 with scales.
#pragma once

#include "cloister_kernels.h"
#include "simd.h"

namespace CL_ISA {
namespace {

inline int64_t padded(int64_t width) { return (width + CL_STRIDE - 1) / CL_STRIDE * CL_STRIDE; }
inline int64_t groups(const ClRows &rows) { return (rows.width + rows.group - 1) / rows.group; }

// codes = round(x / scale), scale = max|x| / 127, of one group; padded with zeros to `room` codes.
inline void quantise(const float *x, int64_t count, int64_t room, int8_t *codes, float *scale, int32_t *sum) {
  float most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float size = __builtin_fabsf(x[i]);
    most = size > most ? size : most;
  }
  const float inverse = most > 0 ? 127.0f / most : 0.0f;
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t code = (int32_t)__builtin_rintf(x[i] * inverse);
    codes[i] = (int8_t)code;
    total += code;
  }
  for (int64_t i = count; i < room; ++i) codes[i] = 0;
  *scale = most / 127.0f;
  *sum = total;
}

// Writes row `at` of `rows`, whose float32 numbers are `x` (which may be where rows.f32 has them already).
inline void write_row(const ClRows &rows, int64_t at, const float *x) {
  const int64_t width = rows.width, stride = padded(width);
  if (rows.f32 && rows.f32 + at * width != x) memcpy(rows.f32 + at * width, x, sizeof(float) * width);
  if (rows.bf16) {
    uint16_t *out = rows.bf16 + at * stride;
    for (int64_t i = 0; i < width; ++i) out[i] = to_bf16(x[i]);
    for (int64_t i = width; i < stride; ++i) out[i] = 0;
  }
  if (!rows.int8) return;
  const int64_t count = groups(rows);
  for (int64_t g = 0; g < count; ++g) {
    const int64_t first = g * rows.group, left = width - first;
    const int64_t room = g + 1 < count ? rows.group : stride - first;
    quantise(x + first, left < rows.group ? left : rows.group, room, rows.int8 + at * stride + first,
             rows.scales + at * count + g, rows.sums + at * count + g);
  }
}

}  // namespace
}  // namespace CL_ISA
