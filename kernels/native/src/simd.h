// Sixteen numbers at once on any instruction set: the few vector operations that the kernels are written in.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace CL_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PARTS = 16 / LANES;

typedef float FloatV __attribute__((vector_size(4 * LANES)));
typedef int32_t IntV __attribute__((vector_size(4 * LANES)));

// Products and sums are never contracted (-ffp-contract=off): only fma() fuses, so that every copy of a loop,
// whatever it was unrolled for, rounds alike.
struct F16 {
  FloatV part[PARTS];
};
struct I16 {
  IntV part[PARTS];
};

#define CL_EACH for (int i = 0; i < PARTS; ++i)

inline F16 load(const float *p) {
  F16 x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline I16 load(const int32_t *p) {
  I16 x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float *p, F16 x) { memcpy(p, &x, sizeof x); }
inline void store(int32_t *p, I16 x) { memcpy(p, &x, sizeof x); }
inline F16 broadcast(float x) {
  F16 r;
  CL_EACH r.part[i] = x - FloatV{};  // of zero and x, a sum would have to be added up: -0 + 0 is 0
  return r;
}
inline I16 broadcast(int32_t x) {
  I16 r;
  CL_EACH r.part[i] = IntV{} + x;
  return r;
}
inline F16 operator+(F16 a, F16 b) {
  CL_EACH a.part[i] += b.part[i];
  return a;
}
inline F16 operator-(F16 a, F16 b) {
  CL_EACH a.part[i] -= b.part[i];
  return a;
}
inline F16 operator*(F16 a, F16 b) {
  CL_EACH a.part[i] *= b.part[i];
  return a;
}
inline F16 operator/(F16 a, F16 b) {
  CL_EACH a.part[i] /= b.part[i];
  return a;
}
inline I16 operator+(I16 a, I16 b) {
  CL_EACH a.part[i] += b.part[i];
  return a;
}
inline I16 operator-(I16 a, I16 b) {
  CL_EACH a.part[i] -= b.part[i];
  return a;
}

// a * b + c, rounded once where the instruction set can, else twice; the same everywhere within one.
inline F16 fma(F16 a, F16 b, F16 c) {
#if defined(__AVX512F__)
  CL_EACH c.part[i] = (FloatV)_mm512_fmadd_ps((__m512)a.part[i], (__m512)b.part[i], (__m512)c.part[i]);
#elif defined(__FMA__)
  CL_EACH c.part[i] = (FloatV)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
#else
  CL_EACH c.part[i] = a.part[i] * b.part[i] + c.part[i];
#endif
  return c;
}

inline F16 max(F16 a, F16 b) {
  CL_EACH a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return a;
}
inline F16 min(F16 a, F16 b) {
  CL_EACH a.part[i] = a.part[i] < b.part[i] ? a.part[i] : b.part[i];
  return a;
}
inline F16 to_float(I16 x) {
  F16 r;
  CL_EACH r.part[i] = __builtin_convertvector(x.part[i], FloatV);
  return r;
}

inline I16 operator&(I16 a, I16 b) {
  CL_EACH a.part[i] &= b.part[i];
  return a;
}
inline I16 operator<<(I16 a, int n) {
  CL_EACH a.part[i] <<= n;
  return a;
}
inline I16 operator>>(I16 a, int n) {  // keeps the sign
  CL_EACH a.part[i] >>= n;
  return a;
}
inline I16 load_int16(const int16_t *p) {
  typedef int16_t HalfV __attribute__((vector_size(2 * LANES)));
  I16 r;
  CL_EACH {
    HalfV half;
    memcpy(&half, p + i * LANES, sizeof half);
    r.part[i] = __builtin_convertvector(half, IntV);
  }
  return r;
}
inline I16 load_int8(const int8_t *p) {
  typedef int8_t ByteV __attribute__((vector_size(LANES)));
  I16 r;
  CL_EACH {
    ByteV bytes;
    memcpy(&bytes, p + i * LANES, sizeof bytes);
    r.part[i] = __builtin_convertvector(bytes, IntV);
  }
  return r;
}
inline I16 lanes() {
  I16 r;
  for (int i = 0; i < 16; ++i) r.part[i / LANES][i % LANES] = i;
  return r;
}

// The bits of numbers, and back.
inline I16 bits(F16 x) {
  I16 r;
  CL_EACH r.part[i] = (IntV)x.part[i];
  return r;
}
inline F16 numbers(I16 x) {
  F16 r;
  CL_EACH r.part[i] = (FloatV)x.part[i];
  return r;
}

// a where low <= lane < high, else b.
inline F16 select(int low, int high, F16 a, F16 b) {
  const I16 at = lanes();
  CL_EACH {
    const IntV inside = (at.part[i] >= low) & (at.part[i] < high);
    a.part[i] = inside ? a.part[i] : b.part[i];
  }
  return a;
}
// a where x < y, else b.
inline F16 select_less(F16 x, F16 y, F16 a, F16 b) {
  CL_EACH a.part[i] = x.part[i] < y.part[i] ? a.part[i] : b.part[i];
  return a;
}

// a where x == y, else b.
inline F16 select_equal(F16 x, F16 y, F16 a, F16 b) {
  CL_EACH a.part[i] = x.part[i] == y.part[i] ? a.part[i] : b.part[i];
  return a;
}

// Four numbers of which the first is what the sixteen come to, two by two: halves, quarters, pairs; always this
// tree.
typedef float FourV __attribute__((vector_size(16)));
#if defined(__AVX512F__)
typedef float EightV __attribute__((vector_size(32)));
inline EightV low_half(FloatV x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
inline EightV high_half(FloatV x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }
#elif defined(__AVX2__)
typedef FloatV EightV;
#endif
#if defined(__AVX2__)
inline FourV low_half(EightV x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3); }
inline FourV high_half(EightV x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7); }
#endif
template <typename Join>
inline FourV joined(F16 x, Join join) {
#if defined(__AVX512F__)
  const EightV eight = join(low_half(x.part[0]), high_half(x.part[0]));
  const FourV four = join(low_half(eight), high_half(eight));
#elif defined(__AVX2__)
  const EightV eight = join(x.part[0], x.part[1]);
  const FourV four = join(low_half(eight), high_half(eight));
#else
  const FourV four = join(join(x.part[0], x.part[2]), join(x.part[1], x.part[3]));
#endif
  const FourV two = join(four, __builtin_shufflevector(four, four, 2, 3, 2, 3));
  return join(two, __builtin_shufflevector(two, two, 1, 1, 1, 1));
}
inline float sum(F16 x) {
  return joined(x, [](auto a, auto b) { return a + b; })[0];
}
inline int32_t sum(I16 x) {
  const FourV all = joined(numbers(x), [](auto a, auto b) {
    typedef int32_t Whole __attribute__((vector_size(sizeof(a))));
    return (decltype(a))((Whole)a + (Whole)b);
  });
  int32_t r;
  memcpy(&r, &all, sizeof r);
  return r;
}
inline float highest(F16 x) {
  return joined(x, [](auto a, auto b) { return a > b ? a : b; })[0];
}

// The first n of sixteen numbers (or all, where there are more), zeros behind them; and only these stored.
inline F16 load_some(const float *p, int64_t n) {
  if (n >= 16) return load(p);
  float v[16] = {};
  memcpy(v, p, sizeof(float) * n);
  return load(v);
}
inline void store_some(float *p, F16 x, int64_t n) {
  if (n >= 16) return store(p, x);
  memcpy(p, &x, sizeof(float) * n);
}

inline float from_bf16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float r;
  memcpy(&r, &bits, sizeof r);
  return r;
}
// To the nearest, ties to even (not for NaN with a payload in the low bits only, which stays a NaN).
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Sixteen bfloat16 numbers to float32, and float32 ones rounded to bfloat16 as `to_bf16` does (but numbers below
// the smallest normal one become zeros where the instruction set has it so).
inline F16 load_bf16(const uint16_t *p) {
  typedef uint16_t HalfV __attribute__((vector_size(2 * LANES)));
  F16 r;
  CL_EACH {
    HalfV half;
    memcpy(&half, p + i * LANES, sizeof half);
    r.part[i] = (FloatV)(__builtin_convertvector(half, IntV) << 16);
  }
  return r;
}
inline void store_bf16(uint16_t *p, F16 x) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x.part[0]);
  memcpy(p, &half, sizeof half);
#else
  typedef uint16_t HalfV __attribute__((vector_size(2 * LANES)));
  typedef uint32_t WordV __attribute__((vector_size(4 * LANES)));
  CL_EACH {
    const WordV word = (WordV)x.part[i];
    const WordV even = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    const WordV kept = x.part[i] == x.part[i] ? even : (word >> 16 | 0x40);
    const HalfV half = __builtin_convertvector(kept, HalfV);
    memcpy(p + i * LANES, &half, sizeof half);
  }
#endif
}

}  // namespace
}  // namespace CL_ISA
