// The kernels of int8 activations by packed int4 and int8 weights.
#include "dot.h"
#include "products.h"

// Keeps loads of units in their order where there are many rows: the registers are for sums.
#define CL_IN_ORDER \
  if (M * TILES > 8) asm volatile("" ::: "memory")

namespace CL_ISA {
namespace {

inline F16 numbers(const ClMatrix &matrix, const void *from, int64_t group) {
  if (matrix.scale_type == CL_FLOAT16) return load_half(static_cast<const uint16_t *>(from) + group * CL_TILE);
  return load(static_cast<const float *>(from) + group * CL_TILE);
}

// The scales of the tiles' current group of weights, which may be of several groups of inputs.
struct Scales {
  F16 scale[TILES], low[TILES];  // low: scale times zero, taken off
  int64_t group, left, ratio;
  static constexpr int64_t LINE = 2;  // groups of float16 in a cache line

  inline Scales(const Block &b) {
    const int64_t at = b.first / GROUP_UNITS;
    ratio = b.matrix->group ? b.matrix->group / CL_GROUP : INT64_MAX;
    group = at / ratio;
    left = ratio - at % ratio;
    read(b);
  }
  inline void read(const Block &b) {
    if ((b.streams || b.scales_ahead) && group % LINE == 0) fetch(b);
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) {
      scale[t] = numbers(*b.matrix, b.scales[t], group);
      low[t] = b.zeros[t] ? F16{} - scale[t] * numbers(*b.matrix, b.zeros[t], group) : F16{};
    }
  }
  // Asks memory for those of later groups: they are streams of their own.
  inline void fetch(const Block &b) {
    constexpr int64_t AHEAD = 16;
    const int64_t bytes = CL_TILE * (b.matrix->scale_type == CL_FLOAT16 ? 2 : 4), count = scale_groups(*b.matrix);
    const int64_t at = b.streams ? bytes * (group + AHEAD + (group + AHEAD < count ? 0 : b.next * count))
                                 : bytes * group + b.scales_ahead;
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) {
      __builtin_prefetch(static_cast<const char *>(b.scales[t]) + at);
      if (b.zeros[t]) __builtin_prefetch(static_cast<const char *>(b.zeros[t]) + at);
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
  if (M == 1 && b.sum) return (float)b.sum[at];
  return b.total[at];
}

enum Codes { NIBBLES, WIDE };  // two codes a byte, or one

// The next unit's codes: of two that share their bytes, the high ones were with the low ones.
template <Codes CODES>
inline void load_codes(const uint8_t *const *weights, int64_t unit, I16 (&codes)[TILES]) {
#pragma GCC unroll 2
  for (int t = 0; t < TILES; ++t) {
    if (CODES != NIBBLES) codes[t] = load_bytes(weights[t] + unit * 64);
    if (CODES == NIBBLES && unit % 2 == 0) codes[t] = low_nibbles(load_bytes(weights[t] + unit * 32));
    if (CODES == NIBBLES && unit % 2 == 1) codes[t] = high_nibbles(load_bytes(weights[t] + unit * 32 - 32));
  }
}

template <int M, bool WIDE_CODES>
inline void add_unit(const I16 (&codes)[TILES], const int32_t *x, I16 (&dots)[TILES][M]) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    const I16 by = broadcast(x[m]);
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) dots[t][m] = dot4<WIDE_CODES>(dots[t][m], codes[t], by);
  }
}

// Scales for groups of inputs: of each CL_GROUP whole numbers are added up, then
// part += (codes * x) * scale of weights, and the zeros' part; and of each CL_SCALED sums += part * scale of x.
template <int M, Codes CODES, bool ZEROS>
struct Groups {
  static constexpr int64_t BYTES = GROUP_UNITS * (CODES == NIBBLES ? 32 : 64);

  static void run(const Block &b, float *sums) {
    Scales scales(b);
    Block at = b;
    const int64_t count = b.units / GROUP_UNITS, lines = (b.lines + count - 1) / count;
    for (int64_t g = 0; g < count; at.scale += M) {
      const int64_t end = g + SCALED_UNITS / GROUP_UNITS, last = end < count ? end : count;
      F16 parts[TILES][M] = {};
      for (; g < last; ++g) {
        I16 dots[TILES][M];
        dot(at, dots);
        if (b.streams)
          fetch_ahead(at, g + AHEAD < count ? 0 : b.next * count * BYTES);
        else
          fetch_lines(b, g * lines, lines);
        scales.next(b);
        add(at, scales, dots, parts);
        advance(&at);
      }
      fold(at, parts, sums);
    }
  }

  static inline void advance(Block *at) {
    for (int t = 0; t < TILES; ++t) at->weights[t] += BYTES;
    at->x += GROUP_UNITS * M;
    if (M == 1 && at->sum)
      at->sum += M;
    else
      at->start += M, at->total += M;
  }

  static constexpr int64_t AHEAD = 2048 / BYTES;

  static inline void fetch_ahead(const Block &at, int64_t skip) {
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t)
#pragma GCC unroll 8
      for (int64_t line = 0; line < BYTES; line += 64)
        __builtin_prefetch(at.weights[t] + skip + AHEAD * BYTES + line);
  }

  static inline void dot(const Block &at, I16 (&dots)[TILES][M]) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int t = 0; t < TILES; ++t) dots[t][m] = broadcast(start_of<M>(at, m));
#pragma GCC unroll 8
    for (int u = 0; u < GROUP_UNITS; ++u) {
      I16 codes[TILES];
      load_codes<CODES>(at.weights, u, codes);
      add_unit<M, CODES == WIDE>(codes, at.x + u * M, dots);
      CL_IN_ORDER;
    }
  }

  static inline void add(const Block &at, const Scales &scales, const I16 (&dots)[TILES][M],
                         F16 (&parts)[TILES][M]) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int t = 0; t < TILES; ++t) {
        parts[t][m] = fma(to_float(dots[t][m]), scales.scale[t], parts[t][m]);
        if (ZEROS) parts[t][m] = fma(scales.low[t], broadcast(total_of<M>(at, m)), parts[t][m]);
      }
  }

  static inline void fold(const Block &at, const F16 (&parts)[TILES][M], float *sums) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const F16 by = broadcast(at.scale[m]);
#pragma GCC unroll 2
      for (int t = 0; t < TILES; ++t) {
        float *to = sums + (t * M + m) * 16;
        store(to, fma(parts[t][m], by, load(to)));
      }
    }
  }
};

// One scale for a row: sums stay whole numbers.
template <int M, Codes, bool>
struct Row {
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
      load_codes<WIDE>(b.weights, u, codes);
      add_unit<M, true>(codes, b.x + u * M, dots);
      if (b.streams)
        fetch_unit(b, u);
      else
        fetch_lines(b, u, 1), fetch_inputs(b, u);
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int t = 0; t < TILES; ++t) memcpy(sums + (t * M + m) * 16, &dots[t][m], 64);
  }
};

// The instance for so many rows.
template <template <int, Codes, bool> class Of, Codes CODES, bool ZEROS, int M = ROWS>
Kernel of_rows(int64_t rows) {
  if constexpr (M > 1)
    if (rows < M) return of_rows<Of, CODES, ZEROS, M - 1>(rows);
  return Of<M, CODES, ZEROS>::run;
}

template <Codes CODES>
Kernel of_groups(const ClMatrix &matrix, int64_t rows) {
  return matrix.zeros ? of_rows<Groups, CODES, true, GROUP_ROWS>(rows)
                      : of_rows<Groups, CODES, false, GROUP_ROWS>(rows);
}

}  // namespace

Kernel integer_kernel(const ClMatrix &matrix, int64_t rows) {
  if (matrix.kind == CL_W4A8) return of_groups<NIBBLES>(matrix, rows);
  return form_of(matrix) == Form::ROW ? of_rows<Row, WIDE, false>(rows) : of_groups<WIDE>(matrix, rows);
}

}  // namespace CL_ISA
