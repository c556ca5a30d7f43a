// Dot products of a few rows with a few rows, as many at a time as a register has lanes: what reads its right rows once, from memory.
#pragma once
#include "simd.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {

template <int N>
struct Constant {
  static constexpr int value = N;
};

// How rows of T are multiplied: the type that left rows are kept in, and a register of it and of T. Rows of floats, unless the processor
// multiplies T as it is.
template <class T>
struct Dot {
  using Number = float;
  using Register = Vec<float>;
  static constexpr int64_t size = LANES;

  template <class N>
  static Register right(const T* p, N n) {
    return load(p, n);
  }
  static Register left(const Number* p) { return load(p); }
  static void add(Vec<float>& sums, Register a, Register b) { sums += a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<bfloat16> {
  using Number = bfloat16;
  using Register = __m512i;
  static constexpr int64_t size = 32;

  static Register right(const bfloat16* p, All) { return _mm512_loadu_si512(p); }
  static Register right(const bfloat16* p, int64_t n) { return _mm512_maskz_loadu_epi16((1u << n) - 1, p); }
  static Register left(const bfloat16* p) { return _mm512_loadu_si512(p); }
  static void add(Vec<float>& sums, Register a, Register b) {
    const __m512 c = reinterpret_cast<__m512>(sums);
    sums = reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
};
#endif

// Lane i: the sum of the lanes of v[i].
inline Vec<float> sums_of(const Vec<float> (&v)[LANES]) {
#if defined(__AVX512F__)
  __m512 a[16], b[8];
  for (int i = 0; i < 16; i++) a[i] = reinterpret_cast<__m512>(v[i]);
  for (int i = 0; i < 8; i++) b[i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]) + _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  for (int i = 0; i < 4; i++) {  // each quarter of a register: four sums
    const __m512d x = reinterpret_cast<__m512d>(b[2 * i]), y = reinterpret_cast<__m512d>(b[2 * i + 1]);
    a[i] = reinterpret_cast<__m512>(_mm512_unpacklo_pd(x, y)) + reinterpret_cast<__m512>(_mm512_unpackhi_pd(x, y));
  }
  for (int i = 0; i < 2; i++)
    b[i] = _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xDD);
  return reinterpret_cast<Vec<float>>(_mm512_shuffle_f32x4(b[0], b[1], 0x88) + _mm512_shuffle_f32x4(b[0], b[1], 0xDD));
#elif defined(__AVX2__)
  __m256 a[8], b[4];
  for (int i = 0; i < 8; i++) a[i] = reinterpret_cast<__m256>(v[i]);
  for (int i = 0; i < 4; i++) b[i] = _mm256_hadd_ps(a[2 * i], a[2 * i + 1]);
  for (int i = 0; i < 2; i++) a[i] = _mm256_hadd_ps(b[2 * i], b[2 * i + 1]);
  return reinterpret_cast<Vec<float>>(_mm256_permute2f128_ps(a[0], a[1], 0x20) + _mm256_permute2f128_ps(a[0], a[1], 0x31));
#else
  Vec<float> sums;
  for (int i = 0; i < LANES; i++) sums[i] = sum<float>(v[i]);
  return sums;
#endif
}

// dots[r][j] = left row r . right row j for ROWS left rows and n right rows of C columns. Left rows are ld numbers apart and zero behind
// their columns up to a register's end; right rows are `stride` apart, and as many from `next` on, if there is one, are asked for. Of dots,
// up to LANES - 1 numbers behind a row's n are spoiled.
template <int ROWS, class T>
inline void dots_of_rows(const typename Dot<T>::Number* left, int64_t ld, const T* right, int64_t stride, int64_t n, int64_t C, float* dots,
                         int64_t ld_dots, const T* next = nullptr) {
  constexpr int COLUMNS = LANES / ROWS;
  for (int64_t j = 0; j < n; j += COLUMNS) {
    int64_t row[COLUMNS];
    for (int i = 0; i < COLUMNS; i++) row[i] = (j + i < n ? j + i : n - 1) * stride;
    Vec<float> sums[LANES] = {};
    const auto add = [&](int64_t c, auto count) __attribute__((always_inline)) {
      if (next && c % LINE<T> == 0)
        for (int i = 0; i < COLUMNS; i++) ask_for(next + row[i] + c);
      typename Dot<T>::Register part[COLUMNS];
      for (int i = 0; i < COLUMNS; i++) part[i] = Dot<T>::right(right + row[i] + c, count);
      for (int r = 0; r < ROWS; r++) {
        const auto query = Dot<T>::left(left + r * ld + c);
        for (int i = 0; i < COLUMNS; i++) Dot<T>::add(sums[r * COLUMNS + i], query, part[i]);
      }
    };
    int64_t c = 0;
    for (; c + Dot<T>::size <= C; c += Dot<T>::size) add(c, All{});
    if (c < C) add(c, C - c);
    float found[LANES];
    store(found, sums_of(sums));
    for (int r = 0; r < ROWS; r++) __builtin_memcpy(dots + r * ld_dots + j, found + r * COLUMNS, COLUMNS * sizeof(float));
  }
}

// sums[r] += weights[r][j] row j, added up over j = 0..n-1, for ROWS weighted sums of n rows of C columns. A sum's ld_sums numbers, a
// multiple of LANES, may all be written. As many rows from `next` on are asked for.
template <int ROWS, class T>
inline void add_weighted_rows(const float* weights, int64_t ld_weights, const T* rows, int64_t stride, int64_t n, int64_t C, float* sums,
                              int64_t ld_sums, const T* next) {
#if defined(__AVX512F__)
  constexpr int REGISTERS = ROWS == 4 ? 4 : 8;
#else
  constexpr int REGISTERS = ROWS == 4 ? 2 : 4;
#endif
  const auto add = [&](int64_t c, auto registers, auto count) __attribute__((always_inline)) {
    constexpr int N = decltype(registers)::value;
    Vec<float> part[ROWS][N] = {};
    for (int64_t j = 0; j < n; j++) {
      for (int64_t i = 0; i < N * LANES; i += LINE<T>) ask_for(next + j * stride + c + i);
      Vec<float> row[N];
      for (int i = 0; i < N; i++) row[i] = load(rows + j * stride + c + i * LANES, count);
      for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < N; i++) part[r][i] += weights[r * ld_weights + j] * row[i];
    }
    for (int r = 0; r < ROWS; r++) {
      for (int i = 0; i < N; i++) {
        float* to = sums + r * ld_sums + c + i * LANES;
        store(to, load(to) + part[r][i]);
      }
    }
  };
  int64_t c = 0;
  for (; c + REGISTERS * LANES <= C; c += REGISTERS * LANES) add(c, Constant<REGISTERS>{}, All{});
  for (; c + LANES <= C; c += LANES) add(c, Constant<1>{}, All{});
  if (c < C) add(c, Constant<1>{}, C - c);
}

// body(r, Constant<ROWS>{}) for n rows, four at a time; where one or two are left, those; where three are, four.
template <class Body>
inline void for_row_blocks(int64_t n, const Body& body) {
  int64_t r = 0;
  for (; r + 2 < n; r += 4) body(r, Constant<4>{});
  if (r + 2 == n) body(r, Constant<2>{});
  if (r + 1 == n) body(r, Constant<1>{});
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
