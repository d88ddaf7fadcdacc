// Gated activations: silu, gelu, its approximation with tanh, and the clamped SwiGLU of gpt-oss.
#include "gates.h"

#include "ops.h"
#include "rows.h"

namespace CL_ISA {

void gated(const ClGated &op, const ClStep &step, const Team &team) {
  const int64_t width = op.out->width;
  float *row = static_cast<float *>(__builtin_alloca(sizeof(float) * (size_t)width));
  Span span;
  while (team.take(0, step.tokens, 1, &span)) {
    float *out = op.out->f32 ? op.out->f32 + span.first * width : row;
    gate_row(op.activation, op.x + span.first * 2 * width, width, out);
    write_row(*op.out, span.first, out);
  }
}

}  // namespace CL_ISA
