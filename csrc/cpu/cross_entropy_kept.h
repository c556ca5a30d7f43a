// What the fused cross-entropy's forward pass keeps of a token's z for backward, a tile of columns at a time: in float32, or in 16 bits of
// fixed point (fastprimer/ops/cross_entropy.py, "Memory").
#pragma once
#include "cross_entropy_row.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace surprise {

inline int64_t kept_bytes(const LinearCrossEntropyProblem& p) { return p.in_16_bits ? sizeof(int16_t) : sizeof(float); }
template <class Shift>
Shift* shift_of(const LinearCrossEntropyProblem& p, Shift* shift, int64_t token, int64_t first) {
  return shift + token * kept_blocks(p.columns) + first / KEPT_BLOCK;
}

// An ignored token's.
inline void keep_nothing(const LinearCrossEntropyForward& args, int64_t token) {
  const LinearCrossEntropyProblem& p = args.problem;
  if (p.columns == 0) return;  // and there is no memory
  const int64_t bytes = p.columns * kept_bytes(p);
  __builtin_memset(static_cast<char*>(args.kept) + token * bytes, 0, bytes);
  if (p.in_16_bits) __builtin_memset(shift_of(p, args.shift, token, 0), 0, kept_blocks(p.columns) * sizeof(float));
}

// z of n columns from `first` on, which are a block or what is left of one; none of them is above `top`.
inline void keep(const LinearCrossEntropyForward& args, int64_t token, int64_t first, int64_t n, const float* z, float top) {
  const LinearCrossEntropyProblem& p = args.problem;
  const int64_t at = token * p.columns + first;
  if (!p.in_16_bits) {
    __builtin_memcpy(static_cast<float*>(args.kept) + at, z, n * sizeof(float));
    return;
  }
  int16_t* const to = static_cast<int16_t*>(args.kept) + at;
  const float shift = top - KEPT_TOP, lowest = KEPT_LOWEST, highest = -1 - lowest;
  *shift_of(p, args.shift, token, first) = shift;
  for (int64_t v = 0; v < n; v++) {
    float steps = (z[v] - shift) * KEPT_STEPS;
    steps = steps > lowest ? steps : lowest;  // of NaN too, which lse tells of
    steps = steps < highest ? steps : highest;
    to[v] = static_cast<int16_t>(static_cast<int32_t>(__builtin_rintf(steps)));
  }
}

inline void recall(const LinearCrossEntropyBackward& args, int64_t token, int64_t first, int64_t n, float* z) {
  const LinearCrossEntropyProblem& p = args.problem;
  const int64_t at = token * p.columns + first;
  if (!p.in_16_bits) {
    __builtin_memcpy(z, static_cast<const float*>(args.kept) + at, n * sizeof(float));
    return;
  }
  const int16_t* const from = static_cast<const int16_t*>(args.kept) + at;
  const float shift = *shift_of(p, args.shift, token, first);
  for (int64_t v = 0; v < n; v++) z[v] = from[v] == KEPT_LOWEST ? -float(INFINITE) : from[v] * (1 / KEPT_STEPS) + shift;
}

}  // namespace surprise
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
