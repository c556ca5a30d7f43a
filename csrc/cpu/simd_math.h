// Functions of registers: the exponential, the logarithm, the sigmoid. Some take the element type T that the result is rounded to in the
// end, or the degree of a polynomial: 16 bits need fewer terms.
#pragma once
#include "simd.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

ALWAYS_INLINE Vec<float> minus_magnitude(Vec<float> v) { return reinterpret_cast<Vec<float>>(reinterpret_cast<Bits>(v) | 0x80000000u); }
ALWAYS_INLINE Vec<double> minus_magnitude(Vec<double> v) { return v > 0 ? -v : v; }

// e^x for x <= 0, to about one unit in the last place. Below -87.68, in the midst of the subnormal numbers, it is 0. NaN stays NaN.
//
// e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln(2) / 2, where e^r is a polynomial 1 + r + r^2 (c0 + c1 r + ...) of the least
// largest relative error, evaluated by pairs of terms, because the processor waits for each sum that the next one needs. Adding
// 1.5 * 2^23 rounds to an integer, which then stands in the low bits of the sum; adding 127 more makes it the exponent field of 2^n.
ALWAYS_INLINE Vec<float> exp_of_negative(Vec<float> x) {
  constexpr float magic = 0x1.8p23f + 127;
  x = at_least(x, -88.0f);  // there n = -127, and the exponent field of 2^n is that of zero
  const Vec<float> shifted = x * 0x1.715476p0f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> scale = reinterpret_cast<Vec<float>>(reinterpret_cast<Bits>(shifted) << 23);
  const Vec<float> r = (x - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts; n times the first is exact
  const Vec<float> square = r * r;
  const Vec<float> p = (r * 0.16666521f + 0.49999993f) + square * (square * 1.3814584e-3f + (r * 8.3687239e-3f + 0.041668388f));
  return (p * square + (r + 1.0f)) * scale;
}
// In double: Taylor's polynomial of degree 13 (4e-18 at log(2) / 2). Below -708.74 it is 0.
ALWAYS_INLINE Vec<double> exp_of_negative(Vec<double> x) {
  constexpr double magic = 0x1.8p52 + 1023;
  x = at_least(x, -709.0);
  const Vec<double> shifted = x * 0x1.71547652b82fep0 + magic;
  const Vec<double> n = shifted - magic;
  const Vec<double> scale = reinterpret_cast<Vec<double>>(reinterpret_cast<WideBits>(shifted) << 52);
  const Vec<double> r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  const Vec<double> s = r * r;
  const Vec<double> even = 1. / 2 + s * (1. / 24 + s * (1. / 720 + s * (1. / 40320 + s * (1. / 3628800 + s * (1. / 479001600)))));
  const Vec<double> odd = 1. / 6 + s * (1. / 120 + s * (1. / 5040 + s * (1. / 362880 + s * (1. / 39916800 + s * (1. / 6227020800)))));
  return (1 + (r + s * (even + r * odd))) * scale;
}

// 2^x of N registers for x < 127, in two steps, so that a loop can begin the next ones before it finishes these: x is an integer and a
// rest, and 2^rest a polynomial of DEGREE, with 2^0 = 1 exactly. Relative errors: 1.0e-4, 2.9e-6, 1.1e-7, 2e-8 for degrees 3 to 6, to
// which float32 adds its own. What is smaller than 2^-126 is 0 or, with AVX-512, subnormal; NaN stays NaN.
template <int DEGREE, int N = 1>
class Exp2 {
 public:
  ALWAYS_INLINE void begin(int i, Vec<float> x) {
#if defined(__AVX512F__)
    constexpr int round_down = 9;
    x_[i] = x;
    rest_[i] = reinterpret_cast<Vec<float>>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), round_down));  // of -infinity: 0
#else
    constexpr float magic = 0x1.8p23f + 127;  // as in exp_of_negative
    x = at_least(x, -127.0f);
    x_[i] = x + magic;
    rest_[i] = x - (x_[i] - magic);
#endif
  }

  // Term by term: the registers do not wait for each other.
  ALWAYS_INLINE void finish(Vec<float>* values) const {
    static_assert(DEGREE >= 3 && DEGREE <= 6);
    const auto& a = COEFFICIENTS[DEGREE - 3];
    Vec<float> p[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) p[i] = Vec<float>{} + a[DEGREE];
#pragma GCC unroll 6
    for (int k = DEGREE - 1; k >= 0; k--)
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) p[i] = p[i] * rest_[i] + a[k];
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
#if defined(__AVX512F__)  // which rounds x down itself
      values[i] = reinterpret_cast<Vec<float>>(_mm512_scalef_ps(reinterpret_cast<__m512>(p[i]), reinterpret_cast<__m512>(x_[i])));
#else
      values[i] = p[i] * reinterpret_cast<Vec<float>>(reinterpret_cast<Bits>(x_[i]) << 23);
#endif
    }
  }

 private:
#if defined(__AVX512F__)  // the rest is from 0 to 1
  static constexpr float COEFFICIENTS[][7] = {{1, 0.69511682f, 0.22764491f, 0.077067062f},
                                              {1, 0.69304484f, 0.24128021f, 0.052242506f, 0.013426642f},
                                              {1, 0.69315130f, 0.24016450f, 0.055799901f, 0.0090169972f, 0.0018671363f},
                                              {1, 0.69314706f, 0.24022923f, 0.055485327f, 0.0096754683f, 0.0012467816f, 2.1612718e-4f}};
#else  // from -1/2 to 1/2, and the low bits of x_ are the integer + 127
  static constexpr float COEFFICIENTS[][7] = {{1, 0.69328290f, 0.24221097f, 0.055008929f},
                                              {1, 0.69312418f, 0.24024099f, 0.055906426f, 0.0095828529f},
                                              {1, 0.69314700f, 0.24022242f, 0.055507336f, 0.0096715130f, 0.0013264727f},
                                              {1, 0.69314718f, 0.24022648f, 0.055503324f, 0.0096184369f, 0.0013398875f, 1.5353362e-4f}};
#endif
  Vec<float> x_[N], rest_[N];
};

// a b - c, rounded once where the processor can, whatever the compiler makes of products and differences.
#if defined(__AVX512F__) || defined(__FMA__)
constexpr bool ROUNDS_ONCE = true;
#else
constexpr bool ROUNDS_ONCE = false;
#endif
ALWAYS_INLINE Vec<float> product_less(Vec<float> a, float b, float c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_fmsub_ps(reinterpret_cast<__m512>(a), _mm512_set1_ps(b), _mm512_set1_ps(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Vec<float>>(_mm256_fmsub_ps(reinterpret_cast<__m256>(a), _mm256_set1_ps(b), _mm256_set1_ps(c)));
#else
  return a * b - c;
#endif
}

template <int DEGREE>
ALWAYS_INLINE Vec<float> exp2_of(Vec<float> x) {
  Exp2<DEGREE> power;
  power.begin(0, x);
  power.finish(&x);
  return x;
}

// The same for any x: it is infinity from 127.5 on, with AVX-512 from 128 on.
template <int DEGREE>
ALWAYS_INLINE Vec<float> exp2_of_any(Vec<float> x) {
#if !defined(__AVX512F__)  // which does so by itself
  x = at_most(x, 128.0f);
#endif
  return exp2_of<DEGREE>(x);
}

// ln x of normal x > 0, to about one unit in the last place; NaN stays NaN. x = 2^n m with m in [sqrt(1/2), sqrt(2)): ln 2 is taken in two
// parts, and ln m is Cephes' polynomial in m - 1.
ALWAYS_INLINE Vec<float> log_of(Vec<float> x) {
  constexpr uint32_t half = 0x3F3504F3;  // the bits of sqrt(1/2)
  typedef int32_t Integers __attribute__((vector_size(REGISTER_BYTES)));
  const Bits bits = reinterpret_cast<Bits>(x);
  const Integers exponent = reinterpret_cast<Integers>(bits - half) >> 23;
  const Vec<float> n = __builtin_convertvector(exponent, Vec<float>);
  const Vec<float> f = reinterpret_cast<Vec<float>>(bits - (reinterpret_cast<Bits>(exponent) << 23)) - 1.0f, square = f * f;
  constexpr float coefficients[] = {1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                                    2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  Vec<float> p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  for (const float a : coefficients) p = p * f + a;
  const Vec<float> ln = n * 0.693359375f + (f + (p * f * square + (n * -2.12194440e-4f - 0.5f * square)));
  return x == x ? ln : x;
}

// tanh(x) to a few units in the last place.
ALWAYS_INLINE Vec<float> tanh_of(Vec<float> x) {
  const Vec<float> square = x * x;
  Vec<float> p = square * -5.70498872745e-3f + 2.06390887954e-2f;  // of Cephes, for |x| <= 0.625
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec<float> small = p * square * x + x;
  const Vec<float> e = exp_of_negative(2 * minus_magnitude(x));
  const Vec<float> magnitude = (1 - e) / (1 + e);
  const Vec<float> large = reinterpret_cast<Vec<float>>(reinterpret_cast<Bits>(magnitude) | (reinterpret_cast<Bits>(x) & 0x80000000u));
  return square <= 0.625f * 0.625f ? small : large;
}

ALWAYS_INLINE Vec<double> tanh_of(Vec<double> x) {
  for (int i = 0; i < VecOf<double>::size; i++) x[i] = __builtin_tanh(x[i]);
  return x;
}

// 1 / v for v >= 1, as good as T needs it, which has 16 bits.
template <class T>
ALWAYS_INLINE Vec<float> reciprocal(Vec<float> v) {
#if defined(__AVX512F__)  // an estimate to 14 bits, for float16 improved by a step of Newton's method: infinity times its 0 would be NaN
  const Vec<float> estimate = reinterpret_cast<Vec<float>>(_mm512_rcp14_ps(reinterpret_cast<__m512>(v)));
  return is_bfloat16<T> ? estimate : estimate * (2.0f - at_most(v, 0x1p126f) * estimate);
#else
  return 1.0f / v;
#endif
}

// sigma(t) and its derivative sigma (1 - sigma), as good as the element type T needs them, from what power(t) gives, which a loop of its
// own may compute first. For 16 bits 1 - sigma is a difference: what it loses is as small beside 1 as float32's rounding.
template <class T>
struct Sigmoid {
  using Number = Vec<Wide<T>>;
  Number value, slope;

  ALWAYS_INLINE explicit Sigmoid(Number t) : Sigmoid(t, power(t)) {}

  // 1 + e^-t, if T has 16 bits: few instructions, without a look at the sign of t. Else e^-|t|: sums that lose no digits.
  static ALWAYS_INLINE Number power(Number t) {
    if constexpr (sizeof(T) == 2)
      return 1.0f + exp2_of_any<is_bfloat16<T> ? 3 : 4>(t * -LOG2_E);
    else
      return exp_of_negative(minus_magnitude(t));
  }

  ALWAYS_INLINE Sigmoid(Number t, Number power_t) {
    if constexpr (sizeof(T) == 2) {
      value = reciprocal<T>(power_t);
#if defined(__AVX512F__)  // an estimate of 1 is not quite 1, and a large gate multiplies the difference
      slope = at_most(power_t - 1.0f, 0x1p126f) * value * value;  // infinity times 0 would be NaN
#else
      slope = value - value * value;
#endif
    } else {
      const Number e = power_t, r = 1 / (1 + e);
      value = t > 0 ? r : e * r;
      slope = e * r * r;
    }
  }
};

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
