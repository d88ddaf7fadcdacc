// How matrices are laid out in tiles, and the numbers of one of their rows.
#include "dot.h"
#include "products.h"

namespace CL_ISA {
namespace {

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where code k of output n lies in a tile, for one byte or one number each.
int64_t place(const ClMatrix &m, int64_t k, int64_t n) {
  switch (m.kind) {
    case CL_F32: return k * CL_TILE + n;
    case CL_BF16: return k / 2 * 32 + n * 2 + k % 2;
    case CL_W8A8: return k / 4 * 64 + n * 4 + k % 4;
    case CL_W4A8: return k / 8 * 64 + n * 4 + k % 4;
    default: return (m.bits == 4 ? k / 2 : k) * CL_TILE + n;
  }
}

// Whether code k is the high one of its byte's two.
bool high(const ClMatrix &m, int64_t k) { return m.kind == CL_W4A8 ? k / 4 % 2 : k % 2; }

bool halves(const ClMatrix &m) { return m.kind == CL_W4A8 || (m.kind == CL_DECODED && m.bits == 4); }

float number(const ClMatrix &m, const void *from, int64_t at) {
  return m.scale_type == CL_FLOAT16 ? from_half(static_cast<const uint16_t *>(from)[at])
                                    : static_cast<const float *>(from)[at];
}

int code_of(const ClMatrix &m, const uint8_t *tile, int64_t k, int64_t n) {
  const int byte = tile[place(m, k, n)];
  if (!halves(m)) return byte;
  return high(m, k) ? byte >> 4 : byte & 15;
}

}  // namespace

Form form_of(const ClMatrix &m) {
  if (m.kind == CL_F32 || (m.kind == CL_DECODED && m.decoded == CL_FLOAT32)) return Form::FLOAT32;
  if (m.kind == CL_BF16 || m.kind == CL_DECODED) return Form::BFLOAT16;
  return m.kind == CL_W8A8 && m.group == 0 ? Form::ROW : Form::GROUPS;
}

int64_t scale_groups(const ClMatrix &m) { return m.group ? up(m.in, m.group) : 1; }

int64_t tile_units(const ClMatrix &m) {
  switch (form_of(m)) {
    case Form::FLOAT32: return m.in;
    case Form::BFLOAT16: return up(m.in, 2);
    case Form::ROW: return up(m.in, 4);
    default: return up(m.in, CL_GROUP) * GROUP_UNITS;
  }
}

int64_t tile_bytes(const ClMatrix &m) {
  if (m.kind == CL_DECODED) return (m.bits == 4 ? up(m.in, 2) : m.in) * CL_TILE;
  return tile_units(m) * (m.kind == CL_W4A8 ? 32 : 64);
}

int64_t packed_bytes(const ClMatrix &m) { return up(m.out, CL_TILE) * tile_bytes(m); }

void pack(const ClMatrix &matrix, const void *source, int64_t first, int64_t rows, void *packed) {
  const ClMatrix m = matrix;  // a copy that no store can change: what depends on it leaves the loops
  const bool half = halves(m);
  const int64_t item = m.kind == CL_F32 ? 4 : m.kind == CL_BF16 ? 2 : 1, bytes = tile_bytes(m);
  const char *from = static_cast<const char *>(source);
  for (int64_t i = 0; i < rows; ++i, from += m.in * item) {
    char *tile = static_cast<char *>(packed) + (first + i) / CL_TILE * bytes;
    const int64_t n = (first + i) % CL_TILE;
    for (int64_t k = 0; k < m.in; ++k) {
      char *to = tile + place(m, k, n) * item;
      if (half)
        *to = (char)((*to & (high(m, k) ? 15 : 240)) | (from[k] & 15) << (high(m, k) ? 4 : 0));
      else if (item == 1)
        *to = from[k];
      else
        memcpy(to, from + k * item, item);
    }
  }
}

void unpack_row(const ClMatrix &m, int64_t row, float *out) {
  const int64_t tile = row / CL_TILE, n = row % CL_TILE, group = m.group ? m.group : m.in;
  const uint8_t *at = static_cast<const uint8_t *>(m.weights) + tile * tile_bytes(m);
  for (int64_t k = 0; k < m.in; ++k) {
    float *to = out + (m.order ? m.order[k] : k);
    if (m.kind == CL_F32) {
      memcpy(to, at + 4 * place(m, k, n), 4);
    } else if (m.kind == CL_BF16) {
      *to = from_bf16(reinterpret_cast<const uint16_t *>(at)[place(m, k, n)]);
    } else {
      const int code = code_of(m, at, k, n);
      const int64_t s = (tile * scale_groups(m) + k / group) * CL_TILE + n;
      const float value = m.table ? m.table[code] : (float)(code - m.offset);
      const float zero = m.zeros ? number(m, m.zeros, s) : 0.0f;
      *to = (value - zero) * number(m, m.scales, s) * m.factor;
    }
  }
}

}  // namespace CL_ISA
