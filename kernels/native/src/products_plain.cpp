// The kernels of float32 and bfloat16 numbers.
#include "dot.h"
#include "products.h"

namespace CL_ISA {
namespace {

template <bool BF16>
inline F16 add_products(F16 sum, I16 weights, I16 x) {
  if (BF16) return dot2(sum, weights, x);
  F16 w, by;
  memcpy(&w, &weights, 64), memcpy(&by, &x, 64);
  return fma(w, by, sum);
}

template <int M, bool BF16>
struct Plain {
  static void run(const Block &b, float *sums) {
    F16 total[TILES][M];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int t = 0; t < TILES; ++t) total[t][m] = load(sums + (t * M + m) * 16);
    for (int64_t u = 0; u < b.units; ++u) {
      I16 weights[TILES];
#pragma GCC unroll 2
      for (int t = 0; t < TILES; ++t) weights[t] = load_bytes(b.weights[t] + u * 64);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const I16 x = broadcast(b.x[u * M + m]);
#pragma GCC unroll 2
        for (int t = 0; t < TILES; ++t) total[t][m] = add_products<BF16>(total[t][m], weights[t], x);
      }
      if (b.streams)
        fetch_unit(b, u);
      else
        fetch_lines(b, u, 1), fetch_inputs(b, u);
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int t = 0; t < TILES; ++t) store(sums + (t * M + m) * 16, total[t][m]);
  }
};

template <bool BF16, int M = ROWS>
Kernel of_rows(int64_t rows) {
  if constexpr (M > 1)
    if (rows < M) return of_rows<BF16, M - 1>(rows);
  return Plain<M, BF16>::run;
}

}  // namespace

Kernel plain_kernel(const ClMatrix &matrix, int64_t rows) {
  return form_of(matrix) == Form::BFLOAT16 ? of_rows<true>(rows) : of_rows<false>(rows);
}

}  // namespace CL_ISA
