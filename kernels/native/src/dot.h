// Sums of products of small integers and of bfloat16 numbers in sixteen outputs at once, on any instruction set.
#pragma once

#include "simd.h"

namespace CL_ISA {
namespace {

// Codes and bfloat16 numbers travel in I16: four bytes, or two numbers, of each output.
inline I16 load_bytes(const void *p) { return load(static_cast<const int32_t *>(p)); }

inline I16 low_nibbles(I16 x) {
  CL_EACH x.part[i] &= 0x0f0f0f0f;
  return x;
}
inline I16 high_nibbles(I16 x) {
  CL_EACH x.part[i] = x.part[i] >> 4 & 0x0f0f0f0f;
  return x;
}

// What dot4<true> takes off each unsigned code: without VNNI a product of bytes needs small ones.
#if !defined(__AVX512VNNI__) && !defined(__AVXVNNI__) && defined(__AVX2__)
constexpr int32_t CENTRE = 128;
#else
constexpr int32_t CENTRE = 0;
#endif

// sum + codes * x: four unsigned codes (of less than 5 bits unless WIDE) by four signed ones (not -128), exactly.
template <bool WIDE>
inline I16 dot4(I16 sum, I16 codes, I16 x) {
#if defined(__AVX512VNNI__)
  CL_EACH sum.part[i] =
      (IntV)_mm512_dpbusd_epi32((__m512i)sum.part[i], (__m512i)codes.part[i], (__m512i)x.part[i]);
#elif defined(__AVXVNNI__)
  CL_EACH sum.part[i] =
      (IntV)_mm256_dpbusd_avx_epi32((__m256i)sum.part[i], (__m256i)codes.part[i], (__m256i)x.part[i]);
#elif defined(__AVX2__)
  for (int i = 0; i < PARTS; ++i) {
    __m256i c = (__m256i)codes.part[i], by = (__m256i)x.part[i];
    if (WIDE) {  // |c| * (x with c's sign): two products of at most 128 * 127 do not saturate
      c = _mm256_xor_si256(c, _mm256_set1_epi8(-128));
      by = _mm256_sign_epi8(by, c);
      c = _mm256_abs_epi8(c);
    }
    const __m256i four = _mm256_madd_epi16(_mm256_maddubs_epi16(c, by), _mm256_set1_epi16(1));
    sum.part[i] += (IntV)four;
  }
#else
  uint8_t c[64];
  int8_t by[64];
  int32_t total[16];
  memcpy(c, &codes, 64), memcpy(by, &x, 64), memcpy(total, &sum, 64);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) total[i] += (int32_t)c[4 * i + j] * by[4 * i + j];
  memcpy(&sum, total, 64);
#endif
  return sum;
}

// sum + a * b: two bfloat16 numbers by two.
inline F16 dot2(F16 sum, I16 a, I16 b) {
#if defined(__AVX512BF16__)
  CL_EACH sum.part[i] = (FloatV)_mm512_dpbf16_ps((__m512)sum.part[i], (__m512bh)a.part[i], (__m512bh)b.part[i]);
  return sum;
#else
  F16 low[2], high[2];
  for (int i = 0; i < PARTS; ++i) {
    low[0].part[i] = (FloatV)(a.part[i] << 16), low[1].part[i] = (FloatV)(b.part[i] << 16);
    high[0].part[i] = (FloatV)(a.part[i] & -65536), high[1].part[i] = (FloatV)(b.part[i] & -65536);
  }
  return fma(high[0], high[1], fma(low[0], low[1], sum));
#endif
}

inline float from_half(uint16_t x) {  // not infinity, not NaN
  const uint32_t bits = (uint32_t)(x & 0x7fff) << 13;
  float r;
  memcpy(&r, &bits, sizeof r);
  r *= 0x1p112f;
  return x >> 15 ? -r : r;
}

inline F16 load_half(const uint16_t *p) {
  F16 r;
#if defined(__AVX512F__)
  r.part[0] = (FloatV)_mm512_maskz_cvtph_ps((__mmask16)-1, _mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
  CL_EACH r.part[i] = (FloatV)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + i * LANES)));
#else
  float v[16];
  for (int i = 0; i < 16; ++i) v[i] = from_half(p[i]);
  r = load(v);
#endif
  return r;
}

}  // namespace
}  // namespace CL_ISA
