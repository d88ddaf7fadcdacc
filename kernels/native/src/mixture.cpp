// A mixture of experts: each token's router scores choose some, whose answers are weighted and added in their
// order.
//
// Tokens that chose an expert ask it together, in items of a bounded number of rows that threads take one by one;
// where there are fewer items than threads, all threads compute each of them.
#include "gates.h"
#include "ops.h"
#include "rows.h"

namespace CL_ISA {
namespace {

constexpr int64_t ITEM_ROWS = 96;

int64_t padded_bytes(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Some of the slots [tokens * top_k] whose tokens chose one expert.
struct Item {
  int32_t expert, first, count;
};

int64_t most_items(const ClMixture &op, int64_t tokens) {
  const int64_t slots = tokens * op.top_k, busy = slots < op.experts ? slots : op.experts;
  return busy + slots / ITEM_ROWS;
}

// Hands out memory, or with none counts what is asked for.
struct Room {
  char *at;
  int64_t bytes = 0;

  template <typename T>
  T *take(int64_t count) {
    T *taken = at ? reinterpret_cast<T *>(at + bytes) : nullptr;
    bytes += padded_bytes(count * (int64_t)sizeof(T));
    return taken;
  }
};

// What all threads share.
struct Shared {
  Shared(const ClMixture &op, int64_t tokens, int64_t threads, Room &room)
      : scores(room.take<float>(tokens * op.experts)),
        weights(room.take<float>(tokens * op.top_k)),
        answers(room.take<float>(tokens * op.top_k * op.x->width)),
        experts(room.take<int32_t>(tokens * op.top_k)),
        slots(room.take<int32_t>(tokens * op.top_k)),
        firsts(room.take<int32_t>(op.experts + 1)),
        items(room.take<Item>(most_items(op, tokens) + 1)),
        counters(room.take<Counters>(2 * threads)) {}

  float *scores;     // [tokens][experts], then the masses of softmax
  float *weights;    // [tokens][top_k]
  float *answers;    // [tokens][top_k][hidden]
  int32_t *experts;  // [tokens][top_k], ascending
  int32_t *slots;    // by expert, then token
  int32_t *firsts;   // [experts + 1], of slots
  Item *items;       // the last is of no expert
  Counters *counters;
};

// What an item needs, of one thread or of all.
struct Desk {
  Desk(const ClMixture &op, int64_t threads, Room &room)
      : both(room.take<float>(ITEM_ROWS * 2 * op.intermediate)),
        inner(room.take<float>(ITEM_ROWS * op.intermediate)),
        answers(room.take<float>(ITEM_ROWS * op.x->width)) {
    const ClRows &x = *op.x;
    const int64_t stride = padded(x.width);
    rows = x;
    if (x.f32) rows.f32 = room.take<float>(ITEM_ROWS * x.width);
    if (x.bf16) rows.bf16 = room.take<uint16_t>(ITEM_ROWS * stride);
    if (x.int8) {
      rows.int8 = room.take<int8_t>(ITEM_ROWS * stride);
      rows.scales = room.take<float>(ITEM_ROWS * scales_of(x));
      rows.sums = room.take<int32_t>(ITEM_ROWS * sums_of(x));
    }
    int64_t most = 0;
    for (int64_t e = 0; e < 2 * op.experts; ++e) {
      const ClLinear &weight = e < op.experts ? op.gate_up[e] : op.down[e - op.experts];
      const int64_t bytes = multiply_scratch(weight, ITEM_ROWS, threads);
      most = bytes > most ? bytes : most;
    }
    scratch = room.take<char>(most);
  }

  float *both, *inner, *answers;  // [rows][2 intermediate], [rows][intermediate], [rows][hidden]
  ClRows rows;
  void *scratch;
};

void copy_row(const ClRows &from, int64_t at, const ClRows &to, int64_t row) {
  const int64_t width = from.width, stride = padded(width);
  if (from.f32) memcpy(to.f32 + row * width, from.f32 + at * width, sizeof(float) * width);
  if (from.bf16) memcpy(to.bf16 + row * stride, from.bf16 + at * stride, sizeof(uint16_t) * stride);
  if (!from.int8) return;
  const int64_t scales = scales_of(from), sums = sums_of(from);
  memcpy(to.int8 + row * stride, from.int8 + at * stride, stride);
  memcpy(to.scales + row * scales, from.scales + at * scales, sizeof(float) * scales);
  memcpy(to.sums + row * sums, from.sums + at * sums, sizeof(int32_t) * sums);
}

class Mixture {
 public:
  Mixture(const ClMixture &op, const ClStep &step, const Team &team)
      : op_(op),
        step_(step),
        team_(team),
        room_{static_cast<char *>(step.scratch)},
        shared_(op, step.tokens, team.threads, room_) {}

  void run() {
    multiply(*op_.x, step_.tokens, *op_.router, shared_.scores, step_scratch(), team_, 0);
    team_.barrier();
    Span span;
    while (team_.take(2, step_.tokens, 4, &span))
      for (int64_t t = span.first; t < span.end; ++t) choose(t);
    team_.barrier();
    if (team_.rank == 0) list_items();
    team_.barrier();
    ask();
    team_.barrier();
    while (team_.take(4, step_.tokens, 4, &span))
      for (int64_t t = span.first; t < span.end; ++t) add_answers(t);
  }

 private:
  void *step_scratch() const { return room_.at + room_.bytes; }

  // NaN is above all: a faulty token's answer is faulty, too.
  static bool above(float a, float b) { return a > b || (a != a && b == b); }

  void choose(int64_t token) {
    float *scores = shared_.scores + token * op_.experts, *weights = shared_.weights + token * op_.top_k;
    int32_t *chosen = shared_.experts + token * op_.top_k;
    for (int64_t i = 0; i < op_.top_k; ++i) {
      int64_t best = -1;
      for (int64_t e = 0; e < op_.experts; ++e) {
        bool taken = false;
        for (int64_t j = 0; j < i; ++j) taken |= chosen[j] == e;
        if (!taken && (best < 0 || above(scores[e], scores[best]))) best = e;
      }
      chosen[i] = (int32_t)best;
    }
    const F16 highest = broadcast(scores[chosen[0]]);
    for (int64_t i = 1; i < op_.top_k; ++i)
      for (int64_t j = i; j > 0 && chosen[j] < chosen[j - 1]; --j) {
        const int32_t lower = chosen[j];
        chosen[j] = chosen[j - 1], chosen[j - 1] = lower;
      }
    for (int64_t e = 0; e < op_.experts; e += 16)
      store_some(scores + e, exp(load_some(scores + e, op_.experts - e) - highest), op_.experts - e);
    float total = 0;
    if (op_.normalise)
      for (int64_t i = 0; i < op_.top_k; ++i) total += scores[chosen[i]];
    else
      for (int64_t e = 0; e < op_.experts; ++e) total += scores[e];
    for (int64_t i = 0; i < op_.top_k; ++i) weights[i] = scores[chosen[i]] / total;
  }

  void list_items() {
    const int64_t slots = step_.tokens * op_.top_k;
    memset(shared_.firsts, 0, sizeof(int32_t) * (op_.experts + 1));
    for (int64_t s = 0; s < slots; ++s) ++shared_.firsts[shared_.experts[s] + 1];
    for (int64_t e = 0; e < op_.experts; ++e) shared_.firsts[e + 1] += shared_.firsts[e];
    Item *item = shared_.items;
    for (int32_t e = 0; e < op_.experts; ++e)
      for (int32_t first = shared_.firsts[e], end = shared_.firsts[e + 1]; first < end; first += ITEM_ROWS)
        *item++ = {e, first, end - first < ITEM_ROWS ? end - first : (int32_t)ITEM_ROWS};
    item->count = 0;
    for (int64_t s = 0; s < slots; ++s) shared_.slots[shared_.firsts[shared_.experts[s]]++] = (int32_t)s;
    memset(static_cast<void *>(shared_.counters), 0, sizeof(Counters) * 2 * team_.threads);
  }

  void ask() {
    int64_t count = 0;
    while (shared_.items[count].count) ++count;
    Room room = room_;
    if (count < team_.threads) {
      const Desk desk(op_, team_.threads, room);
      for (int64_t i = 0; i < count; ++i) {
        answer(shared_.items[i], desk, Team(team_, shared_.counters + 2 * i),
               Team(team_, shared_.counters + 2 * i + 1));
        team_.barrier();
      }
      return;
    }
    for (int64_t i = 0; i <= team_.rank; ++i) {  // the desks of the threads before lie before
      const Desk desk(op_, 1, room);
      Span span;
      while (i == team_.rank && team_.take(3, count, 1, &span)) {
        Counters counters[2] = {};
        answer(shared_.items[span.first], desk, Team(counters), Team(counters + 1));
      }
    }
  }

  // The item's answers, by a team: with counters of its own for each of the two products.
  void answer(const Item &item, const Desk &desk, const Team &team, const Team &again) {
    const int32_t *slots = shared_.slots + item.first;
    const int64_t inside = op_.intermediate, hidden = op_.x->width;
    ClRows inner = {};
    inner.f32 = desk.inner, inner.width = inside;
    for (int64_t i = team.rank; i < item.count; i += team.threads)
      copy_row(*op_.x, slots[i] / op_.top_k, desk.rows, i);
    team.barrier();
    multiply(desk.rows, item.count, op_.gate_up[item.expert], desk.both, desk.scratch, team, 0);
    team.barrier();
    for (int64_t i = team.rank; i < item.count; i += team.threads)
      gate_row(op_.activation, desk.both + i * 2 * inside, inside, desk.inner + i * inside);
    team.barrier();
    multiply(inner, item.count, op_.down[item.expert], desk.answers, desk.scratch, again, 0);
    team.barrier();
    for (int64_t i = team.rank; i < item.count; i += team.threads)
      memcpy(shared_.answers + slots[i] * hidden, desk.answers + i * hidden, sizeof(float) * hidden);
  }

  void add_answers(int64_t token) {
    const int64_t hidden = op_.x->width;
    const float *weights = shared_.weights + token * op_.top_k;
    for (int64_t d = 0; d < hidden; d += 16) {
      F16 total = {};
      for (int64_t i = 0; i < op_.top_k; ++i) {
        const float *answer = shared_.answers + (token * op_.top_k + i) * hidden + d;
        total = fma(load_some(answer, hidden - d), broadcast(weights[i]), total);
      }
      store_some(op_.out + token * hidden + d, total, hidden - d);
    }
  }

  const ClMixture &op_;
  const ClStep &step_;
  const Team &team_;
  Room room_;
  const Shared shared_;
};

}  // namespace

void mixture(const ClMixture &op, const ClStep &step, const Team &team) { Mixture(op, step, team).run(); }

int64_t mixture_scratch(const ClMixture &op, const ClLimits &limits) {
  Room room{nullptr};
  Shared(op, limits.tokens, limits.threads, room);
  const int64_t router = multiply_scratch(*op.router, limits.tokens, limits.threads);
  Room together{nullptr}, alone{nullptr};
  Desk(op, limits.threads, together);
  for (int64_t i = 0; i < limits.threads; ++i) Desk(op, 1, alone);
  int64_t most = together.bytes > alone.bytes ? together.bytes : alone.bytes;
  most = router > most ? router : most;
  return room.bytes + most;
}

}  // namespace CL_ISA
