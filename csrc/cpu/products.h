// Small matrix products on tiles in the cache, C = A B or C += A B, row-major with float32 results: by torch's own library
// (brgemm.h) where it has them, else by the loops below.
#pragma once
#include "brgemm.h"
#include "simd.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {

#if defined(__AVX512F__)
constexpr int PRODUCT_ROWS = 8;  // of C in registers at a time, PRODUCT_REGISTERS wide
#else
constexpr int PRODUCT_ROWS = 4;
#endif
constexpr int PRODUCT_REGISTERS = 2;
constexpr int64_t TERMS = 128;  // that are summed up before they join a longer sum, in float32: its rounding error stays small

// C (+)= A B for PRODUCT_ROWS rows. The sums begin at zero and are added to C in the end: of many terms, that rounds less.
template <int REGISTERS>
inline void product_of_rows(int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc, bool add) {
  Vec<float> sums[PRODUCT_ROWS][REGISTERS] = {};
  for (int64_t k = 0; k < K; k++) {
    Vec<float> b[REGISTERS];
    for (int i = 0; i < REGISTERS; i++) b[i] = load(B + k * ldb + i * LANES);
    for (int r = 0; r < PRODUCT_ROWS; r++)
      for (int i = 0; i < REGISTERS; i++) sums[r][i] += A[r * lda + k] * b[i];
  }
  for (int r = 0; r < PRODUCT_ROWS; r++) {
    for (int i = 0; i < REGISTERS; i++) {
      float* c = C + r * ldc + i * LANES;
      store(c, add ? load(c) + sums[r][i] : sums[r][i]);
    }
  }
}

// M and N are multiples of 16, and K is at most TERMS. The columns of B that are in registers are copied first: rows that are a power of
// two apart would push each other out of the L1 cache.
inline void product(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc,
                    bool add) {
  constexpr int64_t width = PRODUCT_REGISTERS * LANES;
  alignas(REGISTER_BYTES) float columns[TERMS * width];
  int64_t n = 0;
  for (; n + width <= N; n += width) {
    for (int64_t k = 0; k < K; k++)
      for (int i = 0; i < PRODUCT_REGISTERS; i++) store(columns + k * width + i * LANES, load(B + k * ldb + n + i * LANES));
    for (int64_t m = 0; m < M; m += PRODUCT_ROWS)
      product_of_rows<PRODUCT_REGISTERS>(K, A + m * lda, lda, columns, width, C + m * ldc + n, ldc, add);
  }
  for (; n < N; n += LANES)
    for (int64_t m = 0; m < M; m += PRODUCT_ROWS) product_of_rows<1>(K, A + m * lda, lda, B + n, ldb, C + m * ldc + n, ldc, add);
}

// The same for bfloat16, rows of B in pairs, for tests on processors whose library has no such product: slow.
inline void product(int64_t M, int64_t N, int64_t K, const bfloat16* A, int64_t lda, const bfloat16* B, int64_t ldb, float* C, int64_t ldc,
                    bool add) {
  for (int64_t m = 0; m < M; m++) {
    for (int64_t n = 0; n < N; n++) {
      float sum = add ? C[m * ldc + n] : 0;
      for (int64_t k = 0; k < K; k++) sum += to_wide(A[m * lda + k]) * to_wide(B[(k / 2 * ldb + n) * 2 + k % 2]);
      C[m * ldc + n] = sum;
    }
  }
}

// What multiplies tiles of Tile = float or bfloat16; those of bfloat16 have B in pairs of rows (brgemm.h).
template <class Tile>
class Products {
 public:
  explicit Products(const Brgemm& library) : multiply_(is_bfloat16<Tile> ? library.bfloat16 : library.float32), release_(library.release) {}

  void operator()(int64_t M, int64_t N, int64_t K, const Tile* A, int64_t lda, const Tile* B, int64_t ldb, float* C, int64_t ldc,
                  bool add) const {
    if constexpr (is_bfloat16<Tile>) {
      if (multiply_)
        multiply_(M, N, K, lda, ldb, ldc, add, A, B, C, true);
      else
        product(M, N, K, A, lda, B, ldb, C, ldc, add);
    } else {
      for (int64_t k = 0; k < K; k += TERMS) {
        const int64_t terms = K - k < TERMS ? K - k : TERMS;
        if (multiply_)
          multiply_(M, N, terms, lda, ldb, ldc, add || k > 0, A + k, B + k * ldb, C, false);
        else
          product(M, N, terms, A + k, lda, B + k * ldb, ldb, C, ldc, add || k > 0);
      }
    }
  }

  // By each thread when it has done its products.
  void release() const {
    if (multiply_) release_(is_bfloat16<Tile>);
  }

 private:
  SmallProduct multiply_;
  void (*release_)(bool);
};

// The library for this instruction set.
inline Brgemm library_products() {
#if defined(__AVX512F__)
  return brgemm();
#else
  return {};
#endif
}

// run(T{}, Tile{}) with the element type and the type of the tiles: float32 and bfloat16 numbers are multiplied as they are, where the
// processor can; all others as float32.
template <class Run>
inline Error by_tile(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::float32:
      return run(float{}, float{});
    case Dtype::float16:
      return run(float16{}, float{});
    case Dtype::bfloat16:
#if defined(__AVX512BF16__)
      if (library_products().bfloat16) return run(bfloat16{}, bfloat16{});
#endif
      return run(bfloat16{}, float{});
    case Dtype::float64:
      return "float64 is not written";
  }
  return "unknown dtype";
}

// The same; tests can have bfloat16 multiplied as it is on any processor.
template <class Run>
inline Error by_tile_or_force(Dtype dtype, const Run& run) {
  return dtype == Dtype::bfloat16 && bfloat16_tiles_forced() ? run(bfloat16{}, bfloat16{}) : by_tile(dtype, run);
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
