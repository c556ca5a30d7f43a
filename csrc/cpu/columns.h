// Rows of numbers, swept a register, or a pair of registers, at a time: what is summed, and what is stored where.
#pragma once
#include "simd.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {

// The columns begin..end-1 in steps of one register: body(c, n, i), where n is All, First and then Second of a pair of registers (for those
// T that come IN_PAIRS), or the length of the tail, and i = 0..SIDES - 1 counts round, so that several sums can run side by side.
template <class T, int SIDES = 1, class Body>
ALWAYS_INLINE void for_columns(int64_t begin, int64_t end, const Body& body) {
  constexpr int64_t size = VecOf<Wide<T>>::size;
  int64_t c = begin;
  static_assert(SIDES == 1 || SIDES == 4);
  if constexpr (IN_PAIRS<T>) {
    const auto pair = [&](int i) __attribute__((always_inline)) {
      body(c, First{}, i % SIDES);
      body(c, Second{}, (i + 1) % SIDES);
      c += 2 * size;
    };
    if constexpr (SIDES == 4)
      while (c + 4 * size <= end) pair(0), pair(2);
    while (c + 2 * size <= end) pair(0);
  } else if constexpr (SIDES > 1) {
    for (; c + SIDES * size <= end; c += SIDES * size)
#pragma GCC unroll 4
      for (int i = 0; i < SIDES; i++) body(c + i * size, All{}, i);
  }
  for (; c + size <= end; c += size) body(c, All{}, 0);
  if (c < end) body(c, end - c, 0);
}

// Rows of an operation's own, beside rows of T, whose numbers lie in the order in which registers come: First before Second.
// Number c of n stands at place_in_turn.
template <class T>
inline int64_t place_in_turn(int64_t c, int64_t n) {
  constexpr int64_t pair = 2 * LANES, share = LANES / 2;
  const bool second = c / share % 2 == 1, upper = c / LANES % 2 == 1;
  if (!IN_PAIRS<T> || c >= n / pair * pair || second == upper) return c;
  return second ? c + share : c - share;
}
template <class A, class N>
ALWAYS_INLINE Vec<A> load_in_turn(const A* p, N n) {
  return load(p, n);
}
template <class A, class N>
ALWAYS_INLINE void store_in_turn(A* p, Vec<A> v, N n) {
  store(p, v, n);
}
ALWAYS_INLINE Vec<float> load_in_turn(const float* p, First) { return load(p); }
ALWAYS_INLINE Vec<float> load_in_turn(const float* p, Second) { return load(p + LANES); }
ALWAYS_INLINE void store_in_turn(float* p, Vec<float> v, First) { store(p, v); }
ALWAYS_INLINE void store_in_turn(float* p, Vec<float> v, Second) { store(p + LANES, v); }

// A whole register, as V = Vec or Flushable, to memory, past the caches; p is aligned to the bytes that are stored.
template <class T, class V>
inline void stream(T* p, V v) {
#if defined(__AVX512F__) || defined(__AVX2__)
  alignas(REGISTER_BYTES) T stored[VecOf<Wide<T>>::size];
  store(stored, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(stored) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), *reinterpret_cast<__m512i*>(stored));
#endif
  if constexpr (sizeof(stored) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<__m256i*>(stored));
  if constexpr (sizeof(stored) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<__m128i*>(stored));
#endif
  store(p, v);
}

// How an operation stores an output, body(put): put(p, v, n), as store. A thread's stores past the caches are visible to others
// when its part of a parallel_for or of run_tasks ends.
struct ToCache {
  template <class T, class V, class N>
  void operator()(T* p, V v, N n) const {
    store(p, v, n);
  }
#if defined(__AVX2__) && !defined(__AVX512F__)
  ALWAYS_INLINE void operator()(bfloat16* p, Vec<float> first, Vec<float> second) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat16_of(first, second));
  }
#endif
};
struct PastCache {
#if defined(__AVX2__) && !defined(__AVX512F__)
  ALWAYS_INLINE void operator()(bfloat16* p, Vec<float> first, Vec<float> second) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bfloat16_of(first, second));
  }
#endif
  template <class T, class V>
  void operator()(T* p, V v, All) const {
    stream(p, v);
  }
  template <class T, class V>
  void operator()(T* p, V v, int64_t n) const {
    store(p, v, n);
  }
};

template <class Body>
ALWAYS_INLINE void with_stores(bool past_cache, const Body& body) {
  if (past_cache)
    body(PastCache{});
  else
    body(ToCache{});
}

// Bytes from which on an output is stored past the caches. A cached store first reads its line from memory, a third of the
// traffic of an elementwise operation, and a large output pushes everything else out of the caches.
constexpr int64_t PAST_CACHE = 8 << 20;

// Whether an output of so many rows, which begin at p and stride_bytes apart, is worth storing by PastCache, and may be.
inline bool past_cache(const void* p, int64_t rows, int64_t row_bytes, int64_t stride_bytes) {
  const uintptr_t step = rows > 1 ? static_cast<uintptr_t>(stride_bytes) : 0;
  return rows * row_bytes >= PAST_CACHE && (reinterpret_cast<uintptr_t>(p) | step) % REGISTER_BYTES == 0;
}

// What a register, or a half of a pair, of K outputs is made of, as V = Vec or Flushable.
template <class V, int K>
struct Outputs {
  V of[K];
};
template <class V, class... Others>
Outputs(V, Others...) -> Outputs<V, 1 + sizeof...(Others)>;

inline Vec<float> number_of(Vec<float> v) { return v; }
template <class T>
inline Vec<float> number_of(Flushable<T> flushable) {
  return flushable.v;
}

// Columns begin..end-1 of K rows `to`: put there what compute(c, n), n as in for_columns, returns as Outputs.
template <class T, int K, class Put, class Compute>
ALWAYS_INLINE void fill_columns(T* const (&to)[K], int64_t begin, int64_t end, const Put& put, const Compute& compute) {
  constexpr int64_t size = VecOf<Wide<T>>::size;
  int64_t c = begin;
  if constexpr (IN_PAIRS<T>) {
    for (; c + 2 * size <= end; c += 2 * size) {
      const auto first = compute(c, First{}), second = compute(c, Second{});
#pragma GCC unroll 4
      for (int k = 0; k < K; k++) put(to[k] + c, number_of(first.of[k]), number_of(second.of[k]));
    }
  }
  for_columns<Wide<T>>(c, end, [&](int64_t c, auto n, int) __attribute__((always_inline)) {
    const auto outputs = compute(c, n);
#pragma GCC unroll 4
    for (int k = 0; k < K; k++) put(to[k] + c, outputs.of[k], n);
  });
}

// Asks for what lies at a register, or once at a pair, of columns.
template <class T, class N>
ALWAYS_INLINE void ask_for(const T* p, N) {
  ask_for(p);
}
template <class T>
ALWAYS_INLINE void ask_for(const T*, Second) {}

// Running sums over a row are flushed every so many columns, so that the rounding error of a wide row grows with the square root of its
// blocks and not of its columns.
constexpr int64_t SUM_BLOCK = 4096;

// The sum over columns 0..C-1 of term(c, n), a register of terms: four running sums.
template <class T, class Term>
ALWAYS_INLINE Wide<T> sum_columns(int64_t C, const Term& term) {
  using A = Wide<T>;
  A total = 0;
  for (int64_t begin = 0; begin < C; begin += SUM_BLOCK) {
    Vec<A> sums[4] = {};
    for_columns<T, 4>(begin, C - begin < SUM_BLOCK ? C : begin + SUM_BLOCK, [&](int64_t c, auto n, int i) { sums[i] += term(c, n); });
    total += sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return total;
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
