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
    const int64_t token = step.token_ids[span.first];
    if (token >= 0 && token < op.table->out) {
      unpack_row(*op.table, token, out);
    } else {  // a fault of its own row alone, where reading on would be one of all
      for (int64_t i = 0; i < width; ++i) out[i] = __builtin_nanf("");
    }
    for (int64_t i = 0; i < width; i += 16)
      store_some(out + i, load_some(out + i, width - i) * broadcast(op.scale), width - i);
    write_row(*op.out, span.first, out);
  }
}

}  // namespace CL_ISA
