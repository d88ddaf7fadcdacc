// Chooses the instruction set, and runs programs: every op by all threads, a barrier after each.
#include <omp.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ops.h"

#define CL_DECLARE(isa)         \
  namespace isa {               \
  extern const Kernels kernels; \
  }
#ifdef CL_HAS_AVX512
CL_DECLARE(avx512)
#endif
#ifdef CL_HAS_AVXVNNI
CL_DECLARE(avxvnni)
#endif
#ifdef CL_HAS_AVX2
CL_DECLARE(avx2)
#endif
CL_DECLARE(portable)

namespace {

constexpr int64_t SPINS = 1 << 12;  // some 50 microseconds

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Choice {
  const Kernels *kernels;
  bool runs;
};

// Best first. What each set of sources was compiled for must all be there.
int choices(Choice *found) {
  int count = 0;
#ifdef CL_HAS_AVX512
  found[count++] = {&avx512::kernels, __builtin_cpu_supports("x86-64-v4") &&
                                          __builtin_cpu_supports("avx512vnni") &&
                                          __builtin_cpu_supports("avx512bf16")};
#endif
#ifdef CL_HAS_AVXVNNI
  found[count++] = {&avxvnni::kernels, __builtin_cpu_supports("x86-64-v3") && __builtin_cpu_supports("avxvnni")};
#endif
#ifdef CL_HAS_AVX2
  found[count++] = {&avx2::kernels, __builtin_cpu_supports("x86-64-v3") != 0};
#endif
  found[count++] = {&portable::kernels, true};
  return count;
}

const Kernels *chosen = nullptr;
char names[64];

const Kernels &kernels() {
  if (!chosen) cl_select("");
  return *chosen;
}

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000LL + time.tv_nsec;
}

void run_op(const Kernels &with, const ClOp &op, int64_t at, const ClStep &step, const Team &team) {
  const int64_t began = step.nanoseconds && team.rank == 0 ? now() : 0;
  with.run[op.code](op.args, step, team);
  team.barrier();
  if (began) step.nanoseconds[at] += now() - began;
}

}  // namespace

// OpenMP's own wakes sleepers with a system call each time, and a small op is over sooner than that. Nobody sleeps
// here: who waits long lets others run.
void Team::barrier() const {
  if (threads == 1) return;  // a team of one, in a mixture, is part of a larger one
  const int64_t passed = barrier_->passed.load(std::memory_order_acquire);
  if (barrier_->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
    barrier_->arrived.store(0, std::memory_order_relaxed);
    barrier_->passed.store(passed + 1, std::memory_order_release);
    return;
  }
  for (int64_t turns = 0; barrier_->passed.load(std::memory_order_acquire) == passed; ++turns) {
    if (turns < SPINS)
      pause();
    else
      sched_yield();
  }
}

int cl_abi(void) { return CL_ABI; }

const char *cl_isas(void) {
  Choice found[4];
  const int count = choices(found);
  names[0] = 0;
  for (int i = 0; i < count; ++i) {
    if (!found[i].runs) continue;
    if (names[0]) strcat(names, " ");
    strcat(names, found[i].kernels->isa);
  }
  return names;
}

int cl_select(const char *isa) {
  Choice found[4];
  const int count = choices(found);
  for (int i = 0; i < count; ++i) {
    if (!found[i].runs || (isa && *isa && strcmp(isa, found[i].kernels->isa) != 0)) continue;
    chosen = found[i].kernels;
    return 0;
  }
  return -1;
}

const char *cl_isa(void) { return kernels().isa; }

void cl_run(const ClOp *ops, int64_t count, const ClStep *step) {
  const Kernels &with = kernels();
  const int64_t threads = step->threads;
  Counters *counters = static_cast<Counters *>(aligned_alloc(64, sizeof(Counters) * count));
  memset(static_cast<void *>(counters), 0, sizeof(Counters) * count);
  Barrier barrier = {};
#pragma omp parallel num_threads(threads)
  for (int64_t i = 0; i < count; ++i)
    run_op(with, ops[i], i, *step, Team(omp_get_thread_num(), omp_get_num_threads(), counters + i, &barrier));
  free(counters);
}

int64_t cl_scratch_bytes(const ClOp *ops, int64_t count, const ClLimits *limits) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Scratch need = kernels().scratch[ops[i].code];
    const int64_t bytes = need ? need(ops[i].args, *limits) : 0;
    most = bytes > most ? bytes : most;
  }
  return most;
}

int64_t cl_kv_page_bytes(const ClKv *kv) { return kernels().kv_page_bytes(*kv); }

int64_t cl_packed_bytes(const ClMatrix *matrix) { return kernels().packed_bytes(*matrix); }

void cl_pack(const ClMatrix *matrix, const void *source, int64_t first, int64_t rows, void *packed) {
  kernels().pack(*matrix, source, first, rows, packed);
}
