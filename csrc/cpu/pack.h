// Copies rows into tiles as matrix products read them: padded with zeros, transposed, or with pairs of rows interleaved.
#pragma once
#include "columns.h"
#include "tasks.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {

// The columns of a tile: those that take part in products, and the distance of its rows. Zeros behind the C that mean something.
template <class Tile>
struct Width {
  int64_t C, used, ld;

  explicit Width(int64_t columns) : C(columns), used(round_up(columns, 16)), ld(round_up(columns, 64 / sizeof(Tile))) {}
};

// A row of T as a row of a tile.
template <class T, class Tile>
inline void gather_row(const T* x, const Width<Tile>& width, Tile* row) {
  if constexpr (is_bfloat16<Tile> && is_bfloat16<T>) {
    int64_t c = 0;
    for (; c + 16 <= width.C; c += 16) __builtin_memcpy(row + c, x + c, 16 * sizeof(T));
    for (; c < width.C; c++) row[c] = x[c];
  } else {
    for_columns<float>(0, width.C, [&](int64_t c, auto count, int) { store(row + c, load(x + c, count), count); });
  }
  if (width.C < width.ld) __builtin_memset(row + width.C, 0, (width.ld - width.C) * sizeof(Tile));
}

// n rows of T, stride numbers apart, as `padded` rows of a tile.
template <class T, class Tile>
inline void gather_rows(const T* x, int64_t stride, int64_t n, int64_t padded, const Width<Tile>& width, Tile* tile) {
  for (int64_t r = 0; r < n; r++) gather_row(x + r * stride, width, tile + r * width.ld);
  if (padded > n) __builtin_memset(tile + n * width.ld, 0, (padded - n) * width.ld * sizeof(Tile));
}

// How far column c of a right factor lies behind its first: rows of bfloat16 come in pairs.
template <class Tile>
constexpr int64_t column_of_right_factor(int64_t c) {
  return is_bfloat16<Tile> ? 2 * c : c;
}

// Whether n numbers are all finite: infinity and NaN times zero are NaN.
template <class Tile>
inline bool all_finite(const Tile* tile, int64_t n) {
  return sum_columns<float>(n, [&](int64_t c, auto count) { return load(tile + c, count) * 0.0f; }) == 0;
}

typedef uint32_t Word __attribute__((may_alias));

#if !defined(__AVX512F__)
// An 8 x 8 block of 32 bits each.
inline void transpose_quarter(const Word* x, int64_t stride_x, Word* y, int64_t stride_y) {
#if defined(__AVX2__)
  __m256 r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(x + i * stride_x));
  for (int i = 0; i < 4; i++) {  // pairs of rows by numbers, then by pairs of numbers, then by halves of a register
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    for (int j = 0; j < 2; j++) {
      r[4 * i + 2 * j] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + j + 2], 0x44);
      r[4 * i + 2 * j + 1] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + j + 2], 0xEE);
    }
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(reinterpret_cast<float*>(y + i * stride_y), _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(y + (i + 4) * stride_y), _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
#else
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) y[j * stride_y + i] = x[i * stride_x + j];
#endif
}
#endif

// A 16 x 16 block of 32 bits each.
inline void transpose_block(const Word* x, int64_t stride_x, Word* y, int64_t stride_y) {
#if defined(__AVX512F__)
  __m512i r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(x + i * stride_x);
  for (int i = 0; i < 8; i++) {  // pairs of rows by numbers, then by pairs of numbers, then by quarters of a register
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    for (int j = 0; j < 2; j++) {
      r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + j + 2]);
      r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + j + 2]);
    }
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 8; i++) {
    _mm512_storeu_si512(y + i * stride_y, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(y + (i + 8) * stride_y, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD));
  }
#else
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 16; j += 8) transpose_quarter(x + i * stride_x + j, stride_x, y + j * stride_y + i, stride_y);
#endif
}

template <class Tile>
inline Word* words(Tile* tile) {
  return reinterpret_cast<Word*>(tile);
}
template <class Tile>
inline const Word* words(const Tile* tile) {
  return reinterpret_cast<const Word*>(tile);
}

// The largest block that is transposed in registers.
#if defined(__AVX512F__)
constexpr int64_t TRANSPOSED = 16;
inline void transpose_step(const Word* x, int64_t stride_x, Word* y, int64_t stride_y) { transpose_block(x, stride_x, y, stride_y); }
#else
constexpr int64_t TRANSPOSED = 8;
inline void transpose_step(const Word* x, int64_t stride_x, Word* y, int64_t stride_y) { transpose_quarter(x, stride_x, y, stride_y); }
#endif

// The transpose of n rows, a multiple of TRANSPOSED and `stride` numbers apart, as the right factor of a product: (width, ld). Of bfloat16,
// feature pairs stay together.
template <class Tile>
inline void transpose_right(const Tile* tile, int64_t stride, int64_t n, const Width<Tile>& width, Tile* transposed, int64_t ld) {
  constexpr int64_t in_word = 4 / sizeof(Tile);  // every distance below is one of words
  for (int64_t w = 0; w < width.ld / in_word; w += TRANSPOSED)
    for (int64_t r = 0; r < n; r += TRANSPOSED)
      transpose_step(words(tile + r * stride) + w, stride / in_word, words(transposed) + w * ld + r, ld);
}

template <class Tile>
inline void transpose_right(const Tile* tile, int64_t n, const Width<Tile>& width, Tile* transposed, int64_t ld) {
  transpose_right(tile, width.ld, n, width, transposed, ld);
}

// The transpose of n rows, a multiple of 16 or, of float32, of TRANSPOSED, as the left factor of a product: (width, ld).
inline void transpose_left(const float* tile, int64_t stride, int64_t n, const Width<float>& width, float* transposed, int64_t ld) {
  transpose_right(tile, stride, n, width, transposed, ld);
}

// n rows, an even number, as the right factor of a product; float32 is so already.
inline const float* right_factor(const float* tile, int64_t, const Width<float>&, float*) { return tile; }

inline void transpose_left(const bfloat16* tile, int64_t stride, int64_t n, const Width<bfloat16>& width, bfloat16* transposed,
                           int64_t ld) {
  Word pairs[16 * 16];
  for (int64_t c = 0; c < width.ld; c += 32) {
    for (int64_t r = 0; r < n; r += 16) {
      transpose_block(words(tile + r * stride + c), stride / 2, pairs, 16);
      for (int i = 0; i < 16; i++) {
        bfloat16* even = transposed + (c + 2 * i) * ld + r;
#if defined(__AVX512F__)
        const __m512i pair = _mm512_loadu_si512(pairs + 16 * i);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), _mm512_cvtepi32_epi16(pair));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(even + ld), _mm512_cvtepi32_epi16(_mm512_srli_epi32(pair, 16)));
#else
        for (int j = 0; j < 16; j++) {
          even[j].bits = static_cast<uint16_t>(pairs[16 * i + j]);
          even[ld + j].bits = static_cast<uint16_t>(pairs[16 * i + j] >> 16);
        }
#endif
      }
    }
  }
}

template <class Tile>
inline void transpose_left(const Tile* tile, int64_t n, const Width<Tile>& width, Tile* transposed, int64_t ld) {
  transpose_left(tile, width.ld, n, width, transposed, ld);
}

#if defined(__AVX512BW__)
// The 32 numbers of a and b, 16 each, alternating.
inline __m512i alternating(__m512i a_then_b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                         18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, a_then_b);
}
#endif

// 16 numbers of a and of b, alternating.
inline void store_alternating(const bfloat16* a, const bfloat16* b, bfloat16* to) {
#if defined(__AVX512BW__)
  const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  _mm512_storeu_si512(to, alternating(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1)));
#else
  for (int i = 0; i < 16; i++) {
    to[2 * i] = a[i];
    to[2 * i + 1] = b[i];
  }
#endif
}

// Registers of two neighbouring rows of a right factor, from column c on; rows are ld numbers apart.
inline void store_rows_of_right_factor(float* rows, int64_t ld, int64_t c, Vec<float> even, Vec<float> odd) {
  store(rows + c, even);
  store(rows + ld + c, odd);
}
inline void store_rows_of_right_factor(bfloat16* rows, int64_t, int64_t c, Vec<float> even, Vec<float> odd) {
  bfloat16 both[2 * LANES];
  store_both(both, even, odd);
#if defined(__AVX512BW__)
  _mm512_storeu_si512(rows + 2 * c, alternating(_mm512_loadu_si512(both)));
#else
  for (int i = 0; i < LANES; i++) {
    rows[2 * (c + i)] = both[i];
    rows[2 * (c + i) + 1] = both[LANES + i];
  }
#endif
}

inline const bfloat16* right_factor(const bfloat16* tile, int64_t n, const Width<bfloat16>& width, bfloat16* paired) {
  for (int64_t r = 0; r < n; r += 2) {
    const bfloat16* row = tile + r * width.ld;
    for (int64_t c = 0; c < width.ld; c += 16) store_alternating(row + c, row + width.ld + c, paired + r * width.ld + 2 * c);
  }
  return paired;
}

// `padded` rows, an even number, as the right factor of a product: n of T, row(r), then zeros. It is in `paired` or, of float32, in `rows`,
// which has room for them all and else holds those that are not interleaved straight from where they lie.
template <class T, class Tile, class Row>
inline const Tile* gather_right_factor(const Row& row, int64_t n, int64_t padded, const Width<Tile>& width, Tile* rows, Tile* paired) {
  int64_t done = 0;
  if constexpr (is_bfloat16<T> && is_bfloat16<Tile>) {
    for (; width.C == width.ld && done + 2 <= n; done += 2) {
      const T *even = row(done), *odd = row(done + 1);
      for (int64_t c = 0; c < width.ld; c += 16) store_alternating(even + c, odd + c, paired + done * width.ld + 2 * c);
    }
  }
  for (int64_t r = done; r < n; r++) gather_row(row(r), width, rows + r * width.ld);
  if (padded > n) __builtin_memset(rows + n * width.ld, 0, (padded - n) * width.ld * sizeof(Tile));
  right_factor(rows + done * width.ld, padded - done, width, paired + done * width.ld);
  return is_bfloat16<Tile> ? paired : rows;
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
