// Keeps each thread of the team, torch's too, on a core of its own.
#include <omp.h>
#include <sched.h>

#include "cloister_kernels.h"

int cl_pin(const int32_t *cores, int64_t count) {
  int refused = 0;
#pragma omp parallel num_threads(count) reduction(+ : refused)
  {
    const int core = cores[omp_get_thread_num()];
    cpu_set_t *alone = CPU_ALLOC(core + 1);
    const size_t size = CPU_ALLOC_SIZE(core + 1);
    CPU_ZERO_S(size, alone);
    CPU_SET_S(core, size, alone);
    refused += sched_setaffinity(0, size, alone) != 0;
    CPU_FREE(alone);
  }
  return refused;
}
