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
  float most = 0, faults = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float size = __builtin_fabsf(x[i]);
    most = size > most ? size : most;
    faults += x[i] * 0.0f;
  }
  const float inverse = faults == 0 && most > 0 ? 127.0f / most : 0.0f;
  for (int64_t i = 0; i < count; ++i) codes[i] = inverse > 0 ? (int8_t)__builtin_rintf(x[i] * inverse) : 0;
  return most / 127.0f + faults;
}

// Stores the keys and values [dim] of one head of the token at `place` of its page.
inline void store_token(const Pages &pages, char *head, int64_t place, const float *key, const float *value) {
  const int64_t tile = place / CL_TILE, lane = place % CL_TILE, count = pages.kv.dim;
  if (pages.kv.type == CL_FLOAT32) {
    float *keys = (float *)pages.keys(head, tile), *values = (float *)pages.values(head, tile);
    for (int64_t d = 0; d < count; ++d) keys[key_place<1>(d, lane)] = key[d];
    memcpy(values + lane * pages.dim, value, sizeof(float) * count);
  } else if (pages.kv.type == CL_BFLOAT16) {
    uint16_t *keys = (uint16_t *)pages.keys(head, tile), *values = (uint16_t *)pages.values(head, tile);
    uint16_t rounded[16];
    for (int64_t first = 0; first < count; first += 16) {
      const int64_t some = count - first < 16 ? count - first : 16;
      store_bf16(rounded, load_some(key + first, some));
      for (int64_t d = 0; d < some; ++d) keys[key_place<2>(first + d, lane)] = rounded[d];
      store_bf16(rounded, load_some(value + first, some));
      for (int64_t d = 0; d < some; ++d) values[value_place<2>(first + d, lane, pages.dim)] = rounded[d];
    }
  } else {
    int8_t codes[512], *keys = (int8_t *)pages.keys(head, tile), *values = (int8_t *)pages.values(head, tile);
    pages.key_scales(head, tile)[lane] = quantise_head(key, count, codes);
    for (int64_t d = 0; d < count; ++d) keys[key_place<4>(d, lane)] = codes[d];
    pages.value_scales(head, tile)[lane] = quantise_head(value, count, codes);
    for (int64_t d = 0; d < count; ++d) values[value_place<2>(d, lane, pages.dim)] = codes[d];
  }
}

}  // namespace
}  // namespace CL_ISA
