// The ops of one instruction set, one function each; run by all threads of a team at once.
#pragma once

#include "cloister_kernels.h"
#include "team.h"

using Run = void (*)(const void *args, const ClStep &step, const Team &team);
using Scratch = int64_t (*)(const void *args, const ClLimits &limits);

struct Kernels {
  const char *isa;
  Run run[CL_OPS];
  Scratch scratch[CL_OPS];  // null: none
  int64_t (*packed_bytes)(const ClMatrix &matrix);
  void (*pack)(const ClMatrix &matrix, const void *source, int64_t first, int64_t rows, void *packed);
  int64_t (*kv_page_bytes)(const ClKv &kv);
};

#ifdef CL_ISA
namespace CL_ISA {
void embed(const ClEmbed &op, const ClStep &step, const Team &team);
void norm(const ClNorm &op, const ClStep &step, const Team &team);
void linear(const ClLinearOp &op, const ClStep &step, const Team &team);
void rope(const ClRope &op, const ClStep &step, const Team &team);
void attention(const ClAttention &op, const ClStep &step, const Team &team);
void gated(const ClGated &op, const ClStep &step, const Team &team);
void add(const ClAdd &op, const ClStep &step, const Team &team);
void mixture(const ClMixture &op, const ClStep &step, const Team &team);
void pick(const ClPick &op, const ClStep &step, const Team &team);
void cap(const ClCap &op, const ClStep &step, const Team &team);
int64_t linear_scratch(const ClLinearOp &op, const ClLimits &limits);
int64_t attention_scratch(const ClAttention &op, const ClLimits &limits);
int64_t mixture_scratch(const ClMixture &op, const ClLimits &limits);
int64_t packed_bytes(const ClMatrix &matrix);
void pack(const ClMatrix &matrix, const void *source, int64_t first, int64_t rows, void *packed);
int64_t kv_page_bytes(const ClKv &kv);

// The numbers of row `row` of a packed matrix by their inputs, in float32; for embeddings.
void unpack_row(const ClMatrix &matrix, int64_t row, float *out);

// out [rows, sum of out] = x * weight^T + bias by all threads of the team, phases `phase` and `phase + 1`; ends
// without a barrier. What `linear` does, for ops that multiply inside (mixture).
void multiply(const ClRows &x, int64_t rows, const ClLinear &weight, float *out, void *scratch, const Team &team,
              int phase);
int64_t multiply_scratch(const ClLinear &weight, int64_t rows, int64_t threads);
}  // namespace CL_ISA
#endif
