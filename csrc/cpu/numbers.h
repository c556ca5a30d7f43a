// Single numbers: the element types, the types that they are computed in, and conversions between the two.
//
// This header includes as little as possible: an inline function of another header, compiled here for AVX-512, could be
// the copy that the linker keeps for everybody.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernel.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
template <class T>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<bfloat16> = true;

inline float to_wide(float v) { return v; }
inline double to_wide(double v) { return v; }
inline float to_wide(bfloat16 v) { return __builtin_bit_cast(float, uint32_t(v.bits) << 16); }
inline float to_wide(float16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  // The exponent is re-biased by a multiplication, which also makes subnormals right; infinity and NaN keep theirs.
  const uint32_t magnitude = v.bits & 0x7FFFu, sign = uint32_t(v.bits & 0x8000u) << 16;
  if (magnitude >= 0x7C00u) return __builtin_bit_cast(float, sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude << 13) * 0x1p112f));
#endif
}

template <class T>
inline T from_wide(double v) {
  return T(v);
}
template <>
inline bfloat16 from_wide(double v) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t u = __builtin_bit_cast(uint32_t, float(v));
  return {v != v ? uint16_t(0x7FC0) : uint16_t((u + 0x7FFFu + ((u >> 16) & 1)) >> 16)};
}
template <>
inline float16 from_wide(double v) {
#if defined(__F16C__)
  return {_cvtss_sh(float(v), 0)};
#else
  // Adding and subtracting a power of two that is 2^13 float ulps above v rounds it to half's 10 bits, subnormals included.
  const uint32_t u = __builtin_bit_cast(uint32_t, float(v)), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {uint16_t(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return {uint16_t(sign | 0x7C00u)};  // rounds to 65536 or more
  const uint32_t exponent = (magnitude & 0x7F800000u) < 0x38800000u ? 0x38800000u : magnitude & 0x7F800000u;
  const float step = __builtin_bit_cast(float, exponent + (13u << 23));
  const float rounded = (__builtin_bit_cast(float, magnitude) + step) - step;
  return {uint16_t(sign | __builtin_bit_cast(uint32_t, rounded * 0x1p-112f) >> 13)};
#endif
}

// Calls run(T{}) with the element type T that dtype stands for.
template <class Run>
inline Error by_dtype(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::float32:
      return run(float{});
    case Dtype::bfloat16:
      return run(bfloat16{});
    case Dtype::float16:
      return run(float16{});
    case Dtype::float64:
      return run(double{});
  }
  return "unknown dtype";
}

// The accumulator type of an element type.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

inline float square_root(float v) { return __builtin_sqrtf(v); }
inline double square_root(double v) { return __builtin_sqrt(v); }

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
