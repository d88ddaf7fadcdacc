// Tiles of any codes, made plain: a panel of float32 or bfloat16 numbers, multiplied while it is in cache.
#include "dot.h"
#include "products.h"

namespace CL_ISA {
namespace {

inline I16 load_codes(const uint8_t *p) {
  typedef uint8_t ByteV __attribute__((vector_size(LANES)));
  I16 r;
  for (int i = 0; i < PARTS; ++i) {
    ByteV bytes;
    memcpy(&bytes, p + i * LANES, sizeof bytes);
    r.part[i] = __builtin_convertvector(bytes, IntV);
  }
  return r;
}

inline F16 look_up(const float *table, I16 codes, bool few) {
#if defined(__AVX512F__)
  if (few) {
    F16 r;
    r.part[0] = (FloatV)_mm512_maskz_permutexvar_ps((__mmask16)-1, (__m512i)codes.part[0], _mm512_loadu_ps(table));
    return r;
  }
#endif
  (void)few;
  int32_t at[CL_TILE];
  float values[CL_TILE];
  store(at, codes);
  for (int n = 0; n < CL_TILE; ++n) values[n] = table[at[n]];
  return load(values);
}

// A tile's codes one input after another, with the scales and zeros of its outputs.
class Decoder {
 public:
  Decoder(const ClMatrix &matrix, int64_t tile)
      : m_(matrix),
        codes_(static_cast<const uint8_t *>(matrix.weights) + tile * tile_bytes(matrix)),
        group_(matrix.group ? matrix.group : matrix.in),
        scales_(tile * scale_groups(matrix)),
        end_(0) {}

  // The numbers of 16 outputs for input k, without the factor; zeros where there is no such input.
  inline F16 at(int64_t k) {
    if (k >= m_.in) return broadcast(0.0f);
    if (k >= end_) begin(k / group_);
    I16 codes = load_codes(codes_ + (m_.bits == 4 ? k / 2 : k) * CL_TILE);
    if (m_.bits == 4) codes = (k % 2 ? codes >> 4 : codes) & broadcast(15);
    const F16 value = m_.table ? look_up(m_.table, codes, m_.bits == 4) : to_float(codes - broadcast(m_.offset));
    return (value - zero_) * scale_;
  }

 private:
  void begin(int64_t group) {
    scale_ = numbers_at(m_.scales, scales_ + group);
    zero_ = m_.zeros ? numbers_at(m_.zeros, scales_ + group) : broadcast(0.0f);
    end_ = (group + 1) * group_;
  }
  F16 numbers_at(const void *from, int64_t index) const {
    if (m_.scale_type == CL_FLOAT16) return load_half(static_cast<const uint16_t *>(from) + index * CL_TILE);
    return load(static_cast<const float *>(from) + index * CL_TILE);
  }

  const ClMatrix m_;
  const uint8_t *const codes_;
  const int64_t group_, scales_;
  int64_t end_;  // of the inputs that have these
  F16 scale_ = {}, zero_ = {};
};

// Rounded to bfloat16, each first number beside its second.
inline I16 pairs(F16 first, F16 second) {
  int16_t low[CL_TILE], high[CL_TILE];
  store_bf16(reinterpret_cast<uint16_t *>(low), first);
  store_bf16(reinterpret_cast<uint16_t *>(high), second);
  return (load_int16(low) & broadcast(int32_t(0xffff))) + (load_int16(high) << 16);
}

}  // namespace

void decode_tile(const ClMatrix &m, int64_t tile, int64_t first, int64_t units, uint8_t *panel) {
  Decoder decoder(m, tile);
  for (int64_t u = 0; u < units; ++u) {
    const int64_t k = m.decoded == CL_BFLOAT16 ? 2 * (first + u) : first + u;
    const F16 one = decoder.at(k);
    const I16 unit = m.decoded == CL_BFLOAT16 ? pairs(one, decoder.at(k + 1)) : bits(one);
    memcpy(panel + u * 64, &unit, 64);
  }
}

}  // namespace CL_ISA
