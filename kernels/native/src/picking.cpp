// The last steps of a program: the rows that logits are wanted of, and what bounds the logits.
#include "functions.h"
#include "ops.h"
#include "rows.h"

namespace CL_ISA {

void pick(const ClPick &op, const ClStep &step, const Team &team) {
  Span span;
  while (team.take(0, step.picks, 1, &span))
    write_row(*op.out, span.first, op.x + step.picked[span.first] * op.out->width);
}

void cap(const ClCap &op, const ClStep &step, const Team &team) {
  constexpr int64_t AT_ONCE = 4096;
  const int64_t count = step.picks * op.width;
  Span span;
  while (team.take(0, count, AT_ONCE, &span))
    for (int64_t i = span.first; i < span.end; i += 16) {
      F16 x = load_some(op.x + i, span.end - i) * broadcast(op.scale);
      if (op.softcap != 0) x = tanh(x / broadcast(op.softcap)) * broadcast(op.softcap);
      store_some(op.x + i, x, span.end - i);
    }
}

}  // namespace CL_ISA
