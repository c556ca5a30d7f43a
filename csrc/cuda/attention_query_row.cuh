// What the kernels of attention's backward pass share: what is needed of a row of queries, and ds from scores.
#pragma once
#include "attention_tile.cuh"

namespace fastprimer {

// What backward needs of a row of queries: lse in base 2, delta, and the keys that it sees.
struct alignas(16) QueryRow {
  float lse, delta;
  int begin, end;
};

__device__ __forceinline__ QueryRow query_row(const AttentionBackward& args, const AttentionBlock& at, int r) {
  if (r >= at.S * at.G) return {INFINITY, 0, 0, 0};
  const int64_t i = at.lse_at(args, r);
  const int query = r / at.G;
  const float lse = args.lse[i];
  return {lse == -INFINITY ? INFINITY : lse * LOG2_E, args.delta[i], at.first_key_of(query), at.end_key_of(query)};
}

// Makes NaN in a tile of keys zero, before a product with weights. A row that sees such a key has NaN for its weight already; for one
// that does not it is 0, and 0 · nan is nan.
template <int ROWS, int THREADS, class T, int WIDTH>
__device__ __forceinline__ void clear_nan(const Tile<T, WIDTH>& tile, int thread) {
  for (int i = thread * CHUNK<T>; i < ROWS * WIDTH; i += THREADS * CHUNK<T>) {
    Vector<T, CHUNK<T>> v = load<CHUNK<T>>(tile.data + i);
    bool found = false;
#pragma unroll
    for (int e = 0; e < CHUNK<T>; e++) {
      if (widen(v.data[e]) != widen(v.data[e])) {
        v.data[e] = T{};
        found = true;
      }
    }
    if (found) store(tile.data + i, v);
  }
}

// From a score, after a softcap, and dp to p and ds (without the scale).
__device__ __forceinline__ void backward_of(float& s, float& dp, const QueryRow& row, bool visible, const AttentionOptions& options) {
  const float p = fast_exp2(s * options.exponent - row.lse), ratio = options.softcap > 0 ? s / options.softcap : 0;
  s = visible ? p : 0;
  dp = visible ? p * (dp - row.delta) * (1 - ratio * ratio) : 0;
}

}  // namespace fastprimer
