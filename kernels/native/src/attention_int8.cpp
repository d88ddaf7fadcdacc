// Attention over pages of int8 codes.
#include "attention_split.h"

namespace CL_ISA {
typedef Split<Int8Keys, Int8Values> Int8Split;
const Attends attends_int8 = {Int8Split::prepare, Int8Split::run};
}  // namespace CL_ISA
