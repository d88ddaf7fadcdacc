// How a row of activations is written in the forms that its readers need: bfloat16, and int8 with scales.
#pragma once

#include "cloister_kernels.h"
#include "simd.h"

namespace CL_ISA {
namespace {

inline int64_t padded(int64_t width) { return (width + CL_STRIDE - 1) / CL_STRIDE * CL_STRIDE; }
// Scales and sums of a row in int8.
inline int64_t scales_of(const ClRows &rows) {
  return rows.group ? (rows.width + rows.group - 1) / rows.group : 1;
}
inline int64_t sums_of(const ClRows &rows) { return rows.group ? (rows.width + CL_GROUP - 1) / CL_GROUP : 1; }

// codes = round(x / scale), scale = max|x| / 127, of one group; padded with zeros to `room` codes; sums: of each
// `summed` codes. Where a number is not finite, codes are 0 and the scale is NaN.
inline void quantise(const float *x, int64_t count, int64_t room, int8_t *codes, float *scale, int32_t *sums,
                     int64_t summed) {
  typedef int8_t ByteV __attribute__((vector_size(LANES)));
  F16 most = broadcast(0.0f), faults = most;
  for (int64_t i = 0; i < count; i += 16) {
    const F16 some = load_some(x + i, count - i);
    most = max(most, max(some, broadcast(0.0f) - some));
    faults = faults + some * broadcast(0.0f);
  }
  const float highest_size = highest(most), fault = CL_ISA::sum(faults);
  const float inverse = fault == 0 && highest_size > 0x1p-120f ? 127.0f / highest_size : 0.0f;
  // Added to a number below 2^22, it leaves the nearest whole number in the low bits.
  const F16 shift = broadcast(12582912.0f);
  I16 total = broadcast(0);
  int64_t left = summed;
  for (int64_t i = 0; i < count; i += 16) {
    const F16 some = inverse > 0 ? load_some(x + i, count - i) : broadcast(0.0f);
    const I16 whole = bits(some * broadcast(inverse) + shift) - bits(shift);
    total = total + whole;
    if ((left -= 16) <= 0 || i + 16 >= count) {
      *sums++ = CL_ISA::sum(total);
      total = broadcast(0), left = summed;
    }
    int8_t bytes[16];
    for (int part = 0; part < PARTS; ++part) {
      const ByteV narrow = __builtin_convertvector(whole.part[part], ByteV);
      memcpy(bytes + part * LANES, &narrow, sizeof narrow);
    }
    if (count - i >= 16)
      memcpy(codes + i, bytes, 16);
    else
      memcpy(codes + i, bytes, count - i);
  }
  if (room > count) memset(codes + count, 0, room - count);
  *scale = highest_size / 127.0f + fault;
}

// x rounded to bfloat16, padded with zeros to `room` numbers.
inline void round_row(const float *x, int64_t count, int64_t room, uint16_t *out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store_bf16(out + i, load(x + i));
  uint16_t last[16];
  store_bf16(last, load_some(x + i, count - i));
  memcpy(out + i, last, sizeof(uint16_t) * (count - i));
  memset(out + count, 0, sizeof(uint16_t) * (room - count));
}

// Writes row `at` of `rows`, whose float32 numbers are `x` (which may be where rows.f32 has them already).
inline void write_row(const ClRows &rows, int64_t at, const float *x) {
  const int64_t width = rows.width, stride = padded(width);
  if (rows.f32 && rows.f32 + at * width != x) memcpy(rows.f32 + at * width, x, sizeof(float) * width);
  if (rows.bf16) round_row(x, width, stride, rows.bf16 + at * stride);
  if (!rows.int8) return;
  const int64_t count = scales_of(rows), group = rows.group ? rows.group : width;
  int32_t *sums = rows.sums + at * sums_of(rows);
  for (int64_t g = 0; g < count; ++g, sums += CL_SCALED / CL_GROUP) {
    const int64_t first = g * group, left = width - first;
    const int64_t room = g + 1 < count ? group : stride - first;
    quantise(x + first, left < group ? left : group, room, rows.int8 + at * stride + first,
             rows.scales + at * count + g, sums, rows.group ? CL_GROUP : width);
  }
}

}  // namespace
}  // namespace CL_ISA
