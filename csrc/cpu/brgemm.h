// The small matrix product of torch's own CPU library (oneDNN), which generates its code for the processor it runs on.
#pragma once
#include <cstdint>

namespace fastprimer {

// C (M, N) = A (M, K) B (K, N), or C += A B, all row-major, C in float32; lda, ldb and ldc are the rows' distances. With `pairs`, rows
// 2i and 2i + 1 of B are interleaved: B[2i][n] and B[2i + 1][n] are neighbours. That is what instructions of 16-bit numbers read.
using SmallProduct = void (*)(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const void* A,
                              const void* B, float* C, bool pairs);

struct Brgemm {
  SmallProduct float32;   // without pairs; null where this torch or this processor has none
  SmallProduct bfloat16;  // with pairs; null likewise
  void (*release)(bool pairs);
};

// Each thread calls `release` when it has done its products: some processors keep a state for them.
Brgemm brgemm();

// For tests: whether brgemm() may return functions at all; returns whether it does.
bool allow_brgemm(bool allow);

// For tests: whether bfloat16 is multiplied in tiles of bfloat16, as where the library can, even where it cannot and plain loops stand
// in for it: so the packing of such tiles is proven on any processor.
bool force_bfloat16_tiles(bool force);
bool bfloat16_tiles_forced();

}  // namespace fastprimer
