// Attention over pages of float32.
#include "attention_split.h"

namespace CL_ISA {
typedef Split<Float32, Float32> Float32Split;
const Attends attends_float32 = {Float32Split::prepare, Float32Split::run};
}  // namespace CL_ISA
