// Products of a few queries with tiles of keys, and of their weights with tiles of values, in registers.
//
// Both are the same: rows of numbers, broadcast one step at a time (a number, or a pair), times vectors of sixteen
// lanes. How a step's numbers are kept and multiplied is a format below.
#pragma once

#include "attention.h"
#include "pages.h"

namespace CL_ISA {
namespace {

#define CL_UNROLL _Pragma("GCC unroll 16")

struct Float32 {  // keys or values in float32
  typedef float Number;
  typedef float Stored;
  typedef F16 Lanes;
  typedef F16 Sum;
  static constexpr int STEP = 1;  // numbers of a step
  static Lanes lanes(const Stored *p) { return load(p); }
  static Sum fuse(Sum sum, const Number *x, Lanes y) { return fma(broadcast(*x), y, sum); }
  static void put(Number *p, F16 x) { store(p, x); }
};

// Pairs of numbers in lanes of 32 bits, against pairs in bfloat16 where they can be multiplied, or in float32.
#if defined(__AVX512BF16__)
struct Pairs {
  typedef uint16_t Number;
  typedef __m512i Lanes;
  typedef F16 Sum;
  static constexpr int STEP = 2;
  static Sum fuse(Sum sum, const Number *x, Lanes y) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    sum.part[0] = (FloatV)_mm512_dpbf16_ps((__m512)sum.part[0], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)y);
    return sum;
  }
  static void put(Number *p, F16 x) { store_bf16(p, x); }
};

struct Bfloat16 : Pairs {  // keys or values in bfloat16
  typedef uint16_t Stored;
  static Lanes lanes(const Stored *p) { return _mm512_loadu_si512(p); }
};

struct Int8Values : Pairs {  // codes, which bfloat16 holds exactly
  typedef int8_t Stored;
  static Lanes lanes(const Stored *p) {
    const __m512 low = (__m512)to_float(load_int8(p)).part[0], high = (__m512)to_float(load_int8(p + 16)).part[0];
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
};
#else
struct Pairs {
  typedef float Number;
  typedef F16 Sum;
  struct Lanes {
    F16 even, odd;
  };
  static constexpr int STEP = 2;
  static Sum fuse(Sum sum, const Number *x, Lanes y) {
    return fma(broadcast(x[1]), y.odd, fma(broadcast(x[0]), y.even, sum));
  }
  static void put(Number *p, F16 x) { store(p, x); }
};

struct Bfloat16 : Pairs {
  typedef uint16_t Stored;
  static Lanes lanes(const Stored *p) {
    I16 both;
    memcpy(&both, p, sizeof both);
    return {numbers(both << 16), numbers(both & broadcast(int32_t(0xffff0000)))};
  }
};

struct Int8Values : Pairs {
  typedef int8_t Stored;
  static Lanes lanes(const Stored *p) {
    const I16 both = load_int16((const int16_t *)p);
    return {to_float((both << 24) >> 24), to_float(both >> 8)};
  }
};
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct Int8Keys {  // codes, against queries in codes of 0 to 255 that stand for themselves less 128
  typedef uint8_t Number;
  typedef int8_t Stored;
  typedef I16 Lanes;
  typedef I16 Sum;
  static constexpr int STEP = 4;
  static Lanes lanes(const Stored *p) { return load((const int32_t *)p); }
  static Sum fuse(Sum sum, const Number *x, Lanes y) {
    int32_t four;
    memcpy(&four, x, sizeof four);
#if defined(__AVX512VNNI__)
    sum.part[0] = (IntV)_mm512_dpbusd_epi32((__m512i)sum.part[0], _mm512_set1_epi32(four), (__m512i)y.part[0]);
#else
    CL_EACH sum.part[i] =
        (IntV)_mm256_dpbusd_avx_epi32((__m256i)sum.part[i], _mm256_set1_epi32(four), (__m256i)y.part[i]);
#endif
    return sum;
  }
};
#else
struct Int8Keys {
  typedef float Number;
  typedef int8_t Stored;
  typedef I16 Lanes;
  typedef F16 Sum;
  static constexpr int STEP = 4;
  static Lanes lanes(const Stored *p) { return load((const int32_t *)p); }
  static Sum fuse(Sum sum, const Number *x, Lanes y) {
    for (int i = 0; i < 4; ++i) sum = fma(broadcast(x[i]), to_float((y << (24 - 8 * i)) >> 24), sum);
    return sum;
  }
  static void put(Number *p, F16 x) { store(p, x); }
};
#endif

inline void store_sum(float *p, F16 x) { store(p, x); }
inline void store_sum(float *p, I16 x) { store(p, to_float(x)); }

// sums += rows (`STRIDE` numbers apart) * C vectors a step, `next` stored numbers from step to step. Where `ahead`
// is given, what lies there is fetched, as many bytes as are read.
template <typename Format, int64_t STRIDE, int R, int C>
inline __attribute__((always_inline)) void accumulate(typename Format::Sum (&sums)[R][C],
                                                      const typename Format::Number *rows,
                                                      const typename Format::Stored *const *vectors, int64_t next,
                                                      int64_t steps, const typename Format::Stored *const *ahead) {
  for (int64_t s = 0; s < steps; ++s) {
    typename Format::Lanes lanes[C];
    CL_UNROLL
    for (int c = 0; c < C; ++c) lanes[c] = Format::lanes(vectors[c] + s * next);
    if (ahead) {
      CL_UNROLL
      for (int c = 0; c < C; ++c) __builtin_prefetch(ahead[c] + s * next, 0, 2);
    }
    CL_UNROLL
    for (int r = 0; r < R; ++r) {
      CL_UNROLL
      for (int c = 0; c < C; ++c)
        sums[r][c] = Format::fuse(sums[r][c], rows + r * STRIDE + s * Format::STEP, lanes[c]);
    }
  }
}

// What fits the registers: rows, and vectors of sixteen beside R rows.
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 8;
constexpr int beside(int rows) { return rows <= 2 ? 8 : rows <= 4 ? 4 : 2; }
#else
constexpr int MOST_ROWS = LANES == 8 ? 4 : 2;
constexpr int beside(int) { return 1; }
#endif

// The keys or the values of some tiles, and what is read after them.
template <typename Format>
struct Tiles {
  int64_t count, dim;
  const typename Format::Stored *tiles[BLOCK_TILES], *ahead[BLOCK_TILES];
};

// Scores [R][BLOCK] of R queries with C tiles of keys from tile t on.
template <typename Format, int R, int C>
inline void score_tiles(const typename Format::Number *queries, const Tiles<Format> &keys, int64_t t, bool first,
                        float *scores) {
  typename Format::Sum sums[R][C] = {};
  accumulate<Format, QUERY_STRIDE, R, C>(sums, queries, keys.tiles + t, CL_TILE * Format::STEP,
                                         keys.dim / Format::STEP, first ? keys.ahead + t : nullptr);
  CL_UNROLL
  for (int r = 0; r < R; ++r) {
    CL_UNROLL
    for (int c = 0; c < C; ++c) store_sum(scores + r * BLOCK + (t + c) * CL_TILE, sums[r][c]);
  }
}

// Answers [R][dim], C vectors of them from dimension d on, = their own * decay + weights * values.
template <typename Format, int R, int C>
inline void weigh_tiles(const typename Format::Number *weights, const Tiles<Format> &values, const float *decay,
                        int64_t d, bool first, float *answers) {
  constexpr int64_t STRIDE = BLOCK * sizeof(float) / sizeof(typename Format::Number);
  const int64_t dim = values.dim;
  F16 sums[R][C];
  CL_UNROLL
  for (int r = 0; r < R; ++r) {
    CL_UNROLL
    for (int c = 0; c < C; ++c) sums[r][c] = load(answers + r * dim + d + c * 16) * broadcast(decay[r]);
  }
  for (int64_t t = 0; t < values.count; ++t) {
    const typename Format::Stored *vectors[C], *ahead[C];
    CL_UNROLL
    for (int c = 0; c < C; ++c) {
      vectors[c] = values.tiles[t] + (d + c * 16) * Format::STEP;
      ahead[c] = values.ahead[t] + (d + c * 16) * Format::STEP;
    }
    accumulate<Format, STRIDE, R, C>(sums, weights + t * CL_TILE, vectors, dim * Format::STEP,
                                     CL_TILE / Format::STEP, first ? ahead : nullptr);
  }
  CL_UNROLL
  for (int r = 0; r < R; ++r) {
    CL_UNROLL
    for (int c = 0; c < C; ++c) store(answers + r * dim + d + c * 16, sums[r][c]);
  }
}

template <typename Format, int R>
void score_rows(const typename Format::Number *queries, const Tiles<Format> &keys, bool first, float *scores) {
  constexpr int C = beside(R);
  int64_t t = 0;
  for (; t + C <= keys.count; t += C) score_tiles<Format, R, C>(queries, keys, t, first, scores);
  for (; t < keys.count; ++t) score_tiles<Format, R, 1>(queries, keys, t, first, scores);
}

template <typename Format, int R>
void weigh_rows(const typename Format::Number *weights, const Tiles<Format> &values, const float *decay,
                bool first, float *answers) {
  constexpr int C = beside(R);
  int64_t d = 0;
  for (; d + C * 16 <= values.dim; d += C * 16)
    weigh_tiles<Format, R, C>(weights, values, decay, d, first, answers);
  for (; d < values.dim; d += 16) weigh_tiles<Format, R, 1>(weights, values, decay, d, first, answers);
}

// The same of any number of rows, R at a time; the first of them fetch what is ahead.
template <typename Format, int R = MOST_ROWS>
void score_all(int64_t rows, const typename Format::Number *queries, const Tiles<Format> &keys, bool first,
               float *scores) {
  for (; rows >= R; rows -= R, queries += R * QUERY_STRIDE, scores += R * BLOCK, first = false)
    score_rows<Format, R>(queries, keys, first, scores);
  if constexpr (R > 1) score_all<Format, R - 1>(rows, queries, keys, first, scores);
}

template <typename Format, int R = MOST_ROWS>
void weigh_all(int64_t rows, const typename Format::Number *weights, const Tiles<Format> &values,
               const float *decay, bool first, float *answers) {
  constexpr int64_t STRIDE = BLOCK * sizeof(float) / sizeof(typename Format::Number);
  for (; rows >= R; rows -= R, weights += R * STRIDE, decay += R, answers += R * values.dim, first = false)
    weigh_rows<Format, R>(weights, values, decay, first, answers);
  if constexpr (R > 1) weigh_all<Format, R - 1>(rows, weights, values, decay, first, answers);
}

}  // namespace
}  // namespace CL_ISA
