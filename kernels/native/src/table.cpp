// The table of one instruction set's ops, by their codes.
#include "ops.h"

#define CL_STRING_OF(x) #x
#define CL_STRING(x) CL_STRING_OF(x)

namespace CL_ISA {
namespace {

template <typename Op, void (*run)(const Op &, const ClStep &, const Team &)>
void call(const void *args, const ClStep &step, const Team &team) {
  run(*static_cast<const Op *>(args), step, team);
}

template <typename Op, int64_t (*bytes)(const Op &, const ClLimits &)>
int64_t need(const void *args, const ClLimits &limits) {
  return bytes(*static_cast<const Op *>(args), limits);
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    CL_STRING(CL_ISA),
    {call<ClEmbed, embed>, call<ClNorm, norm>, call<ClLinearOp, linear>, call<ClRope, rope>,
     call<ClAttention, attention>, call<ClGated, gated>, call<ClAdd, add>, call<ClMixture, mixture>,
     call<ClPick, pick>, call<ClCap, cap>},
    {nullptr, nullptr, need<ClLinearOp, linear_scratch>, nullptr, need<ClAttention, attention_scratch>, nullptr,
     nullptr, need<ClMixture, mixture_scratch>, nullptr, nullptr},
    packed_bytes,
    pack,
    kv_page_bytes,
};

}  // namespace CL_ISA
