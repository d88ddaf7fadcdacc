// Rows of an embedding table, one for each of a step's tokens.
#include "ops.h"
#include "rows.h"

namespace CL_ISA {

void embed(const ClEmbed &op, const ClStep &step, const Team &team) {
  const int64_t width = op.out->width;
  float *row = static_cast<float *>(__builtin_alloca(sizeof(float) * (size_t)width));
  Span span;
  while (team.take(0, step.tokens, 1, &span)) {
    float *out = op.out->f32 ? op.out->f32 + span.first * width : row;
    unpack_row(*op.table, step.token_ids[span.first], 0, width, out);
    for (int64_t i = 0; i < width; i += 16)
      store_some(out + i, load_some(out + i, width - i) * broadcast(op.scale), width - i);
    write_row(*op.out, span.first, out);
  }
}

}  // namespace CL_ISA
