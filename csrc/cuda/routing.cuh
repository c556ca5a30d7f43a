// Routing on CUDA. The mathematics: fastprimer/ops/routing.py.
//
// How tokens lie in a grid. LANES lanes of a warp have a token: 8 where there are few experts, else all 32. Lane l of them has experts
// l, l + LANES, ... of the token's row, which lies in shared memory as keys: unsigned numbers in the order of the choice.
#pragma once
#include <cmath>
#include <cstring>

#include "../routing.h"
#include "device.cuh"

namespace fastprimer {

constexpr int ROUTING_THREADS = 128;        // the most in a block
constexpr int ROUTING_FEW_EXPERTS = 32;     // up to which a token has 8 lanes
constexpr int ROUTING_MOST_EXPERTS = 4096;  // whose rows fit in shared memory

__device__ __forceinline__ uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}
__device__ __forceinline__ float float_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// A number whose order as an unsigned one is that of v, NaN above all, -0 equal to 0. No key is 0.
__device__ __forceinline__ uint32_t key_of(float v) {
  if (v != v) return 0xFFFFFFFFu;
  const uint32_t bits = bits_of(v + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The largest over each group of LANES lanes, given to all of them. The whole warp must call these.
template <int LANES>
__device__ __forceinline__ float largest(float v) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, distance));
  return v;
}
template <int LANES>
__device__ __forceinline__ uint64_t largest(uint64_t v) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(FULL_WARP, v, distance);
    v = other > v ? other : v;
  }
  return v;
}

// Takes the largest of `count` keys in shared memory, one after the other; of equal ones the first. A key that was taken is 0. Each lane
// remembers the best of its own keys, and only the one whose key was taken looks again: K of E cost K (log LANES + E / LANES) steps.
template <int LANES>
struct Picker {
  uint32_t* keys;
  int count, lane;
  uint64_t best;  // key, then the complement of its index

  __device__ __forceinline__ Picker(uint32_t* keys, int count, int lane) : keys(keys), count(count), lane(lane) { look(); }

  __device__ __forceinline__ void look() {
    best = 0;
    for (int i = lane; i < count; i += LANES) {
      const uint64_t candidate = static_cast<uint64_t>(keys[i]) << 32 | ~static_cast<uint32_t>(i);
      best = candidate > best ? candidate : best;
    }
  }

  __device__ __forceinline__ int take() {
    const int index = static_cast<int>(~static_cast<uint32_t>(largest<LANES>(best)));
    if (index % LANES == lane) {
      keys[index] = 0;
      look();
    }
    return index;
  }
};

// In the reference's own terms, each of which is rounded to float32.
__device__ __forceinline__ float logistic(float l) { return 1 / (1 + expf(-l)); }
__device__ __forceinline__ float log_logistic(float l) { return fminf(l, 0) - log1pf(expf(-fabsf(l))); }

// exp(l - top) / total over a row, whose numbers `at` gives.
struct Softmax {
  float top, total;

  template <int LANES, class At>
  __device__ __forceinline__ static Softmax over(int count, int lane, At at) {
    float top = -INFINITY, total = 0;
    for (int i = lane; i < count; i += LANES) top = fmaxf(top, at(i));
    top = largest<LANES>(top);
    for (int i = lane; i < count; i += LANES) total += expf(at(i) - top);
    return {top, warp_sum(total, LANES)};
  }

  __device__ __forceinline__ float operator()(float l) const { return expf(l - top) / total; }
};

// What the lanes of a token work on. Lanes without a token have the last one, and write nothing.
template <class T>
struct RoutingToken {
  int64_t n;
  int lane, slot;  // among the lanes of the token; among the tokens of the block
  bool here;
  const T* logits;

  __device__ __forceinline__ RoutingToken(const void* all, int64_t stride_row, int64_t N, int lanes)
      : lane(threadIdx.x % lanes), slot(threadIdx.x / lanes) {
    n = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + slot;
    here = n < N;
    if (!here) n = N - 1;
    logits = static_cast<const T*>(all) + n * stride_row;
  }

  __device__ __forceinline__ float logit(int e) const { return widen(logits[e]); }
};

// The worth of a group of `size` choices (their bits): the largest, or the sum of the two largest; NaN if one is. Each lane begins at
// another place of its group, so that lanes read different banks of shared memory.
__device__ __forceinline__ float worth_of(const uint32_t* choices, int size, int start, bool best_two) {
  float first = -INFINITY, second = -INFINITY;
  bool nan = false;
  for (int i = 0, at = start; i < size; i++, at = at + 1 == size ? 0 : at + 1) {
    const float v = float_of(choices[at]);
    nan = nan || v != v;
    second = fmaxf(second, fminf(first, v));
    first = fmaxf(first, v);
  }
  if (nan) return NAN;
  return best_two && size > 1 ? first + second : first;
}

// One pass for each token: scores, the choice, weights. Moves the logits in, from memory once, and K weights and experts out: E elements
// and 12 K bytes.
template <class T, int LANES>
__global__ void __launch_bounds__(ROUTING_THREADS) route_forward_tokens(const RouteForward args) {
  const int E = static_cast<int>(args.E), K = static_cast<int>(args.K), groups = static_cast<int>(args.groups);
  const RoutingToken<T> token(args.logits, args.stride_logits_row, args.N, LANES);
  const int lane = token.lane, more = max(K, groups);
  uint32_t* keys = reinterpret_cast<uint32_t*>(dynamic_shared()) + static_cast<int64_t>(token.slot) * (E + more);
  uint32_t* group_keys = keys + E;
  int* chosen = reinterpret_cast<int*>(group_keys);  // when the groups have been chosen
  const float* bias = static_cast<const float*>(args.bias);
  const Score score = args.weighting.score;
  const auto logit = [&](int e) { return token.logit(e); };

  Softmax softmax = {};
  if (score == Score::softmax) softmax = Softmax::over<LANES>(E, lane, logit);
  const auto choice = [&](int e) {
    const float l = logit(e), s = score == Score::softmax ? softmax(l) : score == Score::sigmoid ? logistic(l) : l;
    return bias == nullptr ? s : s + bias[e];
  };
  if (groups == 1) {
    for (int e = lane; e < E; e += LANES) keys[e] = key_of(choice(e));
  } else {
    const int size = E / groups;
    for (int e = lane; e < E; e += LANES) keys[e] = bits_of(choice(e));  // not keys yet
    __syncwarp();
    for (int g = lane; g < groups; g += LANES) group_keys[g] = key_of(worth_of(keys + g * size, size, g % size, score == Score::sigmoid));
    Picker<LANES> picker(group_keys, groups, lane);
    for (int i = 0; i < args.top_groups; i++) picker.take();
    __syncwarp();
    for (int e = lane; e < E; e += LANES) keys[e] = key_of(group_keys[e / size] == 0 ? float_of(keys[e]) : -INFINITY);
    __syncwarp();
  }

  Picker<LANES> picker(keys, E, lane);
  for (int k = 0; k < K; k++) {
    const int e = picker.take();
    if (k % LANES == lane) chosen[k] = e;
  }
  // From here on lane l has the choices l, l + LANES, ..., which it wrote itself.
  const auto chosen_logit = [&](int k) { return logit(chosen[k]); };
  const bool over_chosen = args.weighting.renormalize || score == Score::softmax_topk;
  if (over_chosen && score == Score::sigmoid) {
    softmax = Softmax::over<LANES>(K, lane, [&](int k) { return log_logistic(chosen_logit(k)); });
  } else if (over_chosen) {
    softmax = Softmax::over<LANES>(K, lane, chosen_logit);
  }
  const float scale = static_cast<float>(args.weighting.scale);
  for (int k = lane; k < K && token.here; k += LANES) {
    const float l = chosen_logit(k);
    const float r = score != Score::sigmoid ? softmax(l) : over_chosen ? softmax(log_logistic(l)) : logistic(l);
    static_cast<float*>(args.weights)[token.n * K + k] = scale * r;
    args.experts[token.n * K + k] = chosen[k];
  }
}

// The row of a token's gradient is made in shared memory: zeros, then the chosen ones. Moves the logits (those of the chosen alone, but for
// a softmax over all), K dweights and experts in, dlogits out. A number that is no expert's counts for nothing.
template <class T, int LANES>
__global__ void __launch_bounds__(ROUTING_THREADS) route_backward_tokens(const RouteBackward args) {
  const int E = static_cast<int>(args.E), K = static_cast<int>(args.K);
  const RoutingToken<T> token(args.logits, args.stride_logits_row, args.N, LANES);
  const int lane = token.lane;
  float* row = reinterpret_cast<float*>(dynamic_shared()) + static_cast<int64_t>(token.slot) * E;
  const float* dweights = static_cast<const float*>(args.dweights) + token.n * K;
  const int64_t* experts = args.experts + token.n * K;
  const float scale = static_cast<float>(args.weighting.scale);
  const bool sigmoid = args.weighting.score == Score::sigmoid, all = args.weighting.score == Score::softmax && !args.weighting.renormalize;
  const bool over_chosen = !all && (!sigmoid || args.weighting.renormalize);
  const auto valid = [&](int k) { return experts[k] >= 0 && experts[k] < E; };
  const auto logit = [&](int e) { return token.logit(e); };
  // What the softmax is of; -inf weighs nothing.
  const auto chosen_logit = [&](int k) {
    if (!valid(k)) return -INFINITY;
    return sigmoid ? log_logistic(logit(experts[k])) : logit(experts[k]);
  };

  for (int e = lane; e < E; e += LANES) row[e] = 0;
  Softmax softmax = {};
  if (all) softmax = Softmax::over<LANES>(E, lane, logit);
  if (over_chosen) softmax = Softmax::over<LANES>(K, lane, chosen_logit);
  float dot = 0;
  if (all || over_chosen) {
    for (int k = lane; k < K; k += LANES) {
      if (valid(k)) dot += softmax(chosen_logit(k)) * (scale * dweights[k]);
    }
    dot = warp_sum(dot, LANES);
  }
  __syncwarp();
  for (int k = lane; k < K; k += LANES) {
    if (!valid(k)) continue;
    const float dr = scale * dweights[k];
    float dl = dr;  // all: the gradient of a score
    if (over_chosen) dl = softmax(chosen_logit(k)) * (dr - dot);
    if (sigmoid) {
      const float l = logit(experts[k]), rest = logistic(-l);  // 1 - s would be 0 where s is nearly 1
      dl = over_chosen ? dl * rest : dr * logistic(l) * rest;
    }
    row[experts[k]] = dl;
  }
  __syncwarp();
  for (int e = lane; e < E && token.here; e += LANES) {
    static_cast<T*>(args.dlogits)[token.n * E + e] = narrow<T>(all ? softmax(logit(e)) * (row[e] - dot) : row[e]);
  }
}

}  // namespace fastprimer
