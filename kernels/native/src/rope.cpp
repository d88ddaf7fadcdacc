// Norms and rotates the queries and keys of each token, and stores its keys and values in its page.
//
// Source: Su et al., "RoFormer", 2021 (rotations, in Llama's order of pairs).
#include "norms.h"
#include "ops.h"
#include "pages.h"

namespace CL_ISA {
namespace {

// Turns the pairs (x[i], x[i + n]) by their angles.
void rotate(float *x, const float *cosines, const float *sines, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t left = n - i;
    const F16 cosine = load_some(cosines + i, left), sine = load_some(sines + i, left);
    const F16 first = load_some(x + i, left), second = load_some(x + n + i, left);
    store_some(x + i, first * cosine - second * sine, left);
    store_some(x + n + i, second * cosine + first * sine, left);
  }
}

// Of some heads of a token, over each or over all of them.
void norm_heads(float *x, int64_t heads, int64_t dim, const float *weight, bool whole, float eps) {
  if (whole) return scale_by(x, inverse_root(x, heads * dim, eps), weight, heads * dim, x);
  for (int64_t h = 0; h < heads; ++h)
    scale_by(x + h * dim, inverse_root(x + h * dim, dim, eps), weight, dim, x + h * dim);
}

void turn(const ClRope &op, float *queries, int64_t position) {
  const int64_t dim = op.kv->dim, n = op.rotated / 2;
  float *keys = queries + op.heads * dim;
  if (op.query_norm) norm_heads(queries, op.heads, dim, op.query_norm, op.whole != 0, op.eps);
  if (op.key_norm) norm_heads(keys, op.kv->heads, dim, op.key_norm, op.whole != 0, op.eps);
  for (int64_t h = 0; h < op.heads + op.kv->heads; ++h)
    rotate(queries + h * dim, op.cosines + position * n, op.sines + position * n, n);
}

}  // namespace

void rope(const ClRope &op, const ClStep &step, const Team &team) {
  constexpr int64_t AT_ONCE = 4;
  const Pages pages(*op.kv);
  const int64_t dim = op.kv->dim, width = (op.heads + 2 * op.kv->heads) * dim;
  int64_t row = 0;
  Span span;
  while (team.take(0, step.tokens, AT_ONCE, &span))
    for (int64_t t = span.first; t < span.end; ++t) {
      while (t >= step.row_first[row + 1]) ++row;
      const int64_t position = step.positions[t], place = position % op.kv->block_size;
      const int64_t block = step.tables[step.table_first[row] + position / op.kv->block_size];
      float *queries = op.qkv + t * width, *keys = queries + op.heads * dim;
      turn(op, queries, position);
      for (int64_t h = 0; h < op.kv->heads; ++h)
        store_token(pages, pages.head(op.layer, block, h), place, keys + h * dim, keys + (op.kv->heads + h) * dim);
    }
}

}  // namespace CL_ISA
