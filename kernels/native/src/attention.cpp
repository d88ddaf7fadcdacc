// Attention of a step: cuts it into pieces that threads take, merges their answers, and writes the rows.
#include "attention.h"

#include "rows.h"

namespace CL_ISA {
namespace {

// How all pieces are cut.
struct Plan {
  Plan(const ClAttention &op, int64_t threads)
      : fold(op.heads / op.kv->heads),
        heads(fold < MOST_QUERIES ? fold : MOST_QUERIES),
        parts(round_up(fold, heads) / heads),
        tokens(MOST_QUERIES / heads),
        most_divided(8 * threads) {}

  const int64_t fold;          // query heads of a KV head
  const int64_t heads, parts;  // of them in a piece, and pieces of them
  const int64_t tokens;        // of a piece, at most
  const int64_t most_divided;  // with fewer pieces than this, splits are pieces of their own

  int64_t blocks(int64_t count) const { return (count + tokens - 1) / tokens; }
};

// One query's answer so far: not yet divided, with its highest score and the sum of its weights behind it.
int64_t part_floats(int64_t dim) { return dim + CL_TILE; }

int64_t splits_of(const ClKv &kv, int64_t context) {
  const Pages pages(kv);
  const int64_t tiles = round_up(context, kv.block_size) / kv.block_size * pages.tiles;
  return round_up(tiles, SPLIT_TILES) / SPLIT_TILES;
}

const Attends &attends(const ClKv &kv) {
  return kv.type == CL_FLOAT32 ? attends_float32 : kv.type == CL_BFLOAT16 ? attends_bfloat16 : attends_int8;
}

float power(float x) { return exp2(broadcast(x)).part[0][0]; }

// Adds a split's answer to those before it; while those saw nothing, it is taken as it is.
void merge(float &highest, float &total, float *answer, float part_highest, float part_total, const float *part,
           int64_t dim) {
  if (total == 0) {
    highest = part_highest, total = part_total;
    memcpy(answer, part, sizeof(float) * dim);
    return;
  }
  const float top = part_highest > highest ? part_highest : highest;
  const float safe = top > -__builtin_inff() ? top : 0.0f;
  const float own = power(highest - safe), other = power(part_highest - safe);
  highest = top;
  total = total * own + part_total * other;
  for (int64_t d = 0; d < dim; d += 16)
    store(answer + d, fma(load(part + d), broadcast(other), load(answer + d) * broadcast(own)));
}

// The share of all weights; a sink is one more, of nothing.
void divide(const float *answer, float highest, float total, const float *sink, int64_t count, float *out) {
  float own = 1;
  if (sink) {
    const float score = *sink * LOG2_E, top = score > highest ? score : highest;
    own = power(highest - top);
    total = total * own + power(score - top);
  }
  const F16 factor = broadcast(own / total);
  for (int64_t d = 0; d < count; d += 16) store_some(out + d, load(answer + d) * factor, count - d);
}

class Attention {
 public:
  Attention(const ClAttention &op, const ClStep &step, const Team &team)
      : op_(op),
        step_(step),
        team_(team),
        pages_(*op.kv),
        plan_(op, team.threads),
        room_(static_cast<char *>(step.scratch) + team.rank * Room::bytes(pages_.dim), pages_.dim) {
    char *after = static_cast<char *>(step.scratch) + team.threads * Room::bytes(pages_.dim);
    out_ = op.out->f32;
    if (!out_) {
      out_ = reinterpret_cast<float *>(after);
      after += round_up(step.tokens * width() * (int64_t)sizeof(float), 64);
    }
    parts_ = reinterpret_cast<float *>(after);
    for (int64_t r = 0; r < step.rows; ++r) {
      blocks_ += plan_.blocks(count(r));
      const int64_t splits = splits_of(*op.kv, step.row_start[r] + count(r));
      splits_ = splits > splits_ ? splits : splits_;
    }
    divided_ = splits_ > 1 && blocks_ * heads() < plan_.most_divided;
  }

  void run() {
    const int64_t each = divided_ ? splits_ : 1;
    Span span;
    while (team_.take(0, heads() * blocks_ * each, 1, &span)) {
      const int64_t split = span.first % each, block = span.first / each % blocks_;
      Piece piece = find(span.first / each / blocks_, block);
      if (divided_) {
        run_split(piece, split);
      } else {
        run_all(piece);
      }
    }
    team_.barrier();
    while (team_.take(1, step_.tokens, 1, &span)) {
      if (divided_) join(span.first);
      write_row(*op_.out, span.first, out_ + span.first * width());
    }
  }

 private:
  int64_t heads() const { return op_.kv->heads * plan_.parts; }
  int64_t width() const { return op_.heads * op_.kv->dim; }
  int64_t count(int64_t row) const { return step_.row_first[row + 1] - step_.row_first[row]; }
  float *part(int64_t token, int64_t head, int64_t split) const {
    return parts_ + ((token * op_.heads + head) * splits_ + split) * part_floats(pages_.dim);
  }

  // Piece `block` of a step's rows, for part `at` of all heads. A thread asks for later and later ones.
  Piece find(int64_t at, int64_t block) {
    if (block < first_block_) row_ = first_block_ = 0;
    while (block >= first_block_ + plan_.blocks(count(row_))) first_block_ += plan_.blocks(count(row_++));
    const int64_t first = (block - first_block_) * plan_.tokens, left = count(row_) - first;
    Piece piece;
    piece.row = row_;
    piece.token = step_.row_first[row_] + first;
    piece.tokens = left < plan_.tokens ? left : plan_.tokens;
    piece.position = step_.row_start[row_] + first;
    piece.kv_head = at / plan_.parts;
    const int64_t skipped = at % plan_.parts * plan_.heads;
    piece.head = piece.kv_head * plan_.fold + skipped;
    piece.heads = plan_.fold - skipped < plan_.heads ? plan_.fold - skipped : plan_.heads;
    const int64_t seen = piece.position + 1 - op_.window;
    piece.first_tile = op_.window && seen > 0 ? tile_of(seen) : 0;
    piece.end_tile = tile_of(piece.position + piece.tokens - 1) + 1;
    return piece;
  }

  int64_t tile_of(int64_t position) const {
    return position / op_.kv->block_size * pages_.tiles + position % op_.kv->block_size / CL_TILE;
  }

  // Narrows a piece to one split; false where it has nothing of it.
  static bool narrow(Piece &piece, int64_t split) {
    const int64_t first = split * SPLIT_TILES, end = first + SPLIT_TILES;
    piece.first_tile = first > piece.first_tile ? first : piece.first_tile;
    piece.end_tile = end < piece.end_tile ? end : piece.end_tile;
    return piece.first_tile < piece.end_tile;
  }

  void run_split(Piece piece, int64_t split) {
    if (!narrow(piece, split)) return;
    float highest[MOST_QUERIES], totals[MOST_QUERIES];
    attends(*op_.kv).prepare(op_, piece, room_);
    attends(*op_.kv).split(op_, step_, piece, room_, highest, totals);
    for (int64_t q = 0; q < piece.queries(); ++q) {
      float *own = part(piece.token + q / piece.heads, piece.head + q % piece.heads, split);
      memcpy(own, room_.answers + q * pages_.dim, sizeof(float) * pages_.dim);
      own[pages_.dim] = highest[q];
      own[pages_.dim + 1] = totals[q];
    }
  }

  void run_all(const Piece &piece) {
    const int64_t dim = pages_.dim, queries = piece.queries();
    float highest[MOST_QUERIES], totals[MOST_QUERIES], part_highest[MOST_QUERIES], part_totals[MOST_QUERIES];
    for (int64_t q = 0; q < queries; ++q) {
      highest[q] = -__builtin_inff();
      totals[q] = 0;
    }
    attends(*op_.kv).prepare(op_, piece, room_);
    for (int64_t s = piece.first_tile / SPLIT_TILES; s * SPLIT_TILES < piece.end_tile; ++s) {
      Piece narrowed = piece;
      narrow(narrowed, s);
      attends(*op_.kv).split(op_, step_, narrowed, room_, part_highest, part_totals);
      for (int64_t q = 0; q < queries; ++q)
        merge(highest[q], totals[q], room_.merged + q * dim, part_highest[q], part_totals[q],
              room_.answers + q * dim, dim);
    }
    for (int64_t q = 0; q < queries; ++q)
      finish(piece.token + q / piece.heads, piece.head + q % piece.heads, room_.merged + q * dim, highest[q],
             totals[q]);
  }

  // Merges the splits of one token.
  void join(int64_t token) {
    while (token >= step_.row_first[joined_ + 1]) ++joined_;
    const int64_t position = step_.positions[token], seen = position + 1 - op_.window;
    const int64_t first = op_.window && seen > 0 ? tile_of(seen) / SPLIT_TILES : 0;
    for (int64_t h = 0; h < op_.heads; ++h) {
      float highest = -__builtin_inff(), total = 0;
      for (int64_t s = first; s <= tile_of(position) / SPLIT_TILES; ++s) {
        const float *own = part(token, h, s);
        merge(highest, total, room_.merged, own[pages_.dim], own[pages_.dim + 1], own, pages_.dim);
      }
      finish(token, h, room_.merged, highest, total);
    }
  }

  void finish(int64_t token, int64_t head, const float *answer, float highest, float total) {
    divide(answer, highest, total, op_.sinks ? op_.sinks + head : nullptr, op_.kv->dim,
           out_ + token * width() + head * op_.kv->dim);
  }

  const ClAttention &op_;
  const ClStep &step_;
  const Team &team_;
  const Pages pages_;
  const Plan plan_;
  const Room room_;
  float *out_, *parts_;
  int64_t blocks_ = 0, splits_ = 0;  // of all rows; of the longest
  int64_t row_ = 0, first_block_ = 0, joined_ = 0;
  bool divided_;
};

}  // namespace

void attention(const ClAttention &op, const ClStep &step, const Team &team) { Attention(op, step, team).run(); }

int64_t attention_scratch(const ClAttention &op, const ClLimits &limits) {
  const Pages pages(*op.kv);
  const Plan plan(op, limits.threads);
  const int64_t divided = plan.most_divided / (op.kv->heads * plan.parts) * plan.tokens;
  const int64_t tokens = divided < limits.tokens ? divided : limits.tokens;
  return limits.threads * Room::bytes(pages.dim) + round_up(limits.tokens * op.heads * op.kv->dim * 4, 64) +
         tokens * op.heads * splits_of(*op.kv, limits.context) * part_floats(pages.dim) * 4;
}

int64_t kv_page_bytes(const ClKv &kv) { return Pages(kv).bytes; }

}  // namespace CL_ISA
