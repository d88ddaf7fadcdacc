// Root mean square norms of rows, and of rows with what they are added to.
#include "norms.h"

#include "ops.h"
#include "rows.h"

namespace CL_ISA {
namespace {

constexpr int64_t AT_ONCE = 4;  // rows that a thread takes

// x * scale + residual of one row; the residual may be absent.
void add_row(const float *x, float scale, const float *residual, int64_t width, float *total) {
  for (int64_t i = 0; i < width; i += 16) {
    const F16 some = load_some(x + i, width - i) * broadcast(scale);
    store_some(total + i, residual ? some + load_some(residual + i, width - i) : some, width - i);
  }
}

void norm_row(const ClNorm &op, int64_t t, float *row) {
  const int64_t width = op.out->width;
  const float *total = op.x + t * width;
  if (op.total || op.residual || op.scale != 1) {
    float *sums = op.total ? op.total + t * width : row;
    add_row(total, op.scale, op.residual ? op.residual + t * width : nullptr, width, sums);
    total = sums;
  }
  float *out = op.out->f32 ? op.out->f32 + t * width : row;
  scale_by(total, inverse_root(total, width, op.eps), op.weight, width, out);
  write_row(*op.out, t, out);
}

}  // namespace

void norm(const ClNorm &op, const ClStep &step, const Team &team) {
  float *row = static_cast<float *>(__builtin_alloca(sizeof(float) * (size_t)op.out->width));
  Span span;
  while (team.take(0, step.tokens, AT_ONCE, &span))
    for (int64_t t = span.first; t < span.end; ++t) norm_row(op, t, row);
}

void add(const ClAdd &op, const ClStep &step, const Team &team) {
  Span span;
  while (team.take(0, step.tokens, AT_ONCE, &span))
    for (int64_t t = span.first; t < span.end; ++t)
      add_row(op.x + t * op.width, op.scale, op.residual + t * op.width, op.width, op.out + t * op.width);
}

}  // namespace CL_ISA
