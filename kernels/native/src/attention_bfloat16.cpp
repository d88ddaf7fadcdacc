// Attention over pages of bfloat16.
#include "attention_split.h"

namespace CL_ISA {
typedef Split<Bfloat16, Bfloat16> Bfloat16Split;
const Attends attends_bfloat16 = {Bfloat16Split::prepare, Bfloat16Split::run};
}  // namespace CL_ISA
