// Functions of registers: the exponential and the reciprocal. Each takes the element type T that the result is rounded to in the
// end: 16 bits need fewer terms.
#pragma once
#include "simd.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {

inline Vec<float> minus_magnitude(Vec<float> v) { return reinterpret_cast<Vec<float>>(reinterpret_cast<Bits>(v) | 0x80000000u); }
inline Vec<double> minus_magnitude(Vec<double> v) { return v > 0 ? -v : v; }

// e^x for x <= 0, to about one unit in the last place of float32, to 3e-6 of the value for float16 and to 5e-5 for bfloat16; what is
// smaller than the smallest normal number is 0. NaN stays NaN.
//
// e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln(2) / 2, where e^r is its Taylor polynomial. Adding 1.5 * 2^23 rounds to an
// integer, which then stands in the low bits of the sum; adding 127 more makes it the exponent field of 2^n.
template <class T>
inline Vec<float> exp_of_negative(Vec<float> x) {
  constexpr float magic = 0x1.8p23f + 127;
  x = at_least(x, -88.0f);  // there n = -127, and the exponent field of 2^n is that of zero
  const Vec<float> shifted = x * 0x1.715476p0f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> scale = reinterpret_cast<Vec<float>>(reinterpret_cast<Bits>(shifted) << 23);
  Vec<float> r = x - n * 0x1.62e400p-1f, p;  // ln 2 in two parts; n times the first is exact
  if constexpr (sizeof(T) == 4) {
    r -= n * 0x1.7f7d1cp-20f;
    p = r * (1 / 5040.0f) + (1 / 720.0f);
    p = p * r + (1 / 120.0f);
    p = p * r + (1 / 24.0f);
  } else if constexpr (is_bfloat16<T>) {
    p = Vec<float>{} + (1 / 24.0f);
  } else {
    p = r * (1 / 120.0f) + (1 / 24.0f);
  }
  p = p * r + (1 / 6.0f);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * scale;
}
template <class T>
inline Vec<double> exp_of_negative(Vec<double> x) {
  for (int i = 0; i < VecOf<double>::size; i++) x[i] = __builtin_exp(x[i]);
  return x;
}

// 1 / v for 1 <= v <= 2.
template <class T>
inline Vec<float> reciprocal(Vec<float> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {  // an estimate to 14 bits, for float16 improved by a step of Newton's method
    const Vec<float> estimate = reinterpret_cast<Vec<float>>(_mm512_rcp14_ps(reinterpret_cast<__m512>(v)));
    return is_bfloat16<T> ? estimate : estimate * (2.0f - v * estimate);
  }
#endif
  return 1.0f / v;
}
template <class T>
inline Vec<double> reciprocal(Vec<double> v) {
  return 1.0 / v;
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
