// The kernels of int8 activations by packed int4 and int8 weights.
#include "dot.h"
#include "products.h"

namespace CL_ISA {
namespace {

inline F16 numbers(const ClMatrix &matrix, const void *from, int64_t group) {
  if (matrix.scale_type == CL_FLOAT16) return load_half(static_cast<const uint16_t *>(from) + group * CL_TILE);
  return load(static_cast<const float *>(from) + group * CL_TILE);
}

// The scales of the tiles' current group of weights, which may be of several groups of inputs.
struct Scales {
  F16 scale[TILES], low[TILES];  // low: scale times zero
  int64_t group, left, ratio;

  inline Scales(const Block &b) {
    const int64_t at = b.first / GROUP_UNITS;
    ratio = b.matrix->group ? b.matrix->group / CL_GROUP : INT64_MAX;
    group = at / ratio;
    left = ratio - at % ratio;
    read(b);
  }
  inline void read(const Block &b) {
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) {
      scale[t] = numbers(*b.matrix, b.scales[t], group);
      low[t] = b.zeros[t] ? scale[t] * numbers(*b.matrix, b.zeros[t], group) : F16{};
    }
  }
  inline void next(const Block &b) {
    if (left == 0) {
      ++group;
      read(b);
      left = ratio;
    }
    --left;
  }
};

template <int M>
inline int32_t start_of(const Block &b, int64_t at) {
  if (M == 1 && b.sum) return -b.offset * b.sum[at];
  return b.start[at];
}

template <int M>
inline float total_of(const Block &b, int64_t at) {
  if (M == 1 && b.sum) return b.scale[at] * (float)b.sum[at];
  return b.total[at];
}

// sums += (codes * x) * (scale of weights * scale of x) of one group, and the zeros' part.
template <int M, bool ZEROS>
inline void add_group(const Block &b, int64_t g, const Scales &scales, const I16 (&dots)[TILES][M], float *sums) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    const F16 by = broadcast(b.scale[g * M + m]);
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) {
      float *at = sums + (t * M + m) * 16;
      F16 sum = fma(to_float(dots[t][m]), scales.scale[t] * by, load(at));
      if (ZEROS) sum = sum - scales.low[t] * broadcast(total_of<M>(b, g * M + m));
      store(at, sum);
    }
  }
}

template <int M, bool WIDE>
inline void add_unit(const I16 (&codes)[TILES], const int32_t *x, I16 (&dots)[TILES][M]) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    const I16 by = broadcast(x[m]);
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) dots[t][m] = dot4<WIDE>(dots[t][m], codes[t], by);
  }
}

template <int M>
inline void begin_group(const Block &b, int64_t g, I16 (&dots)[TILES][M]) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) dots[t][m] = broadcast(start_of<M>(b, g * M + m));
}

template <int M, bool WIDE, bool ZEROS>
struct Bytes {
  static void run(const Block &b, float *sums) {
    Scales scales(b);
    for (int64_t g = 0; g < b.units / GROUP_UNITS; ++g) {
      I16 dots[TILES][M];
      begin_group<M>(b, g, dots);
#pragma GCC unroll 8
      for (int64_t u = g * GROUP_UNITS; u < (g + 1) * GROUP_UNITS; ++u) {
        I16 codes[TILES];
#pragma GCC unroll 2
        for (int t = 0; t < TILES; ++t) codes[t] = load_bytes(b.weights[t] + u * 64);
        add_unit<M, WIDE>(codes, b.x + u * M, dots);
      }
      scales.next(b);
      add_group<M, ZEROS>(b, g, scales, dots, sums);
    }
  }
};

template <int M, bool, bool ZEROS>
struct Nibbles {
  static void run(const Block &b, float *sums) {
    Scales scales(b);
    for (int64_t g = 0; g < b.units / GROUP_UNITS; ++g) {
      I16 dots[TILES][M];
      begin_group<M>(b, g, dots);
#pragma GCC unroll 4
      for (int64_t u = g * GROUP_UNITS; u < (g + 1) * GROUP_UNITS; u += 2) {
        I16 both[TILES], codes[TILES];
#pragma GCC unroll 2
        for (int t = 0; t < TILES; ++t) {
          both[t] = load_bytes(b.weights[t] + u * 32);
          codes[t] = low_nibbles(both[t]);
        }
        add_unit<M, false>(codes, b.x + u * M, dots);
#pragma GCC unroll 2
        for (int t = 0; t < TILES; ++t) codes[t] = high_nibbles(both[t]);
        add_unit<M, false>(codes, b.x + (u + 1) * M, dots);
      }
      scales.next(b);
      add_group<M, ZEROS>(b, g, scales, dots, sums);
    }
  }
};

// One scale for a row: sums stay whole numbers.
template <int M, bool, bool>
struct RowBytes {
  static void run(const Block &b, float *sums) {
    I16 dots[TILES][M];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int t = 0; t < TILES; ++t) {
        dots[t][m] = load_bytes(sums + (t * M + m) * 16);
        if (b.first == 0) dots[t][m] = broadcast(start_of<M>(b, m));
      }
    for (int64_t u = 0; u < b.units; ++u) {
      I16 codes[TILES];
#pragma GCC unroll 2
      for (int t = 0; t < TILES; ++t) codes[t] = load_bytes(b.weights[t] + u * 64);
      add_unit<M, true>(codes, b.x + u * M, dots);
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int t = 0; t < TILES; ++t) memcpy(sums + (t * M + m) * 16, &dots[t][m], 64);
  }
};

// The instance for so many rows.
template <template <int, bool, bool> class Of, bool WIDE, bool ZEROS, int M = ROWS>
Kernel of_rows(int64_t rows) {
  if constexpr (M > 1)
    if (rows < M) return of_rows<Of, WIDE, ZEROS, M - 1>(rows);
  return Of<M, WIDE, ZEROS>::run;
}

}  // namespace

Kernel nibble_kernel(const ClMatrix &matrix, int64_t rows) {
  return matrix.zeros ? of_rows<Nibbles, false, true>(rows) : of_rows<Nibbles, false, false>(rows);
}

Kernel byte_kernel(const ClMatrix &matrix, int64_t rows) {
  if (matrix.kind == CL_W4A8)
    return matrix.zeros ? of_rows<Bytes, false, true>(rows) : of_rows<Bytes, false, false>(rows);
  if (form_of(matrix) == Form::ROW) return of_rows<RowBytes, true, false>(rows);
  return matrix.zeros ? of_rows<Bytes, true, true>(rows) : of_rows<Bytes, true, false>(rows);
}

}  // namespace CL_ISA
