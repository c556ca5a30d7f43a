// SIMD by the compiler's vector types: one source, compiled once per instruction set (CMakeLists.txt), becomes AVX-512, AVX2
// or portable code. A Vec<T> holds as many numbers of the accumulator type T (float or double) as one register does;
// load() and store() convert from and to the element types on the way. The tail of a row is a load or store of n numbers.
//
// This header includes as little as possible: an inline function of another header, compiled here for AVX-512, could be
// the copy that the linker keeps for everybody.
#pragma once
#include "numbers.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {

// For functions of registers, which a call would pass through memory, and for loops over their bodies.
#define ALWAYS_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX2__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(REGISTER_BYTES)));
  static constexpr int size = REGISTER_BYTES / sizeof(T);
};
template <class T>
using Vec = typename VecOf<T>::type;

// Unaligned, and allowed to alias whatever lies there.
template <class T>
struct Unaligned {
  typedef T type __attribute__((vector_size(REGISTER_BYTES), aligned(1), may_alias));
};

constexpr int LANES = VecOf<float>::size;
typedef uint16_t Half __attribute__((vector_size(REGISTER_BYTES / 2)));  // LANES numbers of 16 bits
typedef uint16_t UnalignedHalf __attribute__((vector_size(REGISTER_BYTES / 2), aligned(1), may_alias));
typedef uint32_t Bits __attribute__((vector_size(REGISTER_BYTES)));
typedef uint64_t WideBits __attribute__((vector_size(REGISTER_BYTES)));

inline Vec<float> load(const float* p) { return *reinterpret_cast<const Unaligned<float>::type*>(p); }
inline Vec<double> load(const double* p) { return *reinterpret_cast<const Unaligned<double>::type*>(p); }
inline Vec<float> load(const bfloat16* p) {
#if defined(__AVX512F__)
  const Bits wide = reinterpret_cast<Bits>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  const Bits wide = reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  const Bits wide = __builtin_convertvector(*reinterpret_cast<const UnalignedHalf*>(p), Bits);
#endif
  return reinterpret_cast<Vec<float>>(wide << 16);
}
inline Vec<float> load(const float16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> v;
  for (int i = 0; i < LANES; i++) v[i] = to_wide(p[i]);
  return v;
#endif
}

inline void store(float* p, Vec<float> v) { *reinterpret_cast<Unaligned<float>::type*>(p) = v; }
inline void store(double* p, Vec<double> v) { *reinterpret_cast<Unaligned<double>::type*>(p) = v; }
#if defined(__AVX512BF16__)
inline void store_flushed(bfloat16* p, Vec<float> v) {  // subnormal numbers become zero
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v))));
}
#endif
inline void store(bfloat16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  constexpr int subnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(reinterpret_cast<__m512>(v), subnormal) == 0, 1)) return store_flushed(p, v);
#endif
  const Bits u = reinterpret_cast<Bits>(v);
  Bits rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  rounded = v == v ? rounded : Bits{} + 0x7FC0u;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i wide = reinterpret_cast<__m256i>(rounded);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
#else
  *reinterpret_cast<UnalignedHalf*>(p) = __builtin_convertvector(rounded, Half);
#endif
}
inline void store(float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
  for (int i = 0; i < LANES; i++) p[i] = from_wide<float16>(v[i]);
#endif
}

// Two registers of numbers that follow each other, in whatever order is fastest: for sums and the like.
template <class T>
ALWAYS_INLINE void load_both(const T* p, Vec<Wide<T>>& a, Vec<Wide<T>>& b) {
  a = load(p);
  b = load(p + VecOf<Wide<T>>::size);
}
ALWAYS_INLINE void load_both(const bfloat16* p, Vec<float>& even, Vec<float>& odd) {
  const Bits pairs = *reinterpret_cast<const Unaligned<uint32_t>::type*>(p);
  even = reinterpret_cast<Vec<float>>(pairs << 16);
  odd = reinterpret_cast<Vec<float>>(pairs & 0xFFFF0000u);
}

// Two registers of numbers that lie behind each other, in another order: by turns four numbers are of the first register and four of the
// second. So bfloat16, which AVX2 has no instructions to convert, needs half as many as register by register.
struct First {};
struct Second {};
#if defined(__AVX2__) && !defined(__AVX512F__)
template <class T>
constexpr bool IN_PAIRS = is_bfloat16<T>;

ALWAYS_INLINE Vec<float> load(const bfloat16* p, First) {
  return reinterpret_cast<Vec<float>>(_mm256_unpacklo_epi16(__m256i{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
ALWAYS_INLINE Vec<float> load(const bfloat16* p, Second) {
  return reinterpret_cast<Vec<float>>(_mm256_unpackhi_epi16(__m256i{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
ALWAYS_INLINE Vec<float> load(const float* p, First) { return reinterpret_cast<Vec<float>>(_mm256_loadu2_m128(p + LANES, p)); }
ALWAYS_INLINE Vec<float> load(const float* p, Second) { return load(p + LANES / 2, First{}); }
ALWAYS_INLINE void store(float* p, Vec<float> v, First) { _mm256_storeu2_m128(p + LANES, p, reinterpret_cast<__m256>(v)); }
ALWAYS_INLINE void store(float* p, Vec<float> v, Second) { store(p + LANES / 2, v, First{}); }

// First and Second, rounded and put together.
ALWAYS_INLINE __m256i bfloat16_of(Vec<float> first, Vec<float> second) {
  const auto rounded = [](Vec<float> v) __attribute__((always_inline)) {
    const Bits u = reinterpret_cast<Bits>(v);
    return reinterpret_cast<__m256i>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
  };
  const __m256 nan = _mm256_cmp_ps(reinterpret_cast<__m256>(first), reinterpret_cast<__m256>(second), _CMP_UNORD_Q);
  if (__builtin_expect(_mm256_movemask_ps(nan) != 0, 0)) {  // a NaN of all ones must not become a zero
    const Vec<float> quiet = Vec<float>{} + __builtin_nanf("");
    first = first == first ? first : quiet;
    second = second == second ? second : quiet;
  }
  return _mm256_packus_epi32(rounded(first), rounded(second));
}
#else
template <class T>
constexpr bool IN_PAIRS = false;
#endif

// The first n < size numbers, zeros behind them.
template <class T>
inline Vec<Wide<T>> load(const T* p, int64_t n) {
#if defined(__AVX512F__)
  alignas(REGISTER_BYTES) T first[VecOf<Wide<T>>::size];
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) {
    *reinterpret_cast<__m512i*>(first) = _mm512_maskz_loadu_epi64(mask, p);
  } else if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<__m512i*>(first) = _mm512_maskz_loadu_epi32(mask, p);
  } else {
    *reinterpret_cast<__m256i*>(first) = _mm256_maskz_loadu_epi16(mask, p);
  }
  return load(first);
#else
  Vec<Wide<T>> v{};
  for (int64_t i = 0; i < n; i++) v[i] = to_wide(p[i]);
  return v;
#endif
}
// Stores the first n numbers of a register, as V = Vec or Flushable.
template <class T, class V>
inline void store_first(T* p, V v, int64_t n) {
  alignas(REGISTER_BYTES) T stored[VecOf<Wide<T>>::size];
  store(stored, v);
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_epi64(p, mask, *reinterpret_cast<__m512i*>(stored));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(p, mask, *reinterpret_cast<__m512i*>(stored));
  } else {
    _mm256_mask_storeu_epi16(p, mask, *reinterpret_cast<__m256i*>(stored));
  }
#else
  for (int64_t i = 0; i < n; i++) p[i] = stored[i];
#endif
}
template <class T>
inline void store(T* p, Vec<Wide<T>> v, int64_t n) {
  store_first(p, v, n);
}

// A whole register, where others are n numbers of one.
struct All {};
template <class T>
inline Vec<Wide<T>> load(const T* p, All) {
  return load(p);
}
template <class T>
inline void store(T* p, Vec<Wide<T>> v, All) {
  store(p, v);
}

// A result for which a subnormal bfloat16 is as good as zero: that spares a look at every register.
template <class T>
struct Flushable {
  Vec<Wide<T>> v;
};
template <class T>
inline void store(T* p, Flushable<T> flushable) {
#if defined(__AVX512BF16__)
  if constexpr (is_bfloat16<T>) return store_flushed(p, flushable.v);
#endif
  store(p, flushable.v);
}
template <class T>
inline void store(T* p, Flushable<T> flushable, int64_t n) {
  store_first(p, flushable, n);
}
template <class T>
inline void store(T* p, Flushable<T> flushable, All) {
  store(p, flushable);
}

// Asks for the line that holds p[0], in the second-level cache. One between some multiplications and the next is faster than many at once
// (benchmarks/NOTES.md).
template <class T>
constexpr int64_t LINE = 64 / sizeof(T);
template <class T>
ALWAYS_INLINE void ask_for(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// Two registers, one behind the other.
template <class T>
inline void store_both(T* p, Vec<Wide<T>> a, Vec<Wide<T>> b) {
#if defined(__AVX512BF16__)
  if constexpr (is_bfloat16<T>) {  // subnormal numbers become zero
    const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a));
    return _mm512_storeu_si512(p, reinterpret_cast<__m512i>(both));
  }
#endif
  store(p, a);
  store(p + VecOf<Wide<T>>::size, b);
}

// What reading back a stored number gives.
template <class T>
inline Vec<Wide<T>> rounded(Vec<Wide<T>> v) {
  T stored[VecOf<Wide<T>>::size];
  store(stored, v);
  return load(stored);
}
template <>
inline Vec<float> rounded<float>(Vec<float> v) {
  return v;
}
template <>
inline Vec<double> rounded<double>(Vec<double> v) {
  return v;
}

// Lane i: what lane i ^ n holds.
template <class V>
ALWAYS_INLINE V exchanged(V v, int n) {
  V other;
  constexpr int size = sizeof(v) / sizeof(v[0]);
  for (int i = 0; i < size; i++) other[i] = v[i ^ n];
  return other;
}

// The sum of the lanes, by halves: a fixed order for a given instruction set.
template <class T>
inline T sum(Vec<T> v) {
#pragma GCC unroll 4
  for (int n = VecOf<T>::size / 2; n > 0; n /= 2) v += exchanged(v, n);
  return v[0];
}

// The largest lane.
inline float largest(Vec<float> v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
#pragma GCC unroll 4
  for (int n = LANES / 2; n > 0; n /= 2) {
    const Vec<float> other = exchanged(v, n);
    v = v < other ? other : v;
  }
  return v[0];
#endif
}

// Whether a comparison holds in any lane.
template <class M>
inline bool any(M mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(reinterpret_cast<__m256i>(mask)) != 0;
#else
  bool found = false;
  for (int i = 0; i < int(sizeof(M) / sizeof(mask[0])); i++) found |= mask[i] != 0;
  return found;
#endif
}

inline double largest(Vec<double> v) {
  double most = v[0];
  for (int i = 1; i < VecOf<double>::size; i++) most = most < v[i] ? v[i] : most;
  return most;
}

// 0, 1, 2, ...
inline Vec<float> lane_numbers() {
  Vec<float> v;
  for (int i = 0; i < LANES; i++) v[i] = i;
  return v;
}

// The larger, the smaller of v and the bound; NaN stays NaN.
inline Vec<float> at_least(Vec<float> v, Vec<float> bound) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_max_ps(reinterpret_cast<__m512>(bound), reinterpret_cast<__m512>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(_mm256_max_ps(reinterpret_cast<__m256>(bound), reinterpret_cast<__m256>(v)));
#else
  return v < bound ? bound : v;
#endif
}
inline Vec<float> at_least(Vec<float> v, float bound) { return at_least(v, Vec<float>{} + bound); }
inline Vec<double> at_least(Vec<double> v, Vec<double> bound) { return v < bound ? bound : v; }
inline Vec<double> at_least(Vec<double> v, double bound) { return at_least(v, Vec<double>{} + bound); }
inline Vec<float> at_most(Vec<float> v, float bound) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_min_ps(_mm512_set1_ps(bound), reinterpret_cast<__m512>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(_mm256_min_ps(_mm256_set1_ps(bound), reinterpret_cast<__m256>(v)));
#else
  return v > bound ? Vec<float>{} + bound : v;
#endif
}
inline Vec<double> at_most(Vec<double> v, double bound) { return v > bound ? Vec<double>{} + bound : v; }

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
