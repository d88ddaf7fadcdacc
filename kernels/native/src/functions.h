// Exponential, tanh and Gauss's integral of sixteen numbers: polynomials that give a number the same bits
// anywhere.
//
// Coefficients are our own fits (least squares, reweighted to the smallest largest error).
#pragma once

#include "simd.h"

namespace CL_ISA {
namespace {

constexpr float LOG2_E = 1.44269504f;

template <int N>
inline F16 polynomial(const float (&coefficients)[N], F16 x) {
  F16 r = broadcast(coefficients[N - 1]);
  for (int i = N - 2; i >= 0; --i) r = fma(r, x, broadcast(coefficients[i]));
  return r;
}

// 2^x within 1.5e-7 of it, and exactly 1 of 0; 0 below 2^-127, infinite from 2^128 on, NaN of NaN.
inline F16 exp2(F16 x) {
#if defined(__AVX512DQ__)
  static constexpr float FIT[] = {0.693147063f,   0.240229309f,   0.0554852821f,
                                  0.00967544969f, 0.00124678644f, 0.000216128567f};
  const __m512 value = (__m512)x.part[0];
  const F16 left = {{(FloatV)_mm512_maskz_reduce_ps(0xffff, value, 9)}};  // less the whole number below
  const F16 part = fma(polynomial(FIT, left), left, broadcast(1.0f));
  return {{(FloatV)_mm512_maskz_scalef_ps(0xffff, (__m512)part.part[0], value)}};
#else
  static constexpr float FIT[] = {0.693147182f,   0.240226477f,  0.0555033237f,
                                  0.00961843692f, 0.0013398875f, 0.000153534129f};
  const F16 round = broadcast(12582912.0f);  // 1.5 * 2^23: its last bits are whole numbers
  x = min(broadcast(128.0f), max(broadcast(-127.0f), x));
  const F16 shifted = x + round, left = x - (shifted - round);
  const F16 power = numbers((bits(shifted) + broadcast(int32_t(127 - 0x4b400000))) << 23);
  return fma(polynomial(FIT, left), left, broadcast(1.0f)) * power;
#endif
}

// What rounding took from product = x * y.
inline F16 rounded_off(F16 x, float y, F16 product) {
#if defined(__AVX512F__) || defined(__FMA__)
  return fma(x, broadcast(y), broadcast(0.0f) - product);
#else
  // Halves of 12 bits have exact products (Dekker, 1971).
  const F16 whole = broadcast(y), x_high = numbers(bits(x) & broadcast(int32_t(0xfffff000)));
  const F16 y_high = numbers(bits(whole) & broadcast(int32_t(0xfffff000)));
  const F16 x_low = x - x_high, y_low = whole - y_high;
  return ((x_high * y_high - product) + (x_high * y_low + x_low * y_high)) + x_low * y_low;
#endif
}

// e^x; 0 below -88, infinite from 88.4 on, NaN of NaN.
inline F16 exp(F16 x) {
  x = min(broadcast(90.0f), max(broadcast(-90.0f), x));
  // x * log2(e) in two parts: one product's rounding would be 6e-8 of the exponent, however large.
  const F16 high = x * broadcast(LOG2_E), low = rounded_off(x, LOG2_E, high);
  return fma(low, broadcast(0.693147182f), broadcast(1.0f)) * exp2(high);
}

inline F16 absolute(F16 x) { return numbers(bits(x) & broadcast(int32_t(0x7fffffff))); }

// Within 2e-7 of it, and of 1 where it is small.
inline F16 tanh(F16 x) {
  static constexpr float FIT[] = {-0.333333194f, 0.133326024f, -0.053853862f, 0.0210777782f, -0.0062824995f};
  const F16 size = absolute(x), square = x * x, one = broadcast(1.0f);
  const F16 small = fma(polynomial(FIT, square) * square, x, x);
  const F16 power = exp2(size * broadcast(2 * LOG2_E));
  const F16 large = one - broadcast(2.0f) / (power + one);
  return select_less(size, broadcast(0.55f), small,
                     select_less(x, broadcast(0.0f), broadcast(0.0f) - large, large));
}

// The share of a normal distribution that lies below x, within 1e-7; of numbers below -6, 0.
inline F16 normal_share(F16 x) {
  static constexpr float FIT[] = {-1.15110421f,    -0.459221452f,    -0.0524347648f,
                                  0.0069311177f,   1.49927588e-05f,  -0.000284348644f,
                                  7.49740721e-05f, -9.56025724e-06f, 5.12862129e-07f};
  const F16 size = absolute(x), zero = broadcast(0.0f);
  const F16 bounded = min(broadcast(6.0f), size);
  const F16 tail = exp2(polynomial(FIT, bounded) * bounded) * broadcast(0.5f);
  const F16 beyond = select_less(broadcast(6.0f), size, zero, tail);
  return select_less(x, zero, beyond, broadcast(1.0f) - beyond);
}

}  // namespace
}  // namespace CL_ISA
