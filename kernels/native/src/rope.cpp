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

// Stores tokens first .. end - 1 of a row, tile after tile and head after head.
void store_row(const ClRope &op, const ClStep &step, const Pages &pages, int64_t row, int64_t first, int64_t end) {
  const int64_t dim = op.kv->dim, width = (op.heads + 2 * op.kv->heads) * dim, size = op.kv->block_size;
  while (first < end) {
    const int64_t position = step.positions[first], place = position % size;
    const int64_t lane = place % CL_TILE, room = CL_TILE - lane < size - place ? CL_TILE - lane : size - place;
    const int64_t count = room < end - first ? room : end - first;
    const int64_t block = step.tables[step.table_first[row] + position / size];
    const float *keys = op.qkv + first * width + op.heads * dim, *values = keys + op.kv->heads * dim;
    for (int64_t h = 0; h < op.kv->heads; ++h)
      store_tokens(pages, pages.head(op.layer, block, h), place / CL_TILE,
                   {keys + h * dim, width, lane, count, dim}, {values + h * dim, width, lane, count, dim});
    first += count;
  }
}

}  // namespace

void rope(const ClRope &op, const ClStep &step, const Team &team) {
  const Pages pages(*op.kv);
  const int64_t width = (op.heads + 2 * op.kv->heads) * op.kv->dim, share = step.tokens / team.threads;
  const int64_t at_once = share < 4 ? 1 : share < 64 ? 4 : 16;
  int64_t row = 0;
  Span span;
  while (team.take(0, step.tokens, at_once, &span)) {
    for (int64_t t = span.first; t < span.end; ++t) turn(op, op.qkv + t * width, step.positions[t]);
    for (int64_t first = span.first; first < span.end;) {
      while (first >= step.row_first[row + 1]) ++row;
      const int64_t end = step.row_first[row + 1] < span.end ? step.row_first[row + 1] : span.end;
      store_row(op, step, pages, row, first, end);
      first = end;
    }
  }
}

}  // namespace CL_ISA
