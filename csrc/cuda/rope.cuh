// RoPE on CUDA. The mathematics: fastprimer/ops/rope.py.
//
// How a token lies in a block. A head of D features is a row of units. A rotary unit is what 16-byte accesses make whole pairs of:
//
//   half-split     two vectors of V features, one R / 2 after the other: V pairs
//   interleaved    one vector of V features: V / 2 pairs
//
// and where a pointer, a stride, D or R does not allow that, V = 1 and a unit is two single features, one pair. The units after them
// are one vector each of the D - R features that are copied. threadIdx.x is a thread's unit, threadIdx.z its token, and blockDim.y
// times gridDim.y lanes share the heads, first q's, then k's: lane i has the heads i, i + lanes, ... A thread reads its part of the
// token's row of cos and sin once, into registers, and loads all it needs from several heads before it uses any.
#pragma once
#include <cmath>

#include "../rope.h"
#include "device.cuh"

namespace fastprimer {

constexpr int ROPE_THREADS = 256;  // the most in a block
constexpr int ROPE_ACCESSES = 8;   // vectors that a thread has under way

// How a rotary unit is made of vectors and pairs.
template <int V, bool INTERLEAVED>
struct RopeUnit {
  static constexpr int VECTORS = INTERLEAVED && V > 1 ? 1 : 2;
  static constexpr int PAIRS = VECTORS * V / 2;
};

// Where the heads of one token are.
template <class T>
struct RopeToken {
  const T *q, *k;
  T *q_rotated, *k_rotated;
  int64_t batch, s;

  __device__ __forceinline__ RopeToken(const Rope& args, int64_t token)
      : q_rotated(static_cast<T*>(args.q.rotated) + token * args.q.heads * args.D),
        k_rotated(static_cast<T*>(args.k.rotated) + token * args.k.heads * args.D),
        batch(token / args.S),
        s(token - batch * args.S) {
    q = static_cast<const T*>(args.q.x) + batch * args.q.stride_batch + s * args.q.stride_token;
    k = static_cast<const T*>(args.k.x) + batch * args.k.stride_batch + s * args.k.stride_token;
  }

  __device__ __forceinline__ const T* x(const Rope& args, int head) const {
    const bool of_q = head < args.q.heads;
    return (of_q ? q : k) + (of_q ? head : head - static_cast<int>(args.q.heads)) * (of_q ? args.q.stride_head : args.k.stride_head);
  }
  __device__ __forceinline__ T* rotated(const Rope& args, int head) const {
    const bool of_q = head < args.q.heads;
    return (of_q ? q_rotated : k_rotated) + (of_q ? head : head - static_cast<int>(args.q.heads)) * args.D;
  }
  __device__ __forceinline__ int64_t position(const Rope& args) const {
    if (args.positions == nullptr) return s;
    const int64_t at = batch * args.stride_positions_batch + s * args.stride_positions_token;
    return args.positions_are_64_bit ? static_cast<const int64_t*>(args.positions)[at] : static_cast<const int32_t*>(args.positions)[at];
  }
};

template <class T, int PAIRS>
__device__ __forceinline__ void load_factors(const Rope& args, const void* table, int64_t at, float (&factors)[PAIRS]) {
  if (args.table_dtype == Dtype::float32) {
    widen(load<PAIRS>(static_cast<const float*>(table) + at), factors);
  } else {
    widen(load<PAIRS>(static_cast<const T*>(table) + at), factors);
  }
}

// What happens to a unit's features of one head, in `vectors`.
template <class T, int V, bool INTERLEAVED>
struct Rotation {
  static constexpr int PAIRS = RopeUnit<V, INTERLEAVED>::PAIRS;
  const int64_t position;
  const int pair;  // the unit's first
  float c[PAIRS], s[PAIRS];

  // A position that has no row makes NaNs.
  __device__ __forceinline__ void prepare(const Rope& args) {
    if (position >= 0 && position < args.P) {
      load_factors<T>(args, args.cos, position * args.stride_cos_row + pair, c);
      load_factors<T>(args, args.sin, position * args.stride_sin_row + pair, s);
    } else {
#pragma unroll
      for (int i = 0; i < PAIRS; i++) c[i] = s[i] = NAN;
    }
#pragma unroll
    for (int i = 0; i < PAIRS; i++) s[i] = args.inverse ? -s[i] : s[i];
  }

  template <int VECTORS>
  __device__ __forceinline__ void apply(Vector<T, V> (&x)[VECTORS]) const {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      T& first = VECTORS == 2 ? x[0].data[i] : x[0].data[2 * i];
      T& second = VECTORS == 2 ? x[VECTORS - 1].data[i] : x[0].data[2 * i + 1];
      const float a = widen(first), b = widen(second);
      first = narrow<T>(a * c[i] - b * s[i]);
      second = narrow<T>(a * s[i] + b * c[i]);
    }
  }
};

template <class T, int V>
struct Copy {
  __device__ __forceinline__ void prepare(const Rope&) {}
  __device__ __forceinline__ void apply(Vector<T, V> (&)[1]) const {}
};

// One unit of all heads of a lane: VECTORS vectors from feature `first` on, `apart` features apart.
template <class T, int V, int VECTORS, class Change>
__device__ __forceinline__ void for_heads(const Rope& args, const RopeToken<T>& token, int first, int apart, Change change) {
  constexpr int K = ROPE_ACCESSES / VECTORS;
  const int heads = static_cast<int>(args.q.heads + args.k.heads);
  const int lane = blockIdx.y * blockDim.y + threadIdx.y, lanes = gridDim.y * blockDim.y;
  for (int head = lane; head < heads; head += K * lanes) {
    Vector<T, V> x[K][VECTORS];
#pragma unroll
    for (int k = 0; k < K; k++) {
      // Past the end, the last head once more: a load that is skipped is a branch, at which the loads before it are waited for.
      const T* from = token.x(args, head + k * lanes < heads ? head + k * lanes : heads - 1) + first;
#pragma unroll
      for (int i = 0; i < VECTORS; i++) x[k][i] = load<V>(from + i * apart);
    }
    issue_loads();
    if (head == lane) change.prepare(args);  // after the loads, which do not wait for a position
#pragma unroll
    for (int k = 0; k < K; k++) {
      if (head + k * lanes >= heads) break;
      change.apply(x[k]);
#pragma unroll
      for (int i = 0; i < VECTORS; i++) store(token.rotated(args, head + k * lanes) + first + i * apart, x[k][i]);
    }
  }
}

// Moves q and k once in and once out, 2 B S (H + Hk) D elements, and each token's rows of cos and sin, R numbers, once in; what other
// lanes, and the same positions of other sequences, read of them again comes from a cache.
template <class T, int V, bool INTERLEAVED>
__global__ void __launch_bounds__(ROPE_THREADS, 2) rope_heads(const Rope args) {
  constexpr int VECTORS = RopeUnit<V, INTERLEAVED>::VECTORS, PAIRS = RopeUnit<V, INTERLEAVED>::PAIRS;
  const int D = static_cast<int>(args.D), R = static_cast<int>(args.R), rotary = R / (2 * PAIRS), units = rotary + (D - R) / V;
  const int64_t tokens = args.B * args.S;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z; i < tokens;
       i += static_cast<int64_t>(gridDim.x) * blockDim.z) {
    const RopeToken<T> token(args, i);
    const int64_t position = token.position(args);
    for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
      if (unit < rotary) {
        const int pair = unit * PAIRS;
        for_heads<T, V, VECTORS>(args, token, INTERLEAVED ? 2 * pair : pair, INTERLEAVED ? 1 : R / 2,
                                 Rotation<T, V, INTERLEAVED>{position, pair, {}, {}});
      } else {
        for_heads<T, V, 1>(args, token, R + (unit - rotary) * V, 0, Copy<T, V>{});
      }
    }
  }
}

}  // namespace fastprimer
