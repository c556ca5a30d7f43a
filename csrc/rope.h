// RoPE: what the binding hands to a kernel, on any device. The mathematics: fastprimer/ops/rope.py.
#pragma once
#include "kernel.h"

namespace fastprimer {

// Where queries or keys lie: (B, S, heads, D), the features of a head next to each other.
struct RopeHeads {
  const void* x;  // null: there are none, and heads is 0
  int64_t stride_batch, stride_token, stride_head;
  void* rotated;  // (B, S, heads, D) contiguous
  int64_t heads;
};

// Every pair (a, b) of the first R features becomes (a c - b s, a s + b c), with c and s in row `position` of the tables; the
// other D - R features are copied. Backward is the same with inverse = true: s becomes -s.
struct Rope {
  RopeHeads q, k;
  const void* cos;  // (P, R / 2), columns next to each other
  int64_t stride_cos_row;
  const void* sin;
  int64_t stride_sin_row;
  const void* positions;  // (B, S); null: token s of every sequence is at position s. Outside 0..P-1: NaN
  int64_t stride_positions_batch, stride_positions_token;
  bool positions_are_64_bit;  // else 32
  int64_t B, S, D, R, P;      // B, S, D > 0; R even, 0 < R <= D
  Dtype dtype;                // of q and k
  Dtype table_dtype;          // of cos and sin: dtype or float32
  bool interleaved;           // pairs (2i, 2i + 1), else (i, i + R / 2)
  bool inverse;
};

Error rope(Cpu, const Rope& args);
Error rope(Cuda, const Rope& args);

}  // namespace fastprimer
