// How a step's attention is cut into pieces, and what the parts of it share.
//
// A context is cut by position, the same for every query: tiles of 16 tokens (of a page, so its last may hold
// fewer), blocks of 16 tiles, splits of 4 blocks. Within a split a query goes block after block, as in
// FlashAttention; the answers of splits are merged in order, whether one thread has them all or several. So the
// bits of a token's answer depend neither on what shares the step, nor on how the prompt was cut, nor on the
// number of threads. What a query does not see adds exact zeros.
//
// Source: Dao et al., "FlashAttention", NeurIPS 2022; Ainslie et al., "GQA", EMNLP 2023; Dao et al.,
// "Flash-Decoding", 2023 (splits); Xiao et al., ICLR 2024 (sinks).
#pragma once

#include "functions.h"
#include "ops.h"
#include "pages.h"

namespace CL_ISA {

constexpr int64_t QUERY_STRIDE = MOST_DIM + 32;  // no power of two, so that rows share no places in a cache
constexpr int64_t MOST_QUERIES = 32;             // of a piece: query heads of a KV head, times tokens
constexpr int64_t BLOCK_TILES = 16;
constexpr int64_t BLOCK = BLOCK_TILES * CL_TILE;  // tokens at most
constexpr int64_t SPLIT_TILES = 4 * BLOCK_TILES;

// Some tokens of one row, and query heads of one KV head.
struct Piece {
  int64_t row, token, tokens, position;  // the first token's place in the step, and in its row
  int64_t kv_head, head, heads;
  int64_t first_tile, end_tile;  // of the row's context, that it attends to

  int64_t queries() const { return tokens * heads; }
};

// What one thread works in, for MOST_QUERIES queries.
struct Room {
  float *scales;   // [queries] of their codes
  void *queries;   // [queries + 1][QUERY_STRIDE] in the format's numbers
  float *weights;  // [queries + 1][BLOCK] scores; then weights, in the format's numbers
  void *edge;      // a tile of values
  float *answers;  // [queries][dim] of the split so far
  float *merged;   // [queries][dim] of the splits before

  static int64_t bytes(int64_t dim) {
    return (int64_t)sizeof(float) *
           (MOST_QUERIES + (MOST_QUERIES + 1) * (QUERY_STRIDE + BLOCK) + CL_TILE * dim + 2 * MOST_QUERIES * dim);
  }
  Room(char *room, int64_t dim)
      : scales((float *)room),
        queries(scales + MOST_QUERIES),
        weights((float *)queries + (MOST_QUERIES + 1) * QUERY_STRIDE),
        edge(weights + (MOST_QUERIES + 1) * BLOCK),
        answers((float *)edge + CL_TILE * dim),
        merged(answers + MOST_QUERIES * dim) {}
};

// Makes rows of a piece's queries, in room.queries.
typedef void PrepareQueries(const ClAttention &op, const Piece &piece, const Room &room);

// Attends with them to the tiles of a piece, all within one split, from nothing; leaves the answers, not yet
// divided, in room.answers, their highest scores (in powers of two), and the sums of their weights.
typedef void AttendSplit(const ClAttention &op, const ClStep &step, const Piece &piece, const Room &room,
                         float *highest, float *totals);

struct Attends {
  PrepareQueries *prepare;
  AttendSplit *split;
};
extern const Attends attends_float32, attends_bfloat16, attends_int8;

}  // namespace CL_ISA
