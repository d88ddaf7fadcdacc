// Where the keys and values of a token lie in a KV page, laid out so that sixteen tokens' scores are one vector.
//
// A page holds head after head; a head, tiles of 16 tokens of keys, then of values, then (int8) 16 scales a tile
// of keys, then of values. D is dim rounded up to 16. One tile, n = 1 number (float32), 2 (bfloat16), or 4 (int8
// keys):
//   keys   [D / n][16 tokens][n dims]
//   values [16 / n][D][n tokens], n = 2 of int8 too
// so a page takes heads * ceil(block_size / 16) * 16 * (2 * D * bytes of a number + 8 where int8) bytes. All zeros
// are keys and values of zero.
#pragma once

#include "rows.h"

namespace CL_ISA {
namespace {

constexpr int64_t MOST_DIM = 512;

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Pages {
  explicit Pages(const ClKv &kv)
      : kv(kv),
        dim(round_up(kv.dim, CL_TILE)),
        tiles(round_up(kv.block_size, CL_TILE) / CL_TILE),
        size(kv.type == CL_FLOAT32    ? 4
             : kv.type == CL_BFLOAT16 ? 2
                                      : 1),
        tile_bytes(CL_TILE * dim * size),
        head_bytes(tiles * (2 * tile_bytes + (kv.type == CL_INT8 ? 2 * 4 * CL_TILE : 0))),
        bytes(kv.heads * head_bytes) {}

  const ClKv &kv;
  const int64_t dim, tiles, size, tile_bytes, head_bytes, bytes;

  char *head(int64_t layer, int64_t block, int64_t head) const {
    return static_cast<char *>(kv.pages) + (layer * kv.blocks + block) * bytes + head * head_bytes;
  }
  char *keys(char *head, int64_t tile) const { return head + tile * tile_bytes; }
  char *values(char *head, int64_t tile) const { return head + (tiles + tile) * tile_bytes; }
  float *key_scales(char *head, int64_t tile) const {
    return reinterpret_cast<float *>(head + 2 * tiles * tile_bytes) + tile * CL_TILE;
  }
  float *value_scales(char *head, int64_t tile) const { return key_scales(head, tiles + tile); }
};

// Places of dimension d of token `lane` of a tile.
template <int N>
inline int64_t key_place(int64_t d, int64_t lane) {
  return (d / N * CL_TILE + lane) * N + d % N;
}
template <int N>
inline int64_t value_place(int64_t d, int64_t lane, int64_t dim) {
  return (lane / N * dim + d) * N + lane % N;
}

// Codes of one token's head, with the scale that makes numbers of them: NaN where a number is not finite.
inline float quantise_head(const float *x, int64_t count, int8_t *codes) {
  float scale;
  int32_t sum;
  quantise(x, count, count, codes, &scale, &sum, count);
  return scale;
}

// Two tokens' numbers as pairs of bfloat16, each pair in a lane.
inline void store_pairs(uint16_t *out, F16 first, F16 second) {
  uint16_t pairs[2][16];
  store_bf16(pairs[0], first);
  store_bf16(pairs[1], second);
  const I16 low = load_int16((const int16_t *)pairs[0]) & broadcast(int32_t(0xffff));
  store((int32_t *)out, low + (load_int16((const int16_t *)pairs[1]) << 16));
}

// Tokens of one tile, from lane `lane` on: the keys or values of one head, `stride` numbers from token to token.
struct Run {
  const float *x;
  int64_t stride, lane, count, numbers;  // of each token
};

inline void store_keys(const Run &run, uint16_t *tile) {
  for (int64_t t = 0; t < run.count; ++t)
    for (int64_t d = 0; d < run.numbers; d += 16) {
      const int64_t left = run.numbers - d;
      uint16_t rounded[16];
      store_bf16(rounded, load_some(run.x + t * run.stride + d, left));
      for (int64_t i = 0; i < 16 && i < left; i += 2)  // of an odd number the last has a zero beside it
        memcpy(tile + key_place<2>(d + i, run.lane + t), rounded + i, 2 * sizeof(uint16_t));
    }
}

inline void store_values(const Run &run, uint16_t *tile, int64_t dim) {
  for (int64_t t = 0; t < run.count; ++t) {
    const int64_t lane = run.lane + t;
    const float *x = run.x + t * run.stride;
    const bool pair = lane % 2 == 0 && t + 1 < run.count;
    for (int64_t d = 0; d < run.numbers; d += 16) {
      const int64_t left = run.numbers - d;
      if (pair) {
        store_pairs(tile + value_place<2>(d, lane, dim), load_some(x + d, left),
                    load_some(x + run.stride + d, left));
        continue;
      }
      uint16_t rounded[16];
      store_bf16(rounded, load_some(x + d, left));
      for (int64_t i = 0; i < 16 && i < left; ++i) tile[value_place<2>(d + i, lane, dim)] = rounded[i];
    }
    t += pair;
  }
}

inline void store_keys(const Run &run, float *tile) {
  for (int64_t t = 0; t < run.count; ++t)
    for (int64_t d = 0; d < run.numbers; ++d) tile[key_place<1>(d, run.lane + t)] = run.x[t * run.stride + d];
}
inline void store_values(const Run &run, float *tile, int64_t dim) {
  for (int64_t t = 0; t < run.count; ++t)
    memcpy(tile + (run.lane + t) * dim, run.x + t * run.stride, sizeof(float) * run.numbers);
}

inline void store_keys(const Run &run, int8_t *tile, float *scales) {
  int8_t codes[MOST_DIM];
  for (int64_t t = 0; t < run.count; ++t) {
    scales[run.lane + t] = quantise_head(run.x + t * run.stride, run.numbers, codes);
    for (int64_t d = 0; d < run.numbers; ++d) tile[key_place<4>(d, run.lane + t)] = codes[d];
  }
}
inline void store_values(const Run &run, int8_t *tile, int64_t dim, float *scales) {
  int8_t codes[MOST_DIM];
  for (int64_t t = 0; t < run.count; ++t) {
    scales[run.lane + t] = quantise_head(run.x + t * run.stride, run.numbers, codes);
    for (int64_t d = 0; d < run.numbers; ++d) tile[value_place<2>(d, run.lane + t, dim)] = codes[d];
  }
}

inline void store_tokens(const Pages &pages, char *head, int64_t tile, const Run &keys, const Run &values) {
  char *to_keys = pages.keys(head, tile), *to_values = pages.values(head, tile);
  if (pages.kv.type == CL_FLOAT32) {
    store_keys(keys, (float *)to_keys);
    store_values(values, (float *)to_values, pages.dim);
  } else if (pages.kv.type == CL_BFLOAT16) {
    store_keys(keys, (uint16_t *)to_keys);
    store_values(values, (uint16_t *)to_values, pages.dim);
  } else {
    store_keys(keys, (int8_t *)to_keys, pages.key_scales(head, tile));
    store_values(values, (int8_t *)to_values, pages.dim, pages.value_scales(head, tile));
  }
}

}  // namespace
}  // namespace CL_ISA
