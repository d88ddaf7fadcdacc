// The threads that run a program together: barriers, and work that they take piece by piece.
#pragma once

#include <stdint.h>

#include <atomic>

struct Counters {  // of one op; zero when it begins
  static constexpr int PHASES = 6;
  alignas(64) std::atomic<int64_t> taken[PHASES];
};

struct Span {
  int64_t first, end;
};

struct Barrier {  // of a program's threads; run.cpp waits at it
  alignas(64) std::atomic<int64_t> arrived;
  alignas(64) std::atomic<int64_t> passed;  // how often all had
};

class Team {
 public:
  __attribute__((always_inline)) Team(int64_t rank, int64_t threads, Counters *counters, Barrier *barrier)
      : rank(rank), threads(threads), counters_(counters), barrier_(barrier) {}
  __attribute__((always_inline)) Team(const Team &of, Counters *counters)
      : Team(of.rank, of.threads, counters, of.barrier_) {}
  __attribute__((always_inline)) explicit Team(Counters *alone) : Team(0, 1, alone, nullptr) {}

  const int64_t rank, threads;

  // Waits for all threads of the team; what they wrote before is seen by all after.
  void barrier() const;

  // The next piece of `total` things in pieces of `size`, in no promised order; false when all are taken. Each
  // phase of an op (0 .. PHASES - 1) is one such distribution. Inlined always: no copy compiled for one
  // instruction set may be the one that all are linked to.
  __attribute__((always_inline)) bool take(int phase, int64_t total, int64_t size, Span *span) const {
    const int64_t first = counters_->taken[phase].fetch_add(size, std::memory_order_relaxed);
    if (first >= total) return false;
    *span = {first, first + size < total ? first + size : total};
    return true;
  }

 private:
  Counters *const counters_;
  Barrier *const barrier_;
};
