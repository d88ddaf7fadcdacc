// Attention of a piece's queries to one split of their context, in one format of keys and one of values.
#pragma once

#include "attention.h"
#include "attention_products.h"

namespace CL_ISA {
namespace {

// The tiles of a block, and the positions they hold.
struct Block {
  int64_t tiles = 0;
  int64_t position[BLOCK_TILES], held[BLOCK_TILES];  // of the first token; tokens
  char *head[BLOCK_TILES];
  int64_t tile[BLOCK_TILES];  // of its page
  bool whole[BLOCK_TILES];    // every query of the piece sees all of it
};

inline Block block_of(const ClAttention &op, const ClStep &step, const Pages &pages, const Piece &piece,
                      int64_t first, int64_t end) {
  Block block;
  const int32_t *table = step.tables + step.table_first[piece.row];
  const int64_t size = pages.kv.block_size, last = piece.position + piece.tokens - 1;
  for (int64_t at = first; at < end; ++at) {
    const int64_t page = at / pages.tiles, tile = at % pages.tiles, left = size - tile * CL_TILE,
                  i = block.tiles++;
    block.position[i] = page * size + tile * CL_TILE;
    block.held[i] = left < CL_TILE ? left : CL_TILE;
    block.head[i] = pages.head(op.layer, table[page], piece.kv_head);
    block.tile[i] = tile;
    block.whole[i] = block.held[i] == CL_TILE && block.position[i] + CL_TILE <= piece.position + 1 &&
                     (!op.window || block.position[i] > last - op.window);
  }
  return block;
}

// What a query sees of a tile: lanes low .. high - 1.
struct Seen {
  int low, high;
};

inline int bounded(int64_t lane, int64_t held) { return (int)(lane < 0 ? 0 : lane < held ? lane : held); }

inline Seen seen(const Block &block, int64_t tile, int64_t position, int64_t window) {
  const int64_t last = position + 1 - block.position[tile], held = block.held[tile];
  return {window ? bounded(last - window, held) : 0, bounded(last, held)};
}

// Queries as rows of numbers, times what makes their scores powers of two, or arguments of tanh.
template <typename Keys>
struct Queries {
  typedef typename Keys::Number Number;
  static constexpr bool CODED = false;

  static void put(const float *query, int64_t count, int64_t dim, float factor, Number *out, float *) {
    for (int64_t d = 0; d < dim; d += 16)
      Keys::put(out + d, load_some(query + d, d < count ? count - d : 0) * broadcast(factor));
  }
  static void put_last(int64_t, Number *) {}
  static int64_t rows(int64_t queries) { return queries; }
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// In codes; a last row of 128 alone gives what to take off for their not being signed.
template <>
struct Queries<Int8Keys> {
  static constexpr bool CODED = true;

  static void put(const float *query, int64_t count, int64_t dim, float factor, uint8_t *out, float *scale) {
    int8_t codes[MOST_DIM];
    *scale = quantise_head(query, count, codes) * factor;
    for (int64_t d = 0; d < dim; ++d) out[d] = (uint8_t)(128 + (d < count ? codes[d] : 0));
  }
  static void put_last(int64_t dim, uint8_t *out) { memset(out, 128, dim); }
  static int64_t rows(int64_t queries) { return queries + 1; }
};
#endif

template <typename Keys, typename Values>
struct Split {
  typedef typename Keys::Number Query;
  typedef typename Values::Number Weight;
  typedef typename Values::Stored Value;
  typedef Queries<Keys> Rows;
  static constexpr bool SCALED = sizeof(Value) == 1;

  static void prepare(const ClAttention &op, const Piece &piece, const Room &room) {
    const float factor = op.softcap != 0 ? op.scale / op.softcap : op.scale * LOG2_E;
    const int64_t width = (op.heads + 2 * op.kv->heads) * op.kv->dim, count = op.kv->dim,
                  dim = round_up(count, CL_TILE);
    Query *out = static_cast<Query *>(room.queries);
    for (int64_t q = 0; q < piece.queries(); ++q) {
      const float *token = op.qkv + (piece.token + q / piece.heads) * width;
      Rows::put(token + (piece.head + q % piece.heads) * count, count, dim, factor, out + q * QUERY_STRIDE,
                room.scales + q);
    }
    Rows::put_last(dim, out + piece.queries() * QUERY_STRIDE);
  }

  // Scales, bounds and hides one query's scores; the highest of what it sees.
  static float finish_scores(const ClAttention &op, const Pages &pages, const Block &block, int64_t position,
                             float scale, const float *last, float *scores) {
    const F16 none = broadcast(-__builtin_inff());
    F16 most = none;
    for (int64_t t = 0; t < block.tiles; ++t) {
      F16 some = load(scores + t * CL_TILE);
      if (Rows::CODED) some = (some - load(last + t * CL_TILE)) * broadcast(scale);
      if (SCALED) some = some * load(pages.key_scales(block.head[t], block.tile[t]));
      if (op.softcap != 0) some = tanh(some) * broadcast(op.softcap * LOG2_E);
      if (!block.whole[t]) {
        const Seen inside = seen(block, t, position, op.window);
        some = select(inside.low, inside.high, some, none);
      }
      if (SCALED || op.softcap != 0 || !block.whole[t]) store(scores + t * CL_TILE, some);
      most = max(most, some);
    }
    return highest(most);
  }

  // Weights 2^(scores - top), written over the scores; their sum, in sixteen lanes added up last.
  static float weigh_scores(const Pages &pages, const Block &block, float top, float *scores) {
    Weight *weights = reinterpret_cast<Weight *>(scores);
    F16 total = {};
    const F16 zero = {};
    for (int64_t t = 0; t < block.tiles; ++t) {
      F16 some = exp2(load(scores + t * CL_TILE) - broadcast(top));
      total = total + some;
      if (SCALED) {  // what is not seen has no weight, whatever its scale is
        const F16 scaled = some * load(pages.value_scales(block.head[t], block.tile[t]));
        some = select_equal(some, zero, zero, scaled);
      }
      Values::put(weights + t * CL_TILE, some);
    }
    return sum(total);
  }

  // A tile of which the first `unseen` tokens are seen by no query: zeros instead of them, whatever is there.
  static const Value *without(const Value *values, int64_t unseen, int64_t dim, void *edge) {
    Value *copy = static_cast<Value *>(edge);
    memcpy(copy, values, sizeof(Value) * CL_TILE * dim);
    for (int64_t lane = 0; lane < unseen; ++lane)
      for (int64_t d = 0; d < dim; ++d) copy[value_place<Values::STEP>(d, lane, dim)] = 0;
    return copy;
  }

  // While keys are read their tiles' values are fetched, while values are, the next block's keys: memory never
  // rests.
  static void score(const Pages &pages, const Piece &piece, const Block &block, const Room &room) {
    Tiles<Keys> keys;
    keys.count = block.tiles, keys.dim = pages.dim;
    for (int64_t t = 0; t < block.tiles; ++t) {
      keys.tiles[t] = reinterpret_cast<const typename Keys::Stored *>(pages.keys(block.head[t], block.tile[t]));
      keys.ahead[t] = reinterpret_cast<const typename Keys::Stored *>(pages.values(block.head[t], block.tile[t]));
    }
    score_all<Keys>(Rows::rows(piece.queries()), static_cast<const Query *>(room.queries), keys, true,
                    room.weights);
  }

  static void weigh(const ClAttention &op, const Pages &pages, const Piece &piece, const Block &block,
                    const Block &next, const Room &room, const float *decay) {
    Tiles<Values> values;
    values.count = block.tiles, values.dim = pages.dim;
    for (int64_t t = 0; t < block.tiles; ++t) {
      const int64_t then = t < next.tiles ? t : 0;
      values.tiles[t] = reinterpret_cast<const Value *>(pages.values(block.head[t], block.tile[t]));
      values.ahead[t] = values.tiles[t];
      if (next.tiles)
        values.ahead[t] = reinterpret_cast<const Value *>(pages.keys(next.head[then], next.tile[then]));
    }
    const Seen first = seen(block, 0, piece.position, op.window);
    if (first.low > 0) values.tiles[0] = without(values.tiles[0], first.low, pages.dim, room.edge);
    weigh_all<Values>(piece.queries(), reinterpret_cast<const Weight *>(room.weights), values, decay,
                      next.tiles > 0, room.answers);
  }

  static void attend(const ClAttention &op, const Pages &pages, const Piece &piece, const Block &block,
                     const Block &next, const Room &room, float *highest, float *totals) {
    const int64_t queries = piece.queries();
    float decay[MOST_QUERIES] = {};
    score(pages, piece, block, room);
    for (int64_t q = 0; q < queries; ++q) {
      const float most = finish_scores(op, pages, block, piece.position + q / piece.heads, room.scales[q],
                                       room.weights + queries * BLOCK, room.weights + q * BLOCK);
      decay[q] = highest[q];
      highest[q] = most > highest[q] ? most : highest[q];
    }
    decays(queries, highest, decay);
    for (int64_t q = 0; q < queries; ++q) {
      const float top = highest[q] > -__builtin_inff() ? highest[q] : 0.0f;
      totals[q] = totals[q] * decay[q] + weigh_scores(pages, block, top, room.weights + q * BLOCK);
    }
    weigh(op, pages, piece, block, next, room, decay);
  }

  // decay = 2^(decay - highest), of what a query has so far: exactly 1 where the highest stays.
  static void decays(int64_t queries, const float *highest, float *decay) {
    const F16 none = broadcast(-__builtin_inff());
    for (int64_t q = 0; q < queries; q += 16) {
      const F16 now = load(highest + q), safe = select_less(none, now, now, broadcast(0.0f));
      store(decay + q, exp2(load(decay + q) - safe));
    }
  }

  static void run(const ClAttention &op, const ClStep &step, const Piece &piece, const Room &room, float *highest,
                  float *totals) {
    const Pages pages(*op.kv);
    for (int64_t q = 0; q < MOST_QUERIES; ++q) {
      highest[q] = -__builtin_inff();
      totals[q] = 0;
    }
    memset(room.answers, 0, sizeof(float) * piece.queries() * pages.dim);
    const auto from = [&](int64_t at) {
      const int64_t next = (at / BLOCK_TILES + 1) * BLOCK_TILES;
      return block_of(op, step, pages, piece, at, next < piece.end_tile ? next : piece.end_tile);
    };
    Block block = from(piece.first_tile);
    for (int64_t at = piece.first_tile; at < piece.end_tile; at = (at / BLOCK_TILES + 1) * BLOCK_TILES) {
      const Block next = from((at / BLOCK_TILES + 1) * BLOCK_TILES);
      attend(op, pages, piece, block, next, room, highest, totals);
      block = next;
    }
  }
};

}  // namespace
}  // namespace CL_ISA
